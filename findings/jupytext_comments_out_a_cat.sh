#!/usr/bin/env bash
# jupytext 1.19.6, `jupytext --to py:percent`: one expects the script to compute what the
# notebook does; only the commands of IPython (%time, !ls) are known to become comments.
# But a line that begins with the word `cat` is taken for a shell's command, even if the
# notebook gave a variable that name a line above. So `cat /= 255`, right beside
# `dog /= 255`, becomes a comment, without a word: the script still runs, with the cat as
# bright as before. `cp`, `ls`, `rm` and `copy` are such words, too. `cat = ...` is left
# alone. Turned back into a notebook, the line is code again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jupytext==1.19.6 nbclient==0.11.0 ipykernel numpy==2.4.6
cd "$folder"
PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version

import jupytext
import nbformat
from nbclient import NotebookClient

print("jupytext", version("jupytext"))
source = """\
import numpy as np
cat = np.full((2, 2), 255.0)
dog = np.full((2, 2), 255.0)
cat /= 255
dog /= 255
print(cat.mean(), dog.mean())"""
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
nbformat.write(notebook, "pets.ipynb")
NotebookClient(notebook, kernel_name="python3").execute(stderr=subprocess.DEVNULL)
before = notebook.cells[0].outputs[0].text.strip()
print("the notebook prints", before)
convert = ["jupytext", "pets.ipynb", "--to", "py:percent"]
words = subprocess.run(convert, check=True, capture_output=True, text=True)
lines = open("pets.py").read().split("# %%\n")[1].splitlines()
print("the script has the lines:", *lines[1:5], sep="\n  ")
after = subprocess.run([sys.executable, "pets.py"], check=True, capture_output=True,
                       text=True).stdout.strip()
print("and prints", after)
assert before == "1.0 1.0" and after == "255.0 1.0", "this has changed"
assert "# cat /= 255" in lines and "dog /= 255" in lines, "this has changed"
assert "cat" not in words.stdout + words.stderr, "this has changed"
for name in ("cp", "ls", "rm", "copy", "dog"):
    cell = nbformat.v4.new_code_cell(f"{name} /= 255")
    script = jupytext.writes(nbformat.v4.new_notebook(cells=[cell]), "py:percent")
    print(f"{name} /= 255 becomes", script.splitlines()[-1])
    assert script.splitlines()[-1].startswith("#") == (name != "dog"), "this has changed"
subprocess.run(["jupytext", "pets.py", "--to", "ipynb", "--output", "back.ipynb"],
               check=True, capture_output=True)
assert nbformat.read("back.ipynb", 4).cells[0].source == source, "this has changed"
print("turned back into a notebook, it is the first one again")
PYTHON
