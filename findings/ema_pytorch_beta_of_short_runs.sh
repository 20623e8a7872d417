#!/usr/bin/env bash
# ema-pytorch 0.8.3, EMA(student, beta=...), as for a mean teacher: one expects a moving
# average with that decay at every step.
# - A warm-up sets the decay, not beta, until the decay has reached it. In a training of
#   2,000 steps, beta = 0.999 and 0.9999 give the same average.
# - It is updated at every tenth step alone: with beta = 0.9, it lags 99 steps behind the
#   student in place of 9.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ema-pytorch==0.8.3 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from ema_pytorch import EMA
from torch import nn

STEPS = 2000


def lag(beta):
    """Of a weight that grows by 1 at every step, in steps."""
    student = nn.Linear(1, 1, bias=False)
    average = EMA(student, beta=beta)
    for step in range(STEPS):
        student.weight.data.fill_(step)
        average.update()
    return (student.weight - average.ema_model.weight).item()


def usual(beta):
    average = 0.0
    for step in range(STEPS):
        average = beta * average + (1 - beta) * step
    return STEPS - 1 - average


lags = {beta: lag(beta) for beta in (0.9, 0.99, 0.999, 0.9999)}
for beta, steps in lags.items():
    print(f"beta {beta}: {steps:.0f} steps behind, usually {usual(beta):.0f}")
assert lags[0.999] == lags[0.9999], "this has changed"
assert lags[0.9] > 9 * usual(0.9), "this has changed"
PYTHON
