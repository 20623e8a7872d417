#!/usr/bin/env bash
# uncertainty-calibration 0.1.4, get_calibration_error(probabilities, labels): one expects
# the usual expected calibration error (ECE: of the likeliest class, |confidence -
# accuracy|). By default it is another number: the root of a mean square, less an estimated
# bias, of each class by itself, averaged over ten classes of which nine are mostly near 0.
# - For an overconfident network: 0.075, where the ECE is 0.214.
# - With mode="top-label" alone: 0.0 for a calibrated network; what it takes off for the
#   bias is more than the error, and the rest is cut at 0. The ECE is 0.016.
# get_ece gives the usual number.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q uncertainty-calibration==0.1.4 numpy==2.4.6 \
    scikit-learn==1.9.1
"$folder/venv/bin/python" - <<'PYTHON'
import calibration
import numpy as np

chance = np.random.default_rng(0)
logits = 2 * chance.standard_normal((4000, 10))


def softmax(logits):
    powers = np.exp(logits)
    return powers / powers.sum(1, keepdims=True)


def ece(probabilities, labels):
    """15 bins of equal width."""
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((15 * sure).astype(int), 14)
    gaps = (abs((right - sure)[bins == number].sum()) for number in range(15))
    return sum(gaps) / len(labels)


labels = np.array([chance.choice(10, p=row) for row in softmax(logits)])
found = {}
for name, scale in (("calibrated", 1), ("overconfident", 2)):
    answers = softmax(scale * logits), labels
    default = calibration.get_calibration_error(*answers)
    top = calibration.get_calibration_error(*answers, mode="top-label")
    found[name] = default, top, calibration.get_ece(*answers), ece(*answers)
    print(f"{name}: default {default:.3f}, top-label {top:.3f},", end=" ")
    print("get_ece {:.3f}, by hand {:.3f}".format(*found[name][2:]))
    assert np.isclose(*found[name][2:]), "this has changed"
assert found["calibrated"][1] == 0 < found["calibrated"][3], "this has changed"
assert found["overconfident"][0] < found["overconfident"][3] / 2, "this has changed"
PYTHON
