#!/usr/bin/env bash
# scipy 1.17.1, ttest_rel(a, b): on which photographs is the student right (1) or wrong
# (0), on which the teacher? One expects it to take zeros and ones in any type of number,
# as ttest_ind and wilcoxon do. It subtracts them as they come: in uint8, 0 - 1 is 255. So
# whatever comes first wins, with t > 4 and p < 0.0001, without a word: a worse student is
# better than its teacher, the teacher is better than the student, and two that are level
# are each better than the other. int8 and float64 are right; bool raises an error, which
# leads to astype("uint8"). Counts in uint32 (sums of polars) have the wrong sign, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
import numpy as np
import scipy
from scipy.stats import ttest_ind, ttest_rel, wilcoxon

print("scipy", scipy.__version__)
for only_student, only_teacher in ((20, 60), (40, 40)):
    student, teacher = np.zeros(1000, bool), np.zeros(1000, bool)
    student[: 800 + only_student] = True  # both are right on the first 800
    teacher[:800] = teacher[-only_teacher:] = True
    print(f"student right on {student.mean():.1%}, teacher on {teacher.mean():.1%}")
    found, others = {}, {}
    for kind in ("float64", "int8", "uint8"):
        one, two = student.astype(kind), teacher.astype(kind)
        found[kind] = ttest_rel(one, two), ttest_rel(two, one)
        others[kind] = ttest_ind(one, two).pvalue, wilcoxon(one, two).pvalue
        for name, test in zip(("student, teacher", "teacher, student"), found[kind]):
            print(f"  {kind:7} ttest_rel({name}): t {test.statistic:5.2f}",
                  f"p {test.pvalue:.2g}")
    right, wrong = found["float64"], found["uint8"]
    assert np.isclose(right[0].statistic, -right[1].statistic), "this has changed"
    assert np.isclose(right[0].pvalue, found["int8"][0].pvalue), "this has changed"
    assert all(test.statistic > 4 and test.pvalue < 1e-4 for test in wrong), "changed"
    same = np.allclose(others["uint8"], others["float64"])
    print("  ttest_ind and wilcoxon say the same in uint8 as in float64:", same)
    assert same, "this has changed"
    interval = wrong[0].confidence_interval()
    print(f"  uint8: the student gains {interval.low:.1f} to {interval.high:.1f} (of 1)")
    assert interval.low > 1, "this has changed"
try:
    ttest_rel(student, teacher)
    raise SystemExit("this has changed")
except TypeError as error:
    print("bool:", str(error)[:62])
one, two = np.array([7, 5, 9, 4, 6], "uint32"), np.array([8, 7, 9, 5, 8], "uint32")
signed = ttest_rel(one.astype(int), two.astype(int)).statistic
unsigned = ttest_rel(one, two).statistic
print(f"five classes, 0 to 2 fewer each: int64 t {signed:.2f}, uint32 t {unsigned:.2f}")
assert signed < -3 and unsigned > 3, "this has changed"
PYTHON
