#!/usr/bin/env bash
# statsmodels 0.15.0, multipletests: some students are compared with a teacher, and the
# p-values corrected. One has the very same accuracies (a copy, or a setting without
# effect), for which scipy's paired t-test gives p = nan. One expects that no difference
# is found for this one, and p-values for the others. By the default method ("hs") and by
# "holm", the one that is the same counts as significantly different, as the others are
# here: `reject` is True for nan. By "fdr_bh" it is not, but *all* corrected p-values are
# nan, also those whose `reject` is True. Neither warns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q statsmodels==0.15.0 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import numpy as np
import statsmodels
from scipy.stats import ttest_rel
from statsmodels.stats.multitest import multipletests

print("statsmodels", statsmodels.__version__)
teacher = np.array([0.912, 0.905, 0.918, 0.909, 0.915])
students = {
    "small": teacher - [0.030, 0.034, 0.029, 0.033, 0.031],
    "tiny": teacher - [0.071, 0.064, 0.073, 0.069, 0.066],
    "the same": teacher.copy(),
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # scipy divides 0 by 0
    p_values = [ttest_rel(teacher, scores).pvalue for scores in students.values()]
print("p:", *(f"{name} {p:.6f}" for name, p in zip(students, p_values)), sep="\n  ")
assert np.isnan(p_values).tolist() == [False, False, True]
found = {}
with warnings.catch_warnings():
    warnings.simplefilter("error")
    for method in ("hs", "holm", "bonferroni", "fdr_bh"):
        reject, corrected = multipletests(p_values, method=method)[:2]
        found[method] = reject.tolist(), np.isnan(corrected).tolist()
        print(f"{method}: reject {reject.tolist()}, p {corrected.round(6).tolist()}")
    default = multipletests(p_values)[0].tolist()
assert default == found["hs"][0] == found["holm"][0] == [True] * 3, "this has changed"
assert found["bonferroni"] == ([True, True, False], [False, False, True]), "changed"
assert found["fdr_bh"] == ([True, True, False], [True] * 3), "this has changed"
PYTHON
