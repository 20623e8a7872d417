#!/usr/bin/env bash
# torchtnt 0.2.4: a TrainUnit that holds a student and a teacher, which its constructor
# puts into eval(). One expects the loop to put into training mode what has an optimiser.
# It does so with every module that is an attribute of the unit: while the student learns,
# the teacher answers in training mode, and its batch normalisation follows the student's
# batches. After the loop it says eval() again, so that a check before and after sees
# nothing. The teacher is also part of the unit's app_state.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchtnt==0.2.4 torch==2.14.1 numpy==2.4.6 \
    setuptools==80.9.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchtnt.framework.train import train
from torchtnt.framework.unit import TrainUnit

logging.disable(logging.WARNING)  # on argument names
torch.manual_seed(0)
data = TensorDataset(torch.randn(256, 20) + 1)


def network():
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.Linear(32, 10))


class Distillation(TrainUnit):
    def __init__(self):
        super().__init__()
        self.student = network()
        self.teacher = network().eval().requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1)
        self.modes = set()

    def train_step(self, state, data):
        (images,) = data
        self.modes.add(self.teacher.training)
        soft = self.teacher(images).softmax(1)
        F.cross_entropy(self.student(images), soft).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


unit = Distillation()
before, mode = unit.teacher[1].running_mean.clone(), unit.teacher.training
train(unit, DataLoader(data, batch_size=32), max_epochs=2)
moved = (unit.teacher[1].running_mean - before).abs().max()
print(f"the teacher is in training mode: before {mode}, after {unit.teacher.training}")
print(f"in the steps {unit.modes}; its running mean moved by {moved:.2f}")
print(f"app_state: {list(unit.app_state())}")
assert not mode and not unit.teacher.training, "this has changed"
assert unit.modes == {True} and moved > 0.1, "this has changed"
assert "teacher" in unit.app_state(), "this has changed"
PYTHON
