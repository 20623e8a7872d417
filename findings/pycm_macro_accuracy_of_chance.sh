#!/usr/bin/env bash
# pycm 4.6: from "ACC Macro", one expects the mean accuracy over classes, each class by
# itself (scikit-learn's balanced accuracy; here it is called TPR Macro). But the ACC of
# a class also counts the images of *other* classes that are rightly called other. So
# chance on ten classes has 82 %, and a network that calls everything class 0 has 82 %,
# too: its ACC of a class that it never names is 90 %.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pycm==4.6 scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from pycm import ConfusionMatrix
from sklearn.metrics import balanced_accuracy_score

labels = np.repeat(np.arange(10), 100)
chance = np.random.default_rng(0).integers(0, 10, 1000)
for name, answers in {"chance": chance, "always 0": 0 * labels}.items():
    matrix = ConfusionMatrix(labels.tolist(), answers.tolist())
    balanced = balanced_accuracy_score(labels, answers)
    print(
        f"{name}: ACC Macro {matrix.ACC_Macro:.3f}, TPR Macro {matrix.TPR_Macro:.3f}, "
        f"balanced accuracy {balanced:.3f}, ACC of class 5 {matrix.ACC[5]:.2f}"
    )
    assert abs(matrix.ACC_Macro - 0.82) < 0.01, "this has changed"
    assert abs(matrix.TPR_Macro - balanced) < 1e-9 and balanced < 0.12
assert abs(matrix.ACC[5] - 0.9) < 1e-9, "this has changed"
PYTHON
