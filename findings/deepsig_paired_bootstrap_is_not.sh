#!/usr/bin/env bash
# deepsig 1.2.8: bootstrap_test documents itself as a "paired bootstrap test", beside the
# paired permutation_test. Ten seeds differ much from one another, but on each seed model
# A beats model B by half a point: a paired test sees that at once. One expects p near 0
# from both. permutation_test says so; bootstrap_test says 0.2. It draws the scores of A
# and those of B apart from each other, so the pairs are lost: to give B's scores in
# another order, which ruins a paired test, changes (nearly) nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q deepsig==1.2.8 scipy==1.17.1 pandas==2.3.3 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from deepsig import bootstrap_test, permutation_test
from scipy.stats import ttest_ind, ttest_rel

SAMPLES = 5000
chance = np.random.default_rng(0)
a = chance.normal(0.85, 0.02, 10)
b = a - 0.005 + chance.normal(0, 0.001, 10)


def paired_bootstrap(first, second):
    """What one expects: pairs are drawn, under the hypothesis that their mean is 0."""
    lead = first - second
    drawn = chance.choice(lead - lead.mean(), (SAMPLES, len(lead))).mean(1)
    return (drawn >= lead.mean()).mean()


tests = {
    "t, paired": lambda x, y: ttest_rel(x, y, alternative="greater").pvalue,
    "t, unpaired": lambda x, y: ttest_ind(x, y, alternative="greater").pvalue,
    "bootstrap of pairs": paired_bootstrap,
    "permutation_test": lambda x, y: permutation_test(x, y, SAMPLES, seed=0),
    "bootstrap_test": lambda x, y: bootstrap_test(x, y, SAMPLES, seed=0),
}
right = {name: float(test(a, b)) for name, test in tests.items()}
wrong = {name: float(test(a, np.roll(b, 1))) for name, test in tests.items()}
print("deepsig 1.2.8: one-sided p of A against B; then with the pairs broken up")
for name in tests:
    print(f"{name}: {right[name]:.4f}; {wrong[name]:.4f}")
assert (a > b).all()
for name in ("t, paired", "bootstrap of pairs", "permutation_test"):
    assert right[name] < 0.005 and wrong[name] > 0.1, name
for found in (right, wrong):
    assert abs(found["bootstrap_test"] - found["t, unpaired"]) < 0.04, "changed"
assert right["bootstrap_test"] > 0.15, "changed"
PYTHON
