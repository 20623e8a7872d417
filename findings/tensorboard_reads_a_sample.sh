#!/usr/bin/env bash
# tensorboard 2.21.0, EventAccumulator, with which one reads the numbers of a log: from
# 20,000 steps, one expects 20,000 values. It keeps 10,000, drawn at random, without a
# warning: spikes are lost, a mean over an epoch is that of a sample, and two runs that
# logged another number of steps no longer pair. All are there with
# size_guidance={"scalars": 0}.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorboard==2.21.0 tensorboardX==2.6.5 \
    protobuf==7.36.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

STEPS = 20_000
with SummaryWriter(sys.argv[1] + "/log") as writer:
    for step in range(STEPS):
        is_spike = step % 1000 == 500
        writer.add_scalar("loss", 9.0 if is_spike else 1.0, step)

for settings in ({}, {"size_guidance": {"scalars": 0}}):
    log = EventAccumulator(sys.argv[1] + "/log", **settings)
    log.Reload()
    values = log.Scalars("loss")
    spikes = sum(value.value == 9 for value in values)
    print(f"{settings}: {len(values)} of {STEPS} values, {spikes} of 20 spikes")
    if settings:
        assert (len(values), spikes) == (STEPS, 20)
    else:
        assert len(values) == 10_000 and spikes < 20, "this has changed"
PYTHON
