#!/usr/bin/env bash
# cleanvision 0.3.7 calls images exact duplicates if the bytes of their arrays agree. One
# expects that they look the same. In a palette image (GIF, PNG of 256 colours) these
# bytes are numbers of colours, not colours: a red and a blue circle, drawn by the same
# program, are "exact duplicates", and so are a plain image that is wide and one that is
# high, since the shape is not compared. Converted to RGB, the circles differ.
# (Class maps of a segmentation data set are such images.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q cleanvision==0.3.7 pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys
from pathlib import Path

from cleanvision import Imagelab
from PIL import Image, ImageDraw


def draw(mode, colour):
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=colour)
    return image if mode == "RGB" else image.quantize(2)


def find_copies(name, images):
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    for label, image in images.items():
        image.save(folder / f"{label}.png")
    lab = Imagelab(data_path=str(folder))
    lab.find_issues({"exact_duplicates": {}}, n_jobs=1, verbose=False)
    found = lab.issues["is_exact_duplicates_issue"].sum()
    print(f"{name}: {found} of {len(images)} are exact duplicates")
    return found


colours = ("red", "blue")
palette = find_copies("palette", {c: draw("P", c) for c in colours})
rgb = find_copies("rgb", {c: draw("RGB", c) for c in colours})
shapes = {"wide": Image.new("RGB", (80, 40)), "high": Image.new("RGB", (40, 80))}
plain = find_copies("plain", shapes)
assert (palette, rgb, plain) == (2, 0, 2), "this has changed"
PYTHON
