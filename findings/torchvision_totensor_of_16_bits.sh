#!/usr/bin/env bash
# torchvision 0.29.1, ToTensor() of a grey PNG of 16 bits, as microscopes and scanners
# write them: one expects floats from 0 to 1, as of a photograph of 8 bits. It gives
# integers, not divided by anything, and the brighter half of them is negative: white
# becomes -1, right below black. v2's ToDtype(torch.float32, scale=True) of PILToTensor
# gives 0 to 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 \
    pillow==13.0.0
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms import ToTensor, v2

path = f"{sys.argv[1]}/grey.png"
steps = np.array([[0, 20_000, 40_000, 65_535]], dtype=np.uint16)
Image.fromarray(steps).save(path)
image = Image.open(path)
found = ToTensor()(image)
print("torchvision", torchvision.__version__, "- mode", image.mode)
print("ToTensor:", found.dtype, found.flatten().tolist(), "of", steps[0].tolist())
assert found.dtype == torch.int16, "this has changed"
assert found.flatten().tolist() == [0, 20_000, 40_000 - 65_536, -1], "this has changed"
scaled = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])(image)
print("v2:", scaled.dtype, [round(x, 3) for x in scaled.flatten().tolist()])
exact = torch.from_numpy(steps / 65_535).float()
assert torch.allclose(scaled, exact, atol=1e-4), "this has changed"
PYTHON
