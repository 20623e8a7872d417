#!/usr/bin/env bash
# torch 2.14.1, torch.cdist(x, x): the distances between the features of a batch, which a
# student shall have like its teacher (relational distillation). One expects a row to be
# at distance 0 from itself. So it is with 25 rows. From 26 rows on, cdist takes another way,
# by a matrix product, which cancels: a row is now up to 0.03 from itself, and of
# features that differ by 0.02, many are at distance 0. compute_mode=
# "donot_use_mm_for_euclid_dist" gives what one expects, with any number of rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

print("torch", torch.__version__)
torch.set_num_threads(1)
torch.manual_seed(0)
features = (1 + 2 * torch.randn(64, 512)).relu()  # as after a network's last ReLU
exact = "donot_use_mm_for_euclid_dist"
largest = {}
for rows in (25, 26, 64):
    x = features[:rows]
    ways = torch.cdist(x, x), torch.cdist(x, x, compute_mode=exact)
    largest[rows] = [distances.diagonal().max().item() for distances in ways]
    print(f"{rows} rows, largest distance of a row from itself: {largest[rows][0]:.4f};",
          f"with {exact}: {largest[rows][1]:.4f}")
others = features + 0.001 * torch.randn(64, 512)
true = (features.double() - others.double()).norm(dim=1)
found = torch.cdist(features, others).diagonal()
zeros = (found == 0).sum().item()
print(f"pairs at a distance of {true.min():.4f} to {true.max():.4f}: {zeros} of 64 have 0,",
      f"the largest is {found.max():.4f}")
assert largest[25] == [0, 0] and largest[64][1] == 0, "this has changed"
assert largest[26][0] > 0.01 and largest[64][0] > 0.01, "this has changed"
assert true.min() > 0.02 and zeros > 5 and found.max() > 0.03, "this has changed"
PYTHON
