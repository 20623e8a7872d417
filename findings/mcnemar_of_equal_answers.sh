#!/usr/bin/env bash
# McNemar's test compares two classifiers by the images on which only one of them is right.
# Two that answer everything alike, such as a network and its exported file, have no such
# image, and one expects p = 1. With the chi-squared statistic and its correction, the
# default of mlxtend 0.25.0, and exact=False in statsmodels 0.15.0, both give p = 0: as
# different as can be (NumPy warns of a division by zero). Where one image differs, p = 1.
# The correction is not held at 0, either: one image each way gives p = 0.48, although
# the two are level. exact=True gives 1 in all three cases.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mlxtend==0.25.0 statsmodels==0.15.0 numpy==2.4.6 \
    scipy==1.17.1 pandas==3.1.1 scikit-learn==1.9.1 matplotlib==3.11.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
from mlxtend.evaluate import mcnemar, mcnemar_table
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_of_statsmodels

truth = np.zeros(100, int)
first = truth.copy()
first[:10] = 1  # 10 of 100 wrong
one_less, one_each = first.copy(), first.copy()
one_less[0] = 0  # one image that the first has wrong is right
one_each[[0, 99]] = 0, 1  # and one that it has right is wrong
found = {}
for name, second in {
    "all alike": first,
    "one image differs": one_less,
    "one each way": one_each,
}.items():
    table = mcnemar_table(truth, first, second)
    found[name] = [
        mcnemar(table)[1],
        mcnemar_of_statsmodels(table, exact=False).pvalue,
        mcnemar(table, exact=True)[1],
    ]
    found[name] = [round(float(p), 2) for p in found[name]]
    print(name, table.tolist(), "p of mlxtend, statsmodels, exact:", found[name])
assert found == {
    "all alike": [0.0, 0.0, 1.0],
    "one image differs": [1.0, 1.0, 1.0],
    "one each way": [0.48, 0.48, 1.0],
}, "changed"
PYTHON
