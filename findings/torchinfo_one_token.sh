#!/usr/bin/env bash
# torchinfo 1.8.0: total_mult_adds is to be the number of multiply-adds of one forward
# pass. One expects a Linear layer that is applied to 196 tokens to cost 196 times what it
# costs on one. It is counted as if it had one token; the work between the tokens
# (attention) is not counted at all. A small vision transformer gets 2 % of its true
# number and seems cheaper than a ResNet-18, which is counted rightly and in truth needs
# less than half as much.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchinfo==1.8.0 timm==1.0.31 torch==2.14.1 \
    torchvision==0.29.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchinfo import summary


def count(model, shape):
    """Multiply-adds by torchinfo, and by PyTorch itself (which counts each as two)."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.zeros(shape))  # the kernel that this counter knows
    told = summary(model, shape, verbose=0).total_mult_adds
    return told, counter.get_total_flops() // 2


print("torchinfo 1.8.0: multiply-adds by torchinfo, by torch")
found = {}
for name, model, shape in (
    ("Linear, 1 token", nn.Sequential(nn.Linear(64, 64, bias=False)), (1, 64)),
    ("Linear, 196 tokens", nn.Sequential(nn.Linear(64, 64, bias=False)), (1, 196, 64)),
    ("ResNet-18", timm.create_model("resnet18"), (1, 3, 224, 224)),
    ("ViT-S/16", timm.create_model("vit_small_patch16_224"), (1, 3, 224, 224)),
):
    found[name] = count(model, shape)
    print(f"{name}: {found[name][0]:,} {found[name][1]:,}")
assert found["Linear, 1 token"] == (64 * 64, 64 * 64)
assert found["Linear, 196 tokens"] == (64 * 64, 196 * 64 * 64), "changed"
told, true = found["ResNet-18"]
assert abs(told / true - 1) < 0.01
assert found["ViT-S/16"][0] < 0.03 * found["ViT-S/16"][1], "changed"
assert found["ViT-S/16"][0] < told and found["ViT-S/16"][1] > 2 * true, "changed"
PYTHON
