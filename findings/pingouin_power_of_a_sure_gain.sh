#!/usr/bin/env bash
# pingouin 0.7.0, ttest(distilled, alone, paired=True): one expects the power beside the
# test to be that of the paired test. Both the effect size and the power come from the
# spread of the *accuracies*, not from that of the gains. Five seeds that differ a lot, and
# gain about 3 points each, give p < 0.0001 and in the same row a power of 0.35, as if
# the study had been far too small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pingouin==0.7.0 numpy==2.4.6 scipy==1.17.1 \
    scikit-learn==1.9.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import pingouin
from scipy import stats

print("pingouin", version("pingouin"))
alone = np.array([66.5, 70.2, 74.9, 68.0, 72.1])  # made up
gains = np.array([3.0, 3.3, 2.8, 3.1, 2.9])
row = pingouin.ttest(alone + gains, alone, paired=True).iloc[0]
p, d, power = row["p_val"], row["cohen_d"], float(row["power"])
print(f"p {p:.6f}, Cohen's d {d:.2f}, power {power:.2f}")
of_gains = gains.mean() / gains.std(ddof=1)
limit, df = stats.t.ppf(0.975, 4), 4
right = stats.nct.sf(limit, df, of_gains * np.sqrt(5))
print(f"by hand, from the spread of the gains: d {of_gains:.2f}, power {right:.2f}")
spread = np.sqrt((alone.var(ddof=1) + (alone + gains).var(ddof=1)) / 2)
same = stats.nct.sf(limit, df, gains.mean() / spread * np.sqrt(5))
print(f"from the spread of the accuracies: d {gains.mean() / spread:.2f}, power {same:.2f}")
assert p < 1e-4 and right > 0.99, "this has changed"
assert np.isclose(d, gains.mean() / spread), "this has changed"
assert np.isclose(power, same, atol=0.01) and power < 0.4, "this has changed"
PYTHON
