#!/usr/bin/env bash
# MAPIE 1.6.0, calibration errors. One expects n bins from num_bins=n: it takes n edges,
# so there is one bin less, and two "bins" are one. One expects the same value whatever
# the order of the images: split_strategy="array split" takes its edges from the images
# as they come, without sorting them. And top_label_ece is an expectation over images in
# its paper (Gupta & Ramdas, 2021); here it is a plain mean over classes, in which ten
# images of a rare class weigh as much as 990 of another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mapie==1.6.0 scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
from mapie.metrics.calibration import expected_calibration_error, top_label_ece

# Bins: 25 % sure and 75 % sure, right on half of the images in both cases
right = np.tile([0, 1], 100)
confidence = np.repeat([0.25, 0.75], 100)
for bins, expected in ((2, 0.0), (3, 0.25)):
    found = expected_calibration_error(right, confidence, num_bins=bins)
    print(f"num_bins={bins}: {found:.3f} (two bins, by hand: 0.250)")
    assert abs(found - expected) < 1e-9, "this has changed"

# Order: the same images, sorted by confidence and shuffled
random = np.random.default_rng(0)
confidence = np.sort(random.uniform(0.1, 1, 2000))
right = (random.uniform(size=2000) < 0.55).astype(int)  # whatever the confidence
shuffled = random.permutation(2000)
split = {"num_bins": 15, "split_strategy": "array split"}
values = [
    expected_calibration_error(right[order], confidence[order], **split)
    for order in (np.arange(2000), shuffled)
]
print("array split, sorted and shuffled: {:.3f}, {:.3f}".format(*values))
assert abs(values[0] - values[1]) > 0.1, "this has changed"

# Classes: 990 answers that are calibrated, ten that are too sure by 50 points
answers = np.repeat([0, 1], [990, 10])
labels = np.concatenate([np.tile([0, 1], 495), np.tile([0, 1], 5)])
confidence = np.repeat([0.5, 0.9999], [990, 10])
found = top_label_ece(labels, confidence, answers, num_bins=10)
print(f"top_label_ece: {found:.3f} (weighted by images, by hand: 0.005)")
assert abs(found - 0.25) < 0.001, "this has changed"
PYTHON
