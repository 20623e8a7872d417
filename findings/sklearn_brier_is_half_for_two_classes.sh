#!/usr/bin/env bash
# scikit-learn 1.9.1, brier_score_loss with one column a class: one expects one score for
# any number of classes, the mean over images of the sum of squared errors. With two
# columns it is half of that, with three or more it is not. A network that knows nothing
# seems to get much worse with a third class, which no photograph shows and to which it
# gives no probability. scale_by_half=False gives one score for both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import sklearn
from sklearn.metrics import brier_score_loss

labels = np.array([0, 1] * 50)
print("scikit-learn", sklearn.__version__, "(default, scale_by_half=False)")
found = {}
for classes in (2, 3, 10):
    answers = np.zeros((100, classes))
    answers[:, :2] = 0.5
    by_hand = ((answers - np.eye(classes)[labels]) ** 2).sum(1).mean()
    options = {"labels": list(range(classes))}
    default = brier_score_loss(labels, answers, **options)
    whole = brier_score_loss(labels, answers, scale_by_half=False, **options)
    print(f"  {classes} columns: {default:.2f}, {whole:.2f} (by hand {by_hand:.2f})")
    found[classes] = default
    assert whole == by_hand == 0.5, "this has changed"
assert found == {2: 0.25, 3: 0.5, 10: 0.5}, "this has changed"
PYTHON
