#!/usr/bin/env bash
# baycomp 1.0.3, two_on_single: from the accuracies of two networks, the probability that
# the second is better. One has five seeds a network, and expects the posterior of a
# paired t-test. It takes the five for the folds of one cross-validation, whose training
# sets overlap, and adds 1 / (n - 1) to the variance's 1 / n: for five seeds 2.25 times the
# variance, and the probability that the gain is not above 0 is 0.019 in place of 0.005.
# runs=5, as if the seeds were runs, ends with a division by zero: it means repetitions of
# a cross-validation. The first probability stands for the first network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q baycomp==1.0.3 numpy==2.4.6 scipy==1.17.1
"$folder/venv/bin/python" - <<'PYTHON'
import baycomp
import numpy as np
from scipy import stats

alone = np.array([74.1, 74.6, 74.3, 73.9, 74.5])
distilled = np.array([75.6, 75.0, 76.4, 74.9, 75.9])
first, second = baycomp.two_on_single(alone, distilled)
paired = stats.ttest_rel(distilled, alone, alternative="greater").pvalue
posterior = baycomp.CorrelatedTTest(alone, distilled)
usual = np.var(distilled - alone, ddof=1) / 5
print(f"alone is better: {first:.4f}; one-sided paired t-test: {paired:.4f}")
print(f"variance of the mean: {posterior.var:.4f}, usually {usual:.4f}")
assert np.isclose(posterior.var / usual, 2.25), "this has changed"
assert first > 3 * paired, "this has changed"
try:
    baycomp.two_on_single(alone, distilled, runs=5)
except ZeroDivisionError as error:
    print(f"runs=5: {error}")
else:
    raise AssertionError("this has changed")
PYTHON
