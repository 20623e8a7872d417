#!/usr/bin/env bash
# captum 0.9.0, LayerGradCam: one expects the map of the paper (Selvaraju et al., 2017),
# which ends with a ReLU, so that it shows only what speaks *for* a class. By default
# captum leaves the ReLU out: the map has negative places, and |map|, or its square,
# takes what speaks against a class for attention. With
# relu_attributions=True it is the paper's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q captum==0.9.0 torch==2.14.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from captum.attr import LayerGradCam
from torch import nn

print("captum", version("captum"))
torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(16, 10),
).eval()
images = torch.rand(8, 3, 16, 16)

maps = network[:2](images)
maps.retain_grad()
network[2:](maps)[:, 0].sum().backward()
weights = maps.grad.mean((2, 3), keepdim=True)
by_hand = (weights * maps).sum(1, keepdim=True)

method = LayerGradCam(network, network[1])
default = method.attribute(images, target=0)
paper = method.attribute(images, target=0, relu_attributions=True)
print(f"below 0 by default: {(default < 0).float().mean():.0%} of the places")
print(f"with relu_attributions: {(paper < 0).float().mean():.0%}")
assert torch.allclose(default, by_hand, atol=1e-6), "this has changed"
assert torch.allclose(paper, by_hand.relu(), atol=1e-6), "this has changed"
assert (default < 0).any(), "this has changed"
PYTHON
