#!/usr/bin/env bash
# skorch 1.4.0: NeuralNetClassifier is an estimator like those of scikit-learn, so one
# expects fit(X, y) to learn from all of X. A fifth of it is set aside for a validation of
# its own: the network never learns from that. A student of skorch and one of scikit-learn
# have not seen the same data. train_split=None gives it all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q skorch==1.4.0 torch==2.14.1 numpy==2.4.6 \
    scipy==1.17.1 scikit-learn==1.9.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import skorch
import torch
from skorch import NeuralNetClassifier
from torch import nn

print("skorch", skorch.__version__)
seen = []


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 3)

    def forward(self, numbers):
        if self.training:
            seen.extend(numbers.flatten().tolist())
        return self.layer(numbers).softmax(1)


images, labels = np.arange(300, dtype=np.float32)[:, None], np.arange(300) % 3
found = {}
for title, options in {"by default": {}, "train_split=None": {"train_split": None}}.items():
    seen.clear()
    NeuralNetClassifier(Student, max_epochs=5, verbose=0, **options).fit(images, labels)
    found[title] = len(set(seen))
    print(f"{title}: {found[title]} of 300 images are learned from, in five epochs")
assert found == {"by default": 240, "train_split=None": 300}, "this has changed"
PYTHON
