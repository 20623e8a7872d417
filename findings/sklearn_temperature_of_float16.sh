#!/usr/bin/env bash
# scikit-learn 1.9.1, CalibratedClassifierCV(method="temperature"): from a frozen network
# that gives float16 probabilities, one expects what it gets in float32, up to rounding.
# But it is guessed whether predict_proba gave probabilities: every row has to add up to 1
# nearly exactly. In float16, not all do, so the *probabilities* are taken for logits, and
# go through a softmax again: the "calibrated" answers have a higher loss than the raw
# ones. The guess is made anew for each call: an image that is shown alone may pass for
# probabilities, and then gets another answer than in a batch. No warning is given.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
import numpy as np
import sklearn
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator


class Network(ClassifierMixin, BaseEstimator):
    def fit(self, logits, kind):
        self.classes_, self.kind_ = np.arange(10), kind
        return self

    def predict_proba(self, logits):
        return softmax(logits, axis=1).astype(self.kind_)

    def predict(self, logits):
        return self.predict_proba(logits).argmax(1)


rng = np.random.default_rng(0)
labels = rng.integers(10, size=4000)
logits = rng.normal(size=(4000, 10))
logits[np.arange(4000), labels] += 2
logits *= 3  # too sure
new = logits[2000:]
print("scikit-learn", sklearn.__version__)
found, moved = {}, {}
for kind in ("float32", "float16"):
    network = Network().fit(logits, kind)
    raw = network.predict_proba(new).astype("float64")
    calibrated = CalibratedClassifierCV(FrozenEstimator(network), method="temperature")
    calibrated.fit(logits[:2000], labels[:2000])
    batch = calibrated.predict_proba(new)
    alone = np.concatenate([calibrated.predict_proba(image[None]) for image in new])
    right = [answers[np.arange(2000), labels[2000:]] for answers in (raw, batch, alone)]
    found[kind] = losses = [-np.log(np.maximum(p, 1e-7)).mean() for p in right]
    moved[kind] = (np.abs(batch - alone).max(1) > 0.02).sum()
    print(f"{kind}: rows are off 1 by up to {np.abs(raw.sum(1) - 1).max():.7f};")
    print("  loss, raw {:.3f}, calibrated {:.3f}, one by one {:.3f};".format(*losses))
    print(f"  of 2,000 answers, {moved[kind]} change when the image is alone")
raw, batch, alone = found["float32"]
assert batch < raw - 0.05 and abs(batch - alone) < 1e-6, "this has changed"
_, batch, alone = found["float16"]
assert raw + 0.05 < batch < alone and 0 == moved["float32"] < moved["float16"], "changed"
PYTHON
