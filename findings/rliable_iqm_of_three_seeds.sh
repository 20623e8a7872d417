#!/usr/bin/env bash
# rliable 1.2.0: aggregate_iqm is the "interquartile mean", which drops the lowest and
# the highest quarter of the scores, so that one failed run does not decide. One expects
# that of three seeds, too: most of the weight on the middle one. With three scores it is
# the plain mean: a quarter of 3 is rounded down to 0, and nothing is dropped. One seed of
# three that did not learn pulls the "robust" figure from 0.91 to 0.64; with a fourth seed
# it jumps back to 0.9. With 5, 6 or 7 scores one falls away at each end: a fifth to a
# seventh instead of a quarter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rliable==1.2.0 arch==7.2.0 scipy==1.17.1 pandas==2.3.3 \
    numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
from rliable.metrics import aggregate_iqm


def exact(scores):
    """The mean of the middle half, the scores at its borders counted in part."""
    scores = np.sort(scores)
    edges = np.arange(len(scores) + 1) / len(scores)
    return scores @ np.diff(np.clip(edges, 0.25, 0.75)) * 2


print("rliable 1.2.0: seeds, mean, IQM by rliable, IQM of the exact middle half")
found = {}
for seeds in range(3, 9):
    scores = np.array([0.1, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96])[:seeds]
    found[seeds] = scores.mean(), aggregate_iqm(scores[:, None]), exact(scores)
    print(seeds, " ".join(f"{value:.3f}" for value in found[seeds]))
    dropped = seeds // 4
    assert np.isclose(found[seeds][1], scores[dropped : seeds - dropped].mean()), "changed"
assert np.isclose(found[3][1], found[3][0]) and found[3][1] < 0.64, "changed"
assert found[3][2] > 0.75
for seeds in (4, 8):
    assert np.isclose(found[seeds][1], found[seeds][2])
PYTHON
