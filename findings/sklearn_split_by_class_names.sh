#!/usr/bin/env bash
# scikit-learn 1.9.1: train_test_split(photographs, stratify=labels, random_state=0) in a
# teacher's script and in a student's, of the same list. One expects the same split, as
# long as the same photographs share a class; StratifiedKFold promises that it does not
# depend on what the classes are called. train_test_split draws class by class, in the
# order in which the labels sort. Imagenette's folders (n01440764) and its names (tench)
# sort differently: the teacher has learned from more than half of the student's test
# photographs. To call one class otherwise can be enough.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
import numpy as np
import sklearn
from sklearn.model_selection import StratifiedKFold, train_test_split

print("scikit-learn", sklearn.__version__)
folders = np.array("n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 "
                   "n03417042 n03425413 n03445777 n03888257".split())
names = np.array(["tench", "English springer", "cassette player", "chain saw", "church",
                  "French horn", "garbage truck", "gas pump", "golf ball", "parachute"])
numbers = np.repeat(np.arange(10), 100)
labels = {"numbers": numbers, "folders": folders[numbers], "names": names[numbers],
          "one renamed": np.where(names == "chain saw", "power saw", names)[numbers]}
photographs = np.arange(1000)


def leaked(teacher, student, stratify=True):
    """How many of the student's test photographs has the teacher learned from?"""
    parts = [train_test_split(photographs, test_size=0.2, random_state=0,
                              stratify=labels[kind] if stratify else None)
             for kind in (teacher, student)]
    return len(np.intersect1d(parts[0][0], parts[1][1]))


found = {}
for teacher, student in (("folders", "numbers"), ("folders", "names"),
                         ("names", "one renamed")):
    found[student] = leaked(teacher, student)
    print(f"labels of the teacher: {teacher}, of the student: {student}:",
          f"{found[student]} of 200 leak")
assert found["numbers"] == 0, "this has changed"
assert found["names"] > 100 and found["one renamed"] > 50, "this has changed"
plain = leaked("folders", "names", stratify=False)
cross = StratifiedKFold(5, shuffle=True, random_state=0)
folds = [[test for _, test in cross.split(photographs, labels[kind])]
         for kind in ("folders", "names")]
equal = np.array_equal(*folds)
print(f"folders and names, without stratify: {plain} leak;",
      f"StratifiedKFold: the same folds: {equal}")
assert plain == 0 and equal, "this has changed"
assert "invariant to class label" in StratifiedKFold.__doc__, "this has changed"
PYTHON
