#!/usr/bin/env bash
# h5py 3.16.0, photographs [N, 160, 160, 3] in a data set with compression="gzip": one
# expects that data[i] unpacks one photograph. To compress, HDF5 cuts the data into chunks,
# and those that h5py guesses go across photographs: here, 50 photographs by 20 × 40
# pixels by one colour. One photograph touches 96 chunks, and 49 others are unpacked with
# it. With chunks=(1, 160, 160, 3), reading at random is more than 5 times as fast.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q h5py==3.16.0 numpy==2.4.6 scikit-image==0.26.0 \
    scipy==1.17.1 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import math
import time

import h5py
import numpy as np
from skimage.data import astronaut

print("h5py", h5py.__version__)
rng = np.random.default_rng(0)
photograph, count = astronaut(), 400
corners = rng.integers(512 - 160, size=(count, 2))
photographs = [photograph[y:y + 160, x:x + 160] for y, x in corners]
chosen = rng.integers(count, size=30)
milliseconds = {}
for chunks in (True, (1, 160, 160, 3)):
    with h5py.File("photographs.h5", "w") as file:
        file.create_dataset("x", data=photographs, compression="gzip", chunks=chunks)
    with h5py.File("photographs.h5") as file:
        data, times = file["x"], []
        for place in chosen:
            start = time.perf_counter()
            found = data[place]
            times.append(time.perf_counter() - start)
            assert (found == photographs[place]).all()
        sides = zip(data.shape[1:], data.chunks[1:])
        touched = math.prod(math.ceil(side / part) for side, part in sides)
        unpacked = touched * math.prod(data.chunks) / found.size
        milliseconds[chunks] = 1000 * np.median(times)
        print(f"chunks {data.chunks}: a photograph touches {touched}, which hold as much")
        print(f"  as {unpacked:.0f}; {milliseconds[chunks]:.1f} ms a photograph")
        assert (unpacked > 20) == (chunks is True), "this has changed"
good = (1, 160, 160, 3)
assert milliseconds[True] > 5 * milliseconds[good], "this has changed"
PYTHON
