#!/usr/bin/env bash
# datasets 5.2.0: load_dataset("imagefolder") looks for the words train, test, dev, eval
# and their like anywhere in a path. One expects a folder of class folders to give one
# split with a label for each. If one class is called "test tube" or "railway train",
# nothing but its photographs are loaded, without labels: the other classes vanish, without
# a word. A single file called "test drive.png" does the same. And in a folder that has
# train/ and val/, a class "test tube" gives a third split, "test", of photographs that
# are also in train and validation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pillow==13.0.0
cd "$folder"
export HF_HUB_OFFLINE=1 HF_HOME="$folder/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path

from datasets import load_dataset
from PIL import Image


def load(name, *photographs):
    """{split: (rows, classes or None)} of a folder with these photographs."""
    for shade, photograph in enumerate(photographs):
        path = Path(name, photograph)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), shade).save(path)
    loaded = load_dataset("imagefolder", data_dir=name)
    found = {}
    for split, rows in loaded.items():
        label = rows.features.get("label")
        found[split] = (len(rows), label and label.names)
    print(f"{photographs}\n    {found}")
    return found


two = ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]
assert load("plain", *two) == {"train": (4, ["a", "b"])}
tube = ["beaker/1.png", "beaker/2.png", "test tube/1.png"]
assert load("class", *tube) == {"test": (1, None)}
assert load("railway", "bus/1.png", "railway train/1.png") == {"train": (1, None)}
assert load("file", *two, "b/test drive.png") == {"test": (1, None)}
sides = [f"{side}/{name}" for side in ("train", "val") for name in tube]
found = load("sides", *sides)
assert {split: rows for split, (rows, _) in found.items()} == {
    "train": 3,
    "validation": 3,
    "test": 2,  # one of them is in train, the other in validation
}, "changed"
PYTHON
