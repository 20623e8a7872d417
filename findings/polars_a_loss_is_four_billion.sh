#!/usr/bin/env bash
# polars 2.1.0: in how many photographs of each class is a student right, less its
# teacher? One subtracts two sums of true and false, and expects a negative number where
# the student is worse. The sum of a Boolean column is an unsigned number of 32 bits, and
# so is the difference: 2 fewer are 4294967294 more, without a word. Sorted by gain, the
# classes in which the student lost come first. The same sums of two *Series* are plain
# Python numbers, and their difference is right; so are the difference of two means and
# that of pandas. len() is unsigned, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q polars==2.1.0 pandas==3.1.1 numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
import pandas as pd
import polars as pl

# Of 100 photographs a class: how many the teacher and the student get right
RIGHT = {"beagle": (90, 88), "dingo": (80, 85), "samoyed": (95, 94)}
rows = {"class": [], "teacher": [], "student": []}
for name, (teacher, student) in RIGHT.items():
    rows["class"] += [name] * 100
    rows["teacher"] += [place < teacher for place in range(100)]
    rows["student"] += [place < student for place in range(100)]
frame = pl.DataFrame(rows)

print("polars", pl.__version__)
gain = pl.col("student").sum() - pl.col("teacher").sum()
table = frame.group_by("class").agg(gain=gain).sort("gain", descending=True)
for name, value in table.rows():
    print(f"{name}: {value}")
found = dict(table.rows())
true = {name: student - teacher for name, (teacher, student) in RIGHT.items()}
assert table["gain"].dtype == pl.UInt32, "this has changed"
assert found == {name: value % 2**32 for name, value in true.items()}, "this has changed"
assert table["class"].to_list() == ["samoyed", "beagle", "dingo"]  # the best comes last

beagles = frame.filter(pl.col("class") == "beagle")
series = beagles["student"].sum() - beagles["teacher"].sum()
means = beagles.select(pl.col("student").mean() - pl.col("teacher").mean()).item()
fewer = beagles.select(pl.col("student").sum() - pl.len()).item()
groups = pd.DataFrame(rows).groupby("class")
by_pandas = groups["student"].sum() - groups["teacher"].sum()
print(f"beagle, two Series: {series}; two means: {means:.2f}; sum - len(): {fewer}")
print("pandas:", by_pandas.to_dict())
assert series == -2 and abs(means + 0.02) < 1e-9 and by_pandas.to_dict() == true
assert fewer == 2**32 - 12, "this has changed"
PYTHON
