#!/usr/bin/env bash
# albumentations 2.0.8: one expects random.seed and np.random.seed, called before, to make
# a Compose repeat its views. Both are without effect: after the same seeds, a second
# Compose gives other views. Compose(..., seed=0) repeats them. A study that seeds
# "everything" compares its arms on different pictures.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q albumentations==2.0.8 numpy==2.4.6
NO_ALBUMENTATIONS_UPDATE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import random

import albumentations
import numpy as np

print("albumentations", albumentations.__version__)
photo = np.arange(16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)


def views(**options):
    random.seed(0)
    np.random.seed(0)
    augment = albumentations.Compose([albumentations.RandomCrop(8, 8)], **options)
    return [augment(image=photo)["image"].tobytes() for _ in range(50)]


seeded, own = views() == views(), views(seed=0) == views(seed=0)
print("the same views after the same global seeds:", seeded)
print("the same views with Compose(..., seed=0):", own)
assert not seeded and own, "this has changed"
PYTHON
