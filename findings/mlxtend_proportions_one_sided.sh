#!/usr/bin/env bash
# mlxtend 0.25.0: proportion_difference(accuracy_1, accuracy_2, n) "computes the test
# statistic and p-value for a difference of proportions test". One expects the p-value
# that statsmodels' test has: two-sided, the same in either order, small when the two
# differ. It is the lower tail alone: 0.95 against 0.85, a clear win of the first, has
# p = 1.0000; no difference at all has p = 0.5; and 0.885 against 0.90, which is not
# significant (p = 0.28), has half that; the other way round it has 0.86.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mlxtend==0.25.0 statsmodels==0.15.0 scipy==1.17.1 \
    numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from mlxtend.evaluate import proportion_difference
from statsmodels.stats.proportion import proportions_ztest

IMAGES = 1000
print("mlxtend 0.25.0: two accuracies, on 1000 images each; p by mlxtend, by statsmodels")
found = {}
for first, second in ((0.95, 0.85), (0.85, 0.95), (0.9, 0.9), (0.885, 0.9), (0.9, 0.885)):
    _, one = proportion_difference(first, second, IMAGES)
    counts = [round(first * IMAGES), round(second * IMAGES)]
    _, two = proportions_ztest(counts, [IMAGES, IMAGES], prop_var=False)
    found[first, second] = float(one), float(two)
    print(f"{first} against {second}: {one:.4f} {two:.4f}")
for (first, second), (one, two) in found.items():
    assert abs(one - (two / 2 if first < second else 1 - two / 2)) < 0.001, "changed"
assert found[0.95, 0.85][0] > 0.9999 and found[0.95, 0.85][1] < 0.0001, "changed"
PYTHON
