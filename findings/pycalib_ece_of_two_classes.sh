#!/usr/bin/env bash
# pycalib 0.1.0.dev6: ECE(labels, probabilities) takes one column for each class. A
# classifier that is always right and always sure has, one expects, an error of 0. With
# three columns it has. With two columns it gets 0.25. The labels of two classes become
# one column of zeros and ones, the probabilities stay two; both are laid end to end, and
# a label meets the probability of another image. So even the order of the images counts:
# well calibrated answers get 0.13, and the same answers, sorted, 0.16. conf_ECE and
# binary_ECE, of the same package, are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pycalib==0.1.0.dev6 scikit-learn==1.9.1 scipy==1.17.1 \
    statsmodels==0.15.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
from pycalib.metrics import ECE, binary_ECE, conf_ECE

IMAGES = 4000
chance = np.random.default_rng(0)
labels = chance.integers(2, size=IMAGES)
honest = chance.random(IMAGES)  # the probability of class 1, and what it stands for:
drawn = (chance.random(IMAGES) < honest).astype(int)
order = np.argsort(honest)
cases = {
    "right and sure": (labels, labels.astype(float)),
    "well calibrated": (drawn, honest),
    "the same, sorted": (drawn[order], honest[order]),
}
print("pycalib 0.1.0.dev6: ECE of 3 columns, ECE of 2, conf_ECE of 2, binary_ECE")
found = {}
for name, (truth, one) in cases.items():
    two = np.stack([1 - one, one], 1)
    three = np.stack([1 - one, one, 0 * one], 1)  # a third class that never occurs
    values = [ECE(truth, three), ECE(truth, two), conf_ECE(truth, two)]
    found[name] = [float(value) for value in (*values, binary_ECE(truth, one))]
    print(f"{name}:", [round(value, 3) for value in found[name]])
for three, _, confidence, binary in found.values():
    assert max(three, confidence, binary) < 0.03
assert found["right and sure"][0] == found["right and sure"][2] == 0
assert found["right and sure"][1] > 0.2, "changed"
assert found["well calibrated"][1] > 0.1, "changed"
assert abs(found["well calibrated"][1] - found["the same, sorted"][1]) > 0.02, "changed"
PYTHON
