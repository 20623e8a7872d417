#!/usr/bin/env bash
# timm 1.0.31 and Pillow 13.0.0: one expects timm's best known augmentation,
# rand-m9-mstd0.5-inc1, to run with Pillow 13 as it did with Pillow 12. Once in several
# hundred images it draws a magnitude of 10 for "posterize", which asks Pillow to keep 0 bits.
# Pillow 12 made a black picture of that, Pillow 13 raises a ValueError, and the epoch ends
# there. Without inc1, this recipe never draws it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q timm==1.0.31 torch==2.14.1 torchvision==0.29.1 \
    numpy==2.4.6 pillow==13.0.0
cat > "$folder/augment.py" <<'PYTHON'
import random

import numpy as np
import PIL
import timm
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform

print("timm", timm.__version__, "and Pillow", PIL.__version__)
photo = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (32, 1, 3))
photo = Image.fromarray(photo)
for spec in ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5"):
    random.seed(0)
    np.random.seed(0)
    augment = rand_augment_transform(spec, {"translate_const": 10})
    failed, told = 0, ""
    for _ in range(10_000):
        try:
            augment(photo)
        except ValueError as error:
            assert "bits must be" in str(error)
            failed, told = failed + 1, f"({error})"
    print(f"  {spec}: {failed} of 10,000 images raise {told}")
    raises = PIL.__version__ == "13.0.0" and "inc1" in spec
    assert (5 < failed < 50) if raises else (failed == 0), "this has changed"
if PIL.__version__ == "12.1.0":
    print("  0 bits give", np.unique(ImageOps.posterize(photo, 0)))
    assert not np.any(ImageOps.posterize(photo, 0)), "this has changed"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/augment.py"
"$folder/venv/bin/pip" install -q pillow==12.1.0
"$folder/venv/bin/python" -W ignore "$folder/augment.py"
