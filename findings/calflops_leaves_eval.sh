#!/usr/bin/env bash
# calflops 0.3.2: to count a network's multiply-adds, one expects, leaves it as it was,
# and its parameters are all of them. But calculate_flops sets the network to evaluation
# mode and leaves it there (a student then trains without dropout, and its batch
# normalisation no longer sees the batch), and "params" are only those with gradients:
# a frozen teacher has 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q calflops==0.3.2 torch==2.14.1 transformers==5.24.0 \
    numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from calflops import calculate_flops
from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Dropout(0.5)
    )


def count(network):
    flops, adds, parameters = calculate_flops(
        network, (1, 3, 32, 32), output_as_string=False, print_results=False
    )
    return adds, parameters


student, teacher = build().train(), build().eval().requires_grad_(False)
found = {"student": count(student), "frozen teacher": count(teacher)}
for name, numbers in found.items():
    print(f"{name}: %d multiply-adds, %d parameters" % numbers)
print("the student trains:", student.training)
assert found["student"] == (8 * 3 * 9 * 30 * 30, 8 * 3 * 9 + 16), "this has changed"
assert found["frozen teacher"] == (8 * 3 * 9 * 30 * 30, 0), "this has changed"
assert not student.training and not student[2].training, "this has changed"
PYTHON
