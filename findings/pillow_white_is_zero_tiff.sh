#!/usr/bin/env bash
# Pillow 13.0.0: a grey TIFF may say that 0 is white (PhotometricInterpretation 0, usual
# for X-rays and scans). Pillow turns such an image of 8 bits over, as it should. One
# expects the same at 16 bits. There, and with floats, the numbers are left as they are,
# the tag is ignored, and the picture comes out as its negative, without a word. (tifffile
# 2026.3.3 gives the stored numbers at every depth.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import tifffile
from PIL import Image

ramp = np.linspace(0, 1, 4)[None].repeat(4, 0)  # [4, 4], left to right
kinds = {
    "8 bits": (255 * ramp).astype(np.uint8),
    "16 bits": (65535 * ramp).astype(np.uint16),
    "float": ramp.astype(np.float32),
}
first = {}
for kind, image in kinds.items():
    tifffile.imwrite("ramp.tif", image, photometric="miniswhite")
    assert (tifffile.imread("ramp.tif") == image).all()
    with Image.open("ramp.tif") as file:
        pixels = np.asarray(file)[0]
        assert file.tag_v2[262] == 0
    first[kind] = "white" if pixels[0] > pixels[-1] else "black"
    print(f"Pillow 13.0.0, {kind}: 0 means white, and is read as {first[kind]}: {pixels}")
assert first == {"8 bits": "white", "16 bits": "black", "float": "black"}, "changed"
PYTHON
