#!/usr/bin/env bash
# marimo 0.25.2: one expects `marimo convert` to keep what an ordinary notebook computes,
# or to refuse. But a variable that is set in one cell and changed in a later cell gets a
# new name there. `total += number` in a loop becomes `total_1 = total + number`: every
# turn begins again at the old total, and only the last turn counts. The notebook prints
# 6 and 10; the converted file prints 3 and 9. Neither the converter nor the run says a
# word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q marimo==0.25.2 nbformat==5.11.1 nbclient==0.11.0 ipykernel==7.4.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import subprocess
import sys
from pathlib import Path

import marimo
import nbformat
from nbclient import NotebookClient

cells = ["total = 0\nbest = 9",
         "for number in [1, 2, 3]:\n    total += number",
         "for score in [1, 10, 2]:\n    best = max(best, score)",
         "print(total, best)"]
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
nbformat.write(notebook, "sums.ipynb")
NotebookClient(notebook, kernel_name="python3").execute()
before = notebook.cells[-1].outputs[0].text.split()


def run(*arguments):
    done = subprocess.run([sys.executable, *arguments], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


said = run("-m", "marimo", "convert", "sums.ipynb", "-o", "sums.py")
after = run("sums.py").split()
loop = [line.strip() for line in Path("sums.py").read_text().splitlines() if "total + " in line]
print("marimo", marimo.__version__, "| notebook prints", before, "| converted prints", after)
print("the converter says:", said.strip(), "| the loop is now:", loop)
assert before == ["6", "10"]
assert after == ["3", "9"] and loop == ["total_1 = total + number"], "this has changed"
assert said.strip() == "Converted notebook saved to sums.py", "this has changed"
PYTHON
