#!/usr/bin/env bash
# timm 1.0.31, create_scheduler_v2(sched="cosine", num_epochs=20, warmup_epochs=5):
# one expects a rise to the learning rate of the optimiser, then a cosine from there. The
# cosine begins with the first epoch, under the warm-up, and
# is met where it has come to: the highest rate of all is 85 % of the one that was asked
# for. After a warm-up of 10 epochs, it falls from 90 % to 50 % within one epoch. With
# warmup_prefix=True the whole rate is reached, and 5 epochs are added.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q timm==1.0.31 torch==2.14.1 torchvision==0.29.1 \
    numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from timm.scheduler import create_scheduler_v2


def rates(warmup, **options):
    """Of each epoch, as parts of the optimiser's rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=20, warmup_epochs=warmup, **options
    )
    found = []
    for epoch in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1)
    return found


short, long = rates(5), rates(10)
print(f"warm-up of 5 of 20 epochs: at most {max(short):.3f} of the rate")
print(f"warm-up of 10: {long[9]:.3f}, then {long[10]:.3f}")
prefixed = rates(5, warmup_prefix=True)
print(f"warmup_prefix=True: {max(prefixed):.3f}, {len(prefixed)} epochs")
assert 0.85 < max(short) < 0.86, "this has changed"
assert long[9] > 0.89 and long[10] < 0.51, "this has changed"
assert max(prefixed) == 1 and len(prefixed) == 25, "this has changed"
PYTHON
