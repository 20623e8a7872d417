#!/usr/bin/env bash
# h5py 3.16.0: labels in a data set of uint8, with -1 for photographs without a label. One
# expects an error, as numpy 2 gives for a number that does not fit, or 255, as its astype
# gives. An array is written with the nearest numbers that fit, without a word: -1 becomes
# 0, the first class, and a class 1000 becomes 255. So every photograph without a label
# counts as one of class 0. Written one by one, the same labels are 255 and 232.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q h5py==3.16.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W error - <<'PYTHON'
import h5py
import numpy as np

print("h5py", h5py.__version__)
labels = np.array([3, -1, 7, -1, 1000])
try:
    np.zeros(1, "uint8")[0] = -1
    raise SystemExit("this has changed")
except OverflowError as error:
    print("numpy, one number:", error)
print("numpy, astype:", labels.astype("uint8").tolist())
with h5py.File("labels.h5", "w") as file:
    file.create_dataset("at once", data=labels, dtype="uint8")
    single = file.create_dataset("one by one", (5,), "uint8")
    for place, label in enumerate(labels):
        single[place] = label
found = {}
with h5py.File("labels.h5") as file:
    for name in file:
        found[name] = file[name][:].tolist()
        print(f"h5py, {name}: {found[name]}")
assert found["at once"] == [3, 0, 7, 0, 255], "this has changed"
assert found["one by one"] == labels.astype("uint8").tolist(), "this has changed"
PYTHON
