#!/usr/bin/env bash
# timm 1.0.31, RandAugment: one expects a larger magnitude, the m of rand-m9-mstd0.5, to
# change a photograph more. For "posterize" and "solarize" it is the other way round: they
# change it most at low magnitudes, and "solarize" at 10 not at all. With inc1 at the end
# of the name, timm takes two others, which grow, as torchvision's own two do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q timm==1.0.31 torch==2.14.1 torchvision==0.29.1 \
    numpy==2.4.6 pillow==12.1.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import random

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from timm.data.auto_augment import rand_augment_ops, rand_augment_transform
from torchvision.transforms import RandAugment

print("timm", timm.__version__, "and torchvision", torchvision.__version__)
grey = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (8, 1, 3))
photo = Image.fromarray(grey)


def change(augmented):
    return np.abs(np.array(augmented, dtype=float) - grey).mean().round(1)


class Only(RandAugment):
    """torchvision's, with one of its operations."""

    def _augmentation_space(self, *given):
        space = super()._augmentation_space(*given)
        return {self.name: space[self.name]}


ops = rand_augment_transform("rand-m9-inc1", {"translate_const": 10}).ops
assert {"PosterizeIncreasing", "SolarizeIncreasing"} < {op.name for op in ops}
[solarize] = rand_augment_ops(10, transforms=["Solarize"])
solarize.prob = 1.0
print(f"  Solarize, timm, at 10: {change(solarize(photo))}")
assert change(solarize(photo)) == 0, "this has changed"
for name in ("Posterize", "Solarize"):
    found = {}
    for kind, options in (("timm", {}), ("timm, inc1", {"increasing": True})):
        ops = [name + "Increasing" * bool(options)]
        random.seed(0)
        found[kind] = []
        for magnitude in (3, 6, 9):
            [op] = rand_augment_ops(magnitude, transforms=ops)
            op.prob = 1.0
            found[kind].append(change(op(photo)))
    found["torchvision"] = []
    for magnitude in (9, 18, 27):  # of 31 steps
        torch.manual_seed(0)
        augment = Only(num_ops=1, magnitude=magnitude)
        augment.name = name
        found["torchvision"].append(change(augment(photo)))
    for kind, changes in found.items():
        print(f"  {name}, {kind}: grey levels {[float(c) for c in changes]}")
        falls = changes[0] > changes[1] > changes[2]
        rises = changes[0] < changes[1] < changes[2]
        assert falls if kind == "timm" else rises, "this has changed"
PYTHON
