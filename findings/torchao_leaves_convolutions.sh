#!/usr/bin/env bash
# torchao 0.18.0: one expects quantize_(network, Int8WeightOnlyConfig()) to make a small
# CNN about a quarter as large. The convolutions, nearly all of its weights, stay float32;
# the last layer is changed. No warning names them, and the file keeps its size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchao==0.18.0 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import copy
import sys
import warnings
from pathlib import Path

import torch
import torchao
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

print("torchao", torchao.__version__)
NETWORKS = {
    "convolutions": nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 256, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 10),
    ),
    "linear layers": nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)),
}


def size_of(network):
    path = Path(sys.argv[1]) / "weights.pt"
    torch.save(network.state_dict(), path)
    return path.stat().st_size / 1000


for name, network in NETWORKS.items():
    small = copy.deepcopy(network)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quantize_(small, Int8WeightOnlyConfig())
    told = [w for w in told if "onv" in str(w.message)]
    types = {layer.weight.dtype for layer in small if isinstance(layer, nn.Conv2d)}
    assert types <= {torch.float32}, "this has changed"
    assert type(small[-1].weight) is not type(network[-1].weight), "this has changed"
    before, after = size_of(network), size_of(small)
    print(f"{name}: {before:.0f} kB, then {after:.0f} kB; warnings: {len(told)}")
    expected = (0.95, 1.05) if name == "convolutions" else (0.2, 0.35)
    assert expected[0] < after / before < expected[1] and not told, "this has changed"
PYTHON
