#!/usr/bin/env bash
# scikit-learn 1.9.1: log_loss clips probabilities, so that a 0 does not give infinity.
# One expects the loss of float16 probabilities (of a network in half precision) to be
# that of the same numbers in float64, up to rounding. float16 holds 0.00003 well. But
# they are clipped at float16's *machine epsilon*, 0.001: no answer can cost more than
# 6.93, however sure and wrong it was. A network that is sure, and wrong on one image of
# ten, looks much better in float16 than in float64: it overtakes a more modest one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import sklearn
from sklearn.metrics import log_loss

labels = np.zeros(1000, dtype=int)
networks = {}
for name, low in {"sure": 3e-5, "modest": 3e-3}.items():
    right = np.full(1000, 1 - low)
    right[:100] = low  # one of ten is wrong
    networks[name] = np.stack([right, 1 - right], 1)
networks["modest"][100:] = [0.85, 0.15]
found = {}
print("scikit-learn", sklearn.__version__, "(log_loss of float64, of float16)")
for name, exact in networks.items():
    half = exact.astype(np.float16)
    assert np.abs(half[:100, 0] / exact[:100, 0] - 1).max() < 0.01  # float16 holds them
    by_hand = -np.log(half[:, 0].astype(float)).mean()
    found[name] = log_loss(labels, exact, labels=[0, 1]), log_loss(labels, half, labels=[0, 1])
    print(f"  {name}: {found[name][0]:.3f}, {found[name][1]:.3f} (by hand {by_hand:.3f})")
    assert abs(by_hand - found[name][0]) < 0.01
most = log_loss([0], np.array([[3e-5, 1]], dtype=np.float16), labels=[0, 1])
print(f"  the most that an answer can cost in float16: {most:.3f}")
assert abs(most + np.log(np.finfo(np.float16).eps)) < 0.01, "this has changed"
sure, modest = found["sure"], found["modest"]
assert sure[0] > modest[0] and sure[1] < modest[1], "this has changed"
PYTHON
