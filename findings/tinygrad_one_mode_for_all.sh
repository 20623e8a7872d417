#!/usr/bin/env bash
# tinygrad 0.14.0: whether batch normalisation uses the batch or its running averages is a
# property of a network in most libraries: teacher.eval(). Here, it is one switch for all:
# Context(TRAINING=1), which the optimiser insists on. A teacher that is asked inside of it,
# beside its student, answers by the batch, and its running averages move, though no
# optimiser has its weights. It has to be asked in a Context(TRAINING=0) of its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tinygrad==0.14.0 numpy==2.4.6
DEV=PYTHON "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from tinygrad import Context, Tensor, nn

print("tinygrad", version("tinygrad"))
numbers = np.random.default_rng(0).normal(5, 2, (8, 3, 1, 1)).astype(np.float32)
images, teacher, student = Tensor(numbers), nn.BatchNorm(3), nn.BatchNorm(3)
optimizer = nn.optim.SGD([student.weight, student.bias], lr=0.1)
first = teacher(images).numpy()


def step(mode_of_the_teacher):
    with Context(TRAINING=1):
        with Context(TRAINING=mode_of_the_teacher):
            answers = teacher(images).numpy()
        loss = (student(images) - Tensor(answers)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.abs(answers - first).max(), teacher.running_mean.numpy().tolist()


change, averages = step(0)
print(f"asked with TRAINING=0: answers changed by {change:.2f}, averages", averages)
assert change == 0 and averages == [0, 0, 0], "this has changed"
change, averages = step(1)
print(f"asked as the student is: answers changed by {change:.2f}, averages", averages)
assert change > 4 and min(averages) > 0.4, "this has changed"
PYTHON
