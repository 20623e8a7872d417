#!/usr/bin/env bash
# torch 2.14.1, DataLoader with workers: everybody has read that np.random.… in a data set
# gives the same numbers in each worker, and that a generator of one's own is the modern
# way. It is the other way round. np.random (and random) are seeded for each worker and
# epoch: all numbers differ. But a np.random.default_rng(0) that the data set keeps is
# copied into each worker: all workers draw the same numbers, and the same again in
# each epoch. Augmentations that use it show each epoch the same crops.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class Crops(Dataset):
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __len__(self):
        return 4

    def __getitem__(self, place):
        return np.random.randint(1_000_000), self.rng.integers(1_000_000)


print("torch", torch.__version__)
torch.manual_seed(0)
loader = DataLoader(Crops(), batch_size=2, num_workers=2)
usual, own = [], []
for epoch in (1, 2):
    first, second = (torch.stack(numbers).tolist() for numbers in zip(*loader))
    for worker in (0, 1):
        print(f"epoch {epoch}, worker {worker}: np.random {first[worker]},",
              f"a generator of one's own {second[worker]}")
    usual += sum(first, [])
    own += second
assert len(set(usual)) == 8, "this has changed"
assert own[0] == own[1] == own[2] == own[3], "this has changed"
PYTHON
