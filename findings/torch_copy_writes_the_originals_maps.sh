#!/usr/bin/env bash
# torch 2.14.1: forward hooks keep a student's maps in a dictionary, to compare them with
# a teacher's. One expects a copy of the student, such as the running average that
# AveragedModel makes, to have nothing to do with that. The copy has the same hook, a
# function, which writes to the *original's* dictionary: once the average has answered, the
# student's maps are those of the average.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

print("torch", torch.__version__)
torch.manual_seed(0)
student, maps = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), {}
student[1].register_forward_hook(lambda module, given, out: maps.update(relu=out))
average = AveragedModel(student)
images = torch.rand(2, 3, 8, 8)
with torch.no_grad():
    for weight in student.parameters():
        weight.add_(0.1)  # the student has learned something
    own = student(images)
    assert torch.equal(maps["relu"], own)
    others = average(images)
    assert not torch.equal(own, others)
print("the student's maps are its own:", torch.equal(maps["relu"], own))
print("they are the average's:", torch.equal(maps["relu"], others))
assert torch.equal(maps["relu"], others), "this has changed"
PYTHON
