#!/usr/bin/env bash
# torch 2.14.1, F.interpolate(…, antialias=True): antialiasing is for what gets smaller,
# so one expects it to do nothing where something is made larger, such as the position
# embeddings of a vision transformer, from 14×14 to 16×16. For "bilinear" it does nothing.
# For "bicubic" it takes another curve (Pillow's, a = -0.5, in place of a = -0.75), and
# the result differs by some 8 %. So a copy of a teacher that leaves the argument out,
# since nothing gets smaller, has other embeddings.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6 pillow==13.0.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

print("torch", torch.__version__)
grid = torch.randn(1, 1, 14, 14, generator=torch.Generator().manual_seed(0))


def differ(a, b):
    return ((a - b).norm() / b.norm()).item()


for side in (16, 28, 56):
    by_pillow = Image.fromarray(grid[0, 0].numpy()).resize((side, side), Image.BICUBIC)
    by_pillow = torch.tensor(np.array(by_pillow))[None, None]
    found = {}
    for mode in ("bilinear", "bicubic"):
        plain = interpolate(grid, size=(side, side), mode=mode)
        smooth = interpolate(grid, size=(side, side), mode=mode, antialias=True)
        found[mode] = differ(smooth, plain)
    print(f"14 to {side}, with and without antialias: bilinear differs by "
          f"{found['bilinear']:.1%}, bicubic by {found['bicubic']:.1%}")
    print(f"  from Pillow's bicubic: with {differ(smooth, by_pillow):.1%}, "
          f"without {differ(plain, by_pillow):.1%}")
    assert found["bilinear"] < 1e-5 and 0.05 < found["bicubic"] < 0.15, "this has changed"
    assert differ(smooth, by_pillow) < 1e-5, "this has changed"


def curve(distance, a):
    """The weight of a point in cubic convolution."""
    x = abs(distance)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


line = torch.zeros(1, 1, 1, 14)
line[..., 7] = 1
for antialias, a in ((False, -0.75), (True, -0.5)):
    got = interpolate(line, size=(1, 28), mode="bicubic", antialias=antialias)[0, 0, 0]
    wanted = torch.tensor([curve((i + 0.5) / 2 - 7.5, a) for i in range(28)])
    print(f"antialias={antialias}: one point becomes {got[12:16].numpy().round(4)}, "
          f"the curve of a = {a}")
    assert torch.allclose(got, wanted, atol=1e-5), "this has changed"
PYTHON
