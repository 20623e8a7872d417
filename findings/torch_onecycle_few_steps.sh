#!/usr/bin/env bash
# torch 2.14.1: one expects OneCycleLR(max_lr=1, total_steps=n) to begin low, to reach
# 1, and to end at (nearly) 0. With n = 1 the only step has rate 0.000004: nothing is
# learned, without a word. With n = 2 or 3 there is no warm-up: the first step is the
# strongest. The peak lies at step 0.3 n - 1, so unless that is a whole number, 1 is
# never reached. And the usual loop, which calls schedule.step() after every step, ends
# with a rate that has risen again: get_last_lr() after the last step is not the 0 with
# which it was taken.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.optim.lr_scheduler import OneCycleLR


def run(steps):
    """The rates with which the steps are taken, and the rate that is left at the end."""
    layer = torch.nn.Linear(1, 1)
    before = layer.weight.item()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    schedule = OneCycleLR(optimizer, max_lr=1.0, total_steps=steps, cycle_momentum=False)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.zero_grad()
        layer(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        schedule.step()
    left = schedule.get_last_lr()[0]
    print(f"{steps} steps:", [f"{rate:.2f}" for rate in rates], f"left {left:.2f}")
    return rates, left, abs(layer.weight.item() - before)


for steps in (1, 2, 3, 5, 10):
    rates, left, moved = run(steps)
    assert abs(rates[-1]) < 1e-3 and left > 0.04, "changed"
    assert (moved > 0.5) == (steps > 1), "changed"
    assert (rates[0] > 0.8) == (steps in (2, 3)), "changed"
    assert (max(rates) > 0.999) == (steps == 10), "changed"
PYTHON
