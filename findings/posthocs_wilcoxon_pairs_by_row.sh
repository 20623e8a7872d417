#!/usr/bin/env bash
# scikit-posthocs 0.17.1: posthoc_wilcoxon compares methods pairwise by the signed-rank
# test, a test of pairs. From a long table (a row for each run: method, seed, accuracy)
# one expects it to pair what belongs together, or to ask for the column that says so. It
# pairs by the order of the rows. The same table with its rows in another order has
# another p: here two methods that differ on every seed go from clearly different to not
# at all. There is no word of it, and no argument for the seed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scikit-posthocs==0.17.1 scipy==1.17.1 pandas==2.3.3 \
    numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import inspect
from importlib.metadata import version

import numpy as np
import pandas as pd
from scikit_posthocs import posthoc_wilcoxon
from scipy.stats import wilcoxon

chance = np.random.default_rng(0)
alone = chance.normal(75, 2, 10)
distilled = alone + chance.uniform(0.2, 0.8, 10)
runs = [("alone", seed, value) for seed, value in enumerate(alone)]
runs += [("distilled", seed, value) for seed, value in enumerate(distilled)]
table = pd.DataFrame(runs, columns=["method", "seed", "accuracy"])


def p_of(rows):
    found = posthoc_wilcoxon(rows, val_col="accuracy", group_col="method")
    return float(found.loc["alone", "distilled"])


by_seed = p_of(table)
others = [p_of(table.sample(frac=1, random_state=n)) for n in range(20)]
print("scikit-posthocs", version("scikit-posthocs"))
print(f"  p of the table in the order of the seeds: {by_seed:.4f}")
print(f"  with its rows in 20 other orders: {min(others):.4f} to {max(others):.4f}")
assert abs(by_seed - wilcoxon(alone, distilled).pvalue) < 1e-9
assert by_seed < 0.01 and np.median(others) > 0.1, "this has changed"
assert len(set(others)) > 5, "this has changed"
names = list(inspect.signature(posthoc_wilcoxon).parameters)
print("  its arguments:", ", ".join(names))
assert not any("block" in name or "pair" in name for name in names), "this has changed"
PYTHON
