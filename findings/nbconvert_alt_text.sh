#!/usr/bin/env bash
# nbconvert 7.17.2: alternative text that stands in a cell's or an output's metadata
# (`alt`) reaches the HTML by the template "classic" only. The default template, "lab",
# drops it, writes "No description has been provided for this image" in its place, and
# warns that alternative text is missing: of an image that has one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q nbconvert==7.17.2 nbformat==5.11.1
"$folder/venv/bin/python" - <<'PYTHON'
import logging

import nbconvert
import nbformat
from nbconvert import HTMLExporter

pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
output = nbformat.v4.new_output("display_data", {"image/png": pixel})
output.metadata["image/png"] = {"alt": "A single pixel"}
cell = nbformat.v4.new_code_cell("draw()", outputs=[output], metadata={"alt": "A single pixel"})
notebook = nbformat.v4.new_notebook(cells=[cell])
found = {}
for template in ("classic", "lab"):
    html, _ = HTMLExporter(template_name=template).from_notebook_node(notebook)
    found[template] = "A single pixel" in html, "No description has been provided" in html
print("nbconvert", nbconvert.__version__, "(alt kept, placeholder written):", found)
assert HTMLExporter().template_name == "lab"
assert found == {"classic": (True, False), "lab": (False, True)}, "this has changed"
PYTHON
