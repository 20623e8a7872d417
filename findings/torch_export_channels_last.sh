#!/usr/bin/env bash
# torch 2.14.1: torch.export.save warns "No complete tensor found in the group! … This may
# cause issues when your weights are not on CPU." of a small network whose weights are all
# on the CPU, whole, and shared with nobody. The reason is their memory format: with
# channels_last it warns once a convolution, with the contiguous format it is silent. The
# file is right in both cases: it loads, answers the same, and keeps the strides.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
from torch import nn

found = {}
for name in ("contiguous_format", "channels_last"):
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
    network = nn.Sequential(*layers).eval().to(memory_format=getattr(torch, name))
    images = torch.randn(1, 3, 16, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.export.save(torch.export.export(network, (images,)), "network.pt2")
    loaded = torch.export.load("network.pt2").module()
    told = [str(one.message) for one in caught if "not on CPU" in str(one.message)]
    strides = [weight.stride() for weight in network.parameters()]
    same = strides == [weight.stride() for weight in loaded.parameters()]
    found[name] = len(told), same and torch.equal(loaded(images), network(images))
print(f"torch {torch.__version__} (warnings, loads the same): {found}")
assert found == {"contiguous_format": (0, True), "channels_last": (2, True)}, "changed"
PYTHON
