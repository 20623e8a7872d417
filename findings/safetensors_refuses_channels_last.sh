#!/usr/bin/env bash
# safetensors 0.8.0: one expects save_file(network.state_dict(), path) to save every
# network. One whose convolutions are channels_last is refused: "non contiguous". With 1×1
# convolutions only, it is saved. save_model saves the first one, too, and load_model
# fills a channels_last network rightly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import safetensors
import torch
from safetensors.torch import load_model, save_file, save_model
from torch import nn

print("safetensors", safetensors.__version__)


LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def build(size, layout):
    network = nn.Sequential(nn.Conv2d(3, 8, size), nn.ReLU(), nn.Conv2d(8, 4, size))
    return network.to(memory_format=LAYOUTS[layout])


def is_saved(network):
    try:
        save_file(network.state_dict(), f"{sys.argv[1]}/weights.safetensors")
    except ValueError as error:
        return str(error)
    return "saved"


found = {}
for size in (3, 1):
    for layout in LAYOUTS:
        found[size, layout] = is_saved(build(size, layout))
        print(f"{size}×{size}, {layout}: {found[size, layout][:60]}")
assert "non contiguous" in found.pop((3, "channels_last")), "this has changed"
assert set(found.values()) == {"saved"}, "this has changed"
network, other = build(3, "channels_last"), build(3, "channels_last")
save_model(network, f"{sys.argv[1]}/model.safetensors")
images = torch.rand(2, 3, 8, 8)
assert not torch.equal(network(images), other(images))
load_model(other, f"{sys.argv[1]}/model.safetensors")
assert torch.equal(network(images), other(images))
assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
print("save_model, load_model: the same answers, still channels_last")
PYTHON
