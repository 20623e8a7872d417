#!/usr/bin/env bash
# webdataset 1.0.2: one expects WebDataset(shards, shardshuffle=100) to draw a new order
# of the shards for each epoch, as .shuffle(1000) draws a new order of the samples. It
# draws one order, when the object is made, and keeps it for every epoch, also if no seed
# is given. It gets worse with an epoch of a fixed length, .repeat().with_epoch(n): each
# epoch begins at the first shard again, so the shards behind it are never read. Of 8
# shards, 20 epochs see one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q webdataset==1.0.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from webdataset import TarWriter, WebDataset

shards, samples, epochs = 8, 5, 20
names = [f"{shard}.tar" for shard in range(shards)]
for shard, name in enumerate(names):
    with TarWriter(name) as file:
        for sample in range(samples):
            file.write({"__key__": f"{shard}-{sample}", "cls": shard})


def orders(data):
    """The order of the samples' shards in each of the epochs."""
    data = data.decode().to_tuple("cls")
    return [tuple(shard for shard, in data) for _ in range(epochs)]


by_shard = orders(WebDataset(names, shardshuffle=100))
by_sample = orders(WebDataset(names, shardshuffle=False).shuffle(1000))
counted = orders(WebDataset(names, shardshuffle=100).repeat().with_epoch(samples))
assert all(sorted(epoch) == sorted(by_sample[0]) for epoch in by_shard + by_sample)
seen = {shard for epoch in counted for shard in epoch}
print("webdataset", version("webdataset"), f"({shards} shards, {epochs} epochs)")
print("  shardshuffle=100: different orders:", len(set(by_shard)), "| the first:", by_shard[0][::samples])
print("  shuffle(1000): different orders:", len(set(by_sample)))
print("  shardshuffle=100 and with_epoch: shards that are ever seen:", len(seen))
assert len(set(by_sample)) == epochs
assert len(set(by_shard)) == 1 and len(seen) == 1, "this has changed"
PYTHON
