#!/usr/bin/env bash
# pandas 3.1.1, to_json and read_json: JSON marks what is a string and what is a number,
# so one expects a table of results to come back as it was. Without a warning,
# - the names of photographs "000123", strings in the file, become the number 123,
# - an `inference_time` of 41 ms, in nanoseconds, becomes the 20th of April 1971, for the
#   column's name ends with _time (`inference_ns` stays a number),
# - a teacher's probability of 0.00000000001 is written as 0: to_json keeps ten places
#   after the point, not ten digits.
# dtype=False, for read_json, leaves the first two as they are.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pandas==3.1.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W error - <<'PYTHON'
import json

import pandas as pd

print("pandas", pd.__version__)
table = pd.DataFrame(
    {
        "photograph": ["000123", "000500"],
        "inference_time": [41_000_000, 40_200_000],  # nanoseconds
        "inference_ns": [41_000_000, 40_200_000],
        "cat": [1 - 1e-11, 0.75],
        "dog": [1e-11, 0.25],
    }
)
table.to_json("results.json", orient="records")
with open("results.json") as file:
    rows = json.load(file)
print("in the file:", rows[0])
assert rows[0]["photograph"] == "000123" and rows[0]["inference_time"] == 41_000_000
assert rows[0]["dog"] == 0 and table.dog[0] > 0, "this has changed"

back = pd.read_json("results.json", orient="records")
for name in table:
    print(f"{name}: {table[name][0]} ({table[name].dtype})", end=" -> ")
    print(f"{back[name][0]} ({back[name].dtype})")
assert back.photograph.tolist() == [123, 500], "this has changed"
assert back.inference_time[0] == pd.Timestamp("1971-04-20 12:53:20"), "this has changed"
assert (back.inference_ns == table.inference_ns).all()

untouched = pd.read_json("results.json", orient="records", dtype=False)
for name in ("photograph", "inference_time"):
    assert (untouched[name] == table[name]).all()
print("dtype=False:", untouched.loc[0, ["photograph", "inference_time"]].tolist())
PYTHON
