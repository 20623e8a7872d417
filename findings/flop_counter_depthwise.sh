#!/usr/bin/env bash
# torch 2.14.1: FlopCounterMode counts the backward pass of a grouped convolution as
# (groups + 1) times its forward pass, whatever the layer; without groups, it is the usual
# 2 times. Forward passes are counted right. So a training step of a network of depthwise
# convolutions looks many times dearer than it is: of torchvision 0.29.1's
# mobilenet_v3_small, backward comes out as more than 20 times forward, of resnet18 as
# less than 2 times.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models


def count(network, images):
    """(forward, backward / forward)"""
    with FlopCounterMode(display=False) as forward:
        answers = network(images)
    with FlopCounterMode(display=False) as backward:
        answers.sum().backward()
    total = forward.get_total_flops()
    return total, backward.get_total_flops() / total


images, found = torch.randn(2, 32, 16, 16, requires_grad=True), {}
for groups in (1, 2, 4, 32):
    layer = nn.Conv2d(32, 32, 3, padding=1, groups=groups, bias=False)
    forward, found[groups] = count(layer, images)
    # two operations a multiply-add: images, positions, channels out, weights of each
    assert forward == 2 * 2 * 16 * 16 * 32 * (32 // groups) * 9
photos, ratios = torch.randn(2, 3, 64, 64), {}
for name in ("resnet18", "mobilenet_v3_small"):
    _, ratios[name] = count(models.get_model(name, num_classes=10), photos)
print(f"torch {torch.__version__}: backward / forward by groups: {found}; {ratios}")
assert found == {1: 2.0, 2: 3.0, 4: 5.0, 32: 33.0}, "changed"
assert ratios["resnet18"] < 2 and ratios["mobilenet_v3_small"] > 20, "changed"
PYTHON
