#!/usr/bin/env bash
# tensordict 0.15.3: TensorDict.from_module(network).save(folder) keeps a checkpoint, and
# TensorDict.load(folder).to_module(student) fills a network of the same shape. One
# expects the file to stay as it is, as with torch.load, also with mmap=True. But the
# parameters *are* the file: every step of the optimiser rewrites the checkpoint, and a
# teacher that is loaded from it later is the trained student. Images loaded so and
# scaled in place are scaled once more in each run. With mode="r", or saved as one
# file "….tdz", the checkpoint stays as it was.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensordict==0.15.3 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import tensordict
import torch
from tensordict import TensorDict

print("tensordict", tensordict.__version__)
folder = sys.argv[1]
torch.manual_seed(0)
teacher = torch.nn.Linear(8, 4)
start = teacher.weight.detach().clone()


def train(network):
    network(torch.randn(16, 8)).square().mean().backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert not torch.equal(network.weight, start)


torch.save(teacher.state_dict(), f"{folder}/torch.pt")
student = torch.nn.Linear(8, 4)
student.load_state_dict(torch.load(f"{folder}/torch.pt", mmap=True), assign=True)
train(student)
change = (torch.load(f"{folder}/torch.pt")["weight"] - start).abs().max().item()
print(f"torch.load(mmap=True): the file has changed by {change:.4f}")
assert change == 0, "this has changed"
for name, options in (("plain", {}), ("mode_r", {"mode": "r"}), ("one.tdz", {})):
    place = f"{folder}/{name}"
    TensorDict.from_module(teacher).save(place)
    student = torch.nn.Linear(8, 4)
    TensorDict.load(place, **options).to_module(student)
    assert torch.equal(student.weight, start)
    train(student)
    again = TensorDict.load(place)["weight"]
    change = (again - start).abs().max().item()
    print(f"TensorDict.load, {name}: the file has changed by {change:.4f}")
    assert (change > 0) == (name == "plain"), "this has changed"
    assert name != "plain" or torch.equal(again, student.weight), "this has changed"
TensorDict({"images": torch.full((4, 2), 200.0)}, [4]).save(f"{folder}/images")
for run in (1, 2):
    images = TensorDict.load(f"{folder}/images")["images"]
    images.div_(255)
    print(f"run {run}: 200 / 255 gives {images[0, 0].item():.4f}")
assert abs(images[0, 0].item() - 200 / 255**2) < 1e-6, "this has changed"
PYTHON
