#!/usr/bin/env bash
# torchvision 0.29.1: one expects decode_image(png, mode="RGB_ALPHA") to give alpha 255
# where the file has no transparency, and the file's own transparency where it has some.
# For grey PNG files of 1, 2 or 4 bits (a black-and-white mask that Pillow has saved, say)
# alpha is 1, 3 or 15: the colours are stretched to 0..255, the alpha is not, and the
# picture is almost invisible. And a transparent colour (tRNS) of a grey or RGB file is
# lost: alpha is 255 everywhere. Pillow gets each of these right; no warning is given.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 pillow==13.0.0
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct
import zlib

import torch
import torchvision
from PIL import Image
from torchvision.io import decode_image


def grey_file(bits):
    """A grey PNG file of 8 x 1 black pixels and then 8 x 1 white ones, at this depth."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    row = b"\0" + b"\0" * bits + b"\xff" * bits
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 1, bits, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b""))


def saved(picture, **options):
    """The PNG file that Pillow writes of a picture."""
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def alphas(file):
    """The alpha values that torchvision and Pillow find in a file."""
    tensor = decode_image(torch.frombuffer(bytearray(file), dtype=torch.uint8), mode="RGB_ALPHA")
    pillow = Image.open(io.BytesIO(file)).convert("RGBA")
    assert tensor.shape[0] == 4
    assert tensor[:3].flatten().tolist() == [v for c in "RGB" for v in pillow.getchannel(c).tobytes()]
    return sorted(set(tensor[3].flatten().tolist())), sorted(set(pillow.getchannel("A").tobytes()))


grey = Image.frombytes("L", (2, 1), bytes([0, 200]))
red = Image.frombytes("RGB", (2, 1), bytes([255, 0, 0, 0, 0, 255]))
files = {"1 bit": saved(grey.convert("1")), "2 bits": grey_file(2), "4 bits": grey_file(4),
         "8 bits": grey_file(8), "grey, 0 transparent": saved(grey, transparency=0),
         "RGB, red transparent": saved(red, transparency=(255, 0, 0))}
found = {name: alphas(file) for name, file in files.items()}
print("torchvision", torchvision.__version__, "(alpha by torchvision, by Pillow):")
for name, pair in found.items():
    print(f"  {name}: {pair[0]}, {pair[1]}")
assert found == {
    "1 bit": ([1], [255]), "2 bits": ([3], [255]), "4 bits": ([15], [255]), "8 bits": ([255], [255]),
    "grey, 0 transparent": ([255], [0, 255]), "RGB, red transparent": ([255], [0, 255]),
}, "this has changed"
PYTHON
