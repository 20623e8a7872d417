#!/usr/bin/env bash
# torch 2.14.1: its guide says that autocast "should wrap only the forward pass". Who puts it
# around the whole loop, to write it once, expects other roundings, or a slower run. The
# network learns nothing: its loss stays what it was, to the last digit, without a warning.
# Autocast casts a weight once, and keeps that copy until the outermost context ends;
# that the optimiser changes the weight meanwhile, it does not notice. An inner context in
# each step, as in a function that is called, does not help; cache_enabled=False does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

print("torch", torch.__version__)
torch.set_num_threads(1)


def bfloat16(**how):
    return torch.autocast("cpu", torch.bfloat16, **how)


def train(outer, inner):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    images = torch.randn(256, 20)
    targets = images[:, :4].argmax(1)
    first_weights, losses = network[0].weight.clone(), []
    with outer:
        for _ in range(30):
            with inner():
                logits = network(images)
            loss = F.cross_entropy(logits.float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert not torch.equal(first_weights, network[0].weight)  # they do change
    return losses


ways = {
    "around each forward pass": (nullcontext(), bfloat16),
    "around the loop": (bfloat16(), nullcontext),
    "around the loop and each forward pass": (bfloat16(), bfloat16),
    "around the loop, cache_enabled=False": (bfloat16(cache_enabled=False), nullcontext),
}
found = {}
for way, contexts in ways.items():
    found[way] = train(*contexts)
    steps = ", ".join(f"{loss:.3f}" for loss in found[way][::7])
    print(f"autocast {way}: loss of steps 1, 8, 15, 22, 29: {steps}")
right, *frozen, uncached = found.values()
assert right[-1] < 0.1 and uncached == right, "this has changed"
assert all(len(set(losses)) == 1 for losses in frozen), "this has changed"
PYTHON
