#!/usr/bin/env bash
# seaborn 0.13.2, lineplot: the band of a learning curve is labelled a 95 % confidence
# interval (errorbar=("ci", 95), the default), so one expects that it holds the true mean
# in 95 of 100 cases. It is a percentile bootstrap of the seeds. For three seeds, its
# ends are nearly always the lowest and the highest seed, and it holds the truth in three
# of four cases only; for five seeds, in 83 %. So two bands that part say much less than
# they seem to.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q seaborn==0.13.2 matplotlib==3.11.2 pandas==3.1.1 \
    scipy==1.17.1 numpy==2.4.6
MPLBACKEND=agg "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from scipy import stats

EPOCHS, MEAN = 2000, 70.0
found = {}
for seeds in (3, 5, 30):
    random = np.random.default_rng(0)
    accuracy = random.normal(MEAN, 1.0, (EPOCHS, seeds))
    table = pd.DataFrame(
        {"epoch": np.arange(EPOCHS).repeat(seeds), "accuracy": accuracy.ravel()}
    )
    figure, axis = plt.subplots()
    seaborn.lineplot(table, x="epoch", y="accuracy", ax=axis, seed=0)
    [band] = axis.collections
    points = pd.DataFrame(band.get_paths()[0].vertices, columns=["epoch", "accuracy"])
    ends = points[points.epoch.isin(range(1, EPOCHS - 1))].groupby("epoch").accuracy
    low, high = ends.min(), ends.max()
    assert len(low) == EPOCHS - 2
    if seeds == 3:
        is_lowest = np.isclose(low, accuracy.min(1)[1:-1]).mean()
        print(f"3 seeds: the lower end is the lowest seed in {is_lowest:.1%}")
        assert is_lowest > 0.9, "this has changed"
    found[seeds] = ((low < MEAN) & (high > MEAN)).mean()

    # Student's t for comparison
    reach = stats.t.ppf(0.975, seeds - 1) * accuracy.std(1, ddof=1) / seeds**0.5
    student = (abs(accuracy.mean(1) - MEAN) < reach).mean()
    print(f"{seeds} seeds: in {found[seeds]:.1%} of the bands; Student's t {student:.1%}")
    assert abs(student - 0.95) < 0.02
    plt.close(figure)
assert found[3] < 0.80 and found[5] < 0.90 < found[30], "this has changed"
PYTHON
