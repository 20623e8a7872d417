#!/usr/bin/env bash
# torch-cka 0.21, CKA(student, teacher).compare(loader): how alike the features of two
# networks are. From a network and its own copy, one expects 1, whatever the order of the
# images; its README only asks for a seeded loader. With shuffle=True, seeded, it says 0:
# for want of a second loader, it goes through the same one twice at the same time, each
# time in another order, so the two networks see different images. Random flips alone,
# drawn anew each time, make it fall below 1, too. Its warning says "Using the same
# dataloader for both models".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch-cka==0.21 torch==2.14.1 torchvision==0.29.1 \
    numpy==2.4.6 matplotlib==3.11.2 tqdm==4.70.1
TQDM_DISABLE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy
from importlib.metadata import version

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch_cka import CKA

torch.set_num_threads(1)
print("torch-cka", version("torch-cka"))
torch.manual_seed(0)
photographs = torch.rand(512, 3, 1, 1) * torch.rand(512, 3, 32, 32)


class Images(Dataset):
    def __init__(self, flips):
        self.flips = flips

    def __len__(self):
        return len(photographs)

    def __getitem__(self, place):
        flip = self.flips and torch.rand(()) < 0.5
        return photographs[place].flip(-1) if flip else photographs[place], 0


network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.Flatten(),
                        nn.Linear(1800, 10))
found = {}
for flips, shuffle in ((False, False), (False, True), (True, False)):
    loader = DataLoader(Images(flips), 64, shuffle,
                        generator=torch.Generator().manual_seed(0))
    places = ["0", "2", "3"]
    one, other = copy.deepcopy(network), copy.deepcopy(network)
    cka = CKA(one, other, "one", "copy", places, places)
    cka.compare(loader)
    found[flips, shuffle] = cka.export()["CKA"].diagonal().tolist()
    print(f"flips {flips}, shuffle {shuffle}: a network and its copy,",
          "layer by layer:", *(f"{value:.2f}" for value in found[flips, shuffle]))
assert all(abs(value - 1) < 0.001 for value in found[False, False]), "this has changed"
assert all(abs(value) < 0.1 for value in found[False, True]), "this has changed"
assert found[True, False][2] < 0.9, "this has changed"
PYTHON
