#!/usr/bin/env bash
# torchvision 0.29.1, RandomErasing(value="random"): "erasing each pixel with random
# values". In an image of uint8, as it comes from a decoder, one expects noise from 0 to
# 255. The values are drawn from a normal distribution of standard deviation 1, and then
# made uint8: all are within 4 of black or (what was negative) of white, most of them
# black. In an image of floats from 0 to 1, half of them are below 0. No warning is given.
# (The docstring's example erases after Normalize, and does not say that it has to.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 \
    pillow==13.0.0
"$folder/venv/bin/python" -W error - <<'PYTHON'
import torch
import torchvision
from torchvision import transforms as v1
from torchvision.transforms import v2

print("torchvision", torchvision.__version__)
torch.manual_seed(0)
grey = torch.full((3, 224, 224), 128, dtype=torch.uint8)
options = {"p": 1, "scale": (0.3, 0.3), "value": "random"}
for name, transforms in (("v1", v1), ("v2", v2)):
    erased = transforms.RandomErasing(**options)(grey)
    noise = erased[erased != 128]
    dark, light = (noise <= 4).float().mean(), (noise >= 252).float().mean()
    print(f"{name}, uint8: {noise.numel():,} new values: {dark:.0%} are 0 to 4, "
          f"{light:.0%} are 252 to 255, the rest {1 - dark - light:.0%}")
    print("  the values that there are:", noise.unique().tolist())
    assert noise.numel() > 40_000 and dark + light > 0.999, "this has changed"
image = v2.functional.to_dtype(grey, torch.float32, scale=True)
erased = v2.RandomErasing(**options)(image)
noise = erased[erased != image]
below, above = (noise < 0).float().mean(), (noise > 1).float().mean()
print(f"v2, floats from 0 to 1: {below:.0%} below 0, {above:.0%} above 1")
assert below > 0.4 and above > 0.1, "this has changed"
PYTHON
