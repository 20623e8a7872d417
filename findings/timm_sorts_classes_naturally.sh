#!/usr/bin/env bash
# timm 1.0.31 and torchvision 0.29.1, a folder of photographs with one folder a class: one
# expects both to number the classes alike, so that a teacher trained with the one can
# teach a student trained with the other. torchvision sorts by character: capitals first, 10 before 2. timm
# sorts numbers by value and leaves capitals out of account. The folders of ImageNet
# (n02086240) come out alike, one's own may not: here some of each library's labels are
# wrong for the other, and neither warns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q timm==1.0.31 torch==2.14.1 torchvision==0.29.1 \
    numpy==2.4.6 pillow==13.0.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import warnings
from pathlib import Path

import timm
import torchvision
from PIL import Image
from timm.data import create_dataset

SETS = {
    "as in ImageNet": ["n02086240", "n02087394", "n02115641"],
    "numbers": ["dog 1", "dog 2", "dog 10"],
    "capitals": ["akita", "Beagle", "collie"],
}
print("timm", timm.__version__, "and torchvision", torchvision.__version__)
for title, classes in SETS.items():
    root = Path(sys.argv[1]) / title
    for name in classes:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "photo.png")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        of_torchvision = torchvision.datasets.ImageFolder(root).classes
        of_timm = create_dataset("", root=root).reader.class_to_idx
        of_timm = sorted(of_timm, key=of_timm.get)
    print(f"  {title}: {of_timm}, {of_torchvision}; warnings: {len(told)}")
    assert of_timm == classes and not told, "this has changed"
    assert of_torchvision == sorted(classes), "this has changed"
    assert (of_timm == of_torchvision) == (title == "as in ImageNet")
PYTHON
