#!/usr/bin/env bash
# litdata 0.2.76, optimize() and StreamingDataset with photographs as Pillow's images. One
# expects each to come back as it was. An image with a palette (of a GIF, or a small PNG)
# comes back with its numbers, but without its palette, which Pillow takes for black: a
# picture that was half red, half blue is black all over. Grey ones, and those of
# RGB, come back as they were. No warning is given.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q litdata==0.2.76 torch==2.14.1 torchvision==0.29.1 \
    numpy==2.4.6 pillow==13.0.0
cat > "$folder/run.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from litdata import StreamingDataset, optimize
from PIL import Image

folder = sys.argv[1]


def picture(mode):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16], pixels[:, 16:] = (200, 30, 30), (30, 30, 200)
    rgb = Image.fromarray(pixels)
    return rgb.quantize(16) if mode == "P" else rgb.convert(mode)


if __name__ == "__main__":
    print("litdata", version("litdata"))
    modes = ["RGB", "L", "P"]
    optimize(picture, modes, f"{folder}/optimized", chunk_bytes="1MB", num_workers=1)
    data = StreamingDataset(f"{folder}/optimized")
    for mode, found in zip(modes, (data[place] for place in range(3))):
        pixels = np.asarray(picture(mode).convert("RGB"))[0, ::31].tolist()
        after = np.asarray(found.convert("RGB"))[0, ::31].tolist()
        print(f"{mode}: left and right {pixels}, afterwards {found.mode} {after}")
        assert found.mode == mode, "this has changed"
        assert found.tobytes() == picture(mode).tobytes(), "this has changed"
        assert (after == pixels) == (mode != "P"), "this has changed"
    assert after == [[0, 0, 0]] * 2, "this has changed"
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore run.py "$folder" > told 2>&1 || { cat told; exit 1; }
grep "^litdata\|left and right" told
