#!/usr/bin/env bash
# nbval 0.11.0: one expects `pytest --nbval` to pass on a notebook that was executed a
# moment ago, with the same kernel, and whose output is always the same. Three common
# kinds of cell fail each time: a last line that ends in ";" (its value counts as new
# output, for nbval runs cells without history, and IPython looks for the ";" there), a
# loop that shows its progress with clear_output(), and a display that is updated. The
# notebook keeps what is left at the end; nbval compares it with all that was ever sent.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q nbval==0.11.0 pytest==9.2.0 nbformat==5.11.1 nbclient==0.11.0 \
  ipykernel==7.4.0 ipython==9.18.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version
from xml.etree import ElementTree

import nbformat
from nbclient import NotebookClient

kinds = {
    "import": "from IPython.display import clear_output, display",
    "plain": "print(6 * 7)\n6 * 7",
    "semicolon": "6 * 7;",
    "progress": "for epoch in (1, 2):\n    clear_output(wait=True)\n    print('epoch', epoch)",
    "update": "handle = display('wait', display_id='bar')\nhandle.update('ready')",
}
notebook = nbformat.v4.new_notebook(
    cells=[nbformat.v4.new_code_cell(source) for source in kinds.values()],
    metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
NotebookClient(notebook).execute()
for kind, cell in zip(kinds, notebook.cells):
    print(kind, "has stored", [output.get("text") or output.data for output in cell.outputs])
nbformat.write(notebook, "fresh.ipynb")
subprocess.run([sys.executable, "-m", "pytest", "-q", "--nbval", "--junitxml=report.xml",
                "fresh.ipynb"], capture_output=True)
cases = ElementTree.parse("report.xml").iter("testcase")
passed = {kind: case.find("failure") is None for kind, case in zip(kinds, cases)}
print("nbval", version("nbval"), "(passed):", passed)
assert passed == {"import": True, "plain": True, "semicolon": False, "progress": False,
                  "update": False}, "this has changed"
PYTHON
