#!/usr/bin/env bash
# kornia 0.9.0: its augmentations are modules, so one can put them in front of a network,
# in one nn.Sequential. One expects eval() to switch them off, as it does dropout. They go
# on: an evaluated network is given random views, and a frozen teacher gives two answers to
# one batch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q kornia==0.9.0 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import kornia
import torch
from torch import nn

print("kornia", kornia.__version__)
torch.manual_seed(0)
images = torch.rand(64, 3, 32, 32)
network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 10))
flip = kornia.augmentation.RandomHorizontalFlip(p=0.5)
crop = kornia.augmentation.RandomResizedCrop((32, 32))
with torch.no_grad():
    network.eval()
    assert torch.equal(network(images), network(images))
    for view in (flip, crop):
        teacher = nn.Sequential(view, network).eval()
        assert not view.training
        first, second = teacher(images), teacher(images)
        other = (first - second).abs().amax(1) > 1e-4
        name = type(view).__name__
        print(f"{name}, in eval(): {int(other.sum())} of 64 answers differ")
        assert other.sum() > 16, "this has changed"
PYTHON
