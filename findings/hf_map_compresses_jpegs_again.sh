#!/usr/bin/env bash
# datasets 5.2.0, a data set that holds its photographs as JPEG files, byte by byte. One
# expects map() with a function that only looks at them, and returns a new column, to
# leave them as they are. But if the function has read example["image"], that column is
# written anew, by Pillow, with its default quality of 75: a JPEG of quality 95 shrinks to
# less than half, and its pixels change, without a word. With input_columns=["image"], in
# filter(), or if the function does not look at them, nothing changes. A student that
# learns from the mapped set and a teacher that learned from the first saw other pixels.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pillow==13.0.0 numpy==2.4.6 \
    scikit-image==0.26.0 scipy==1.17.1
HF_HOME="$folder/cache" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import io

import datasets
import numpy as np
from datasets import Dataset, Features, Image
from PIL import Image as Pillow
from skimage.data import astronaut

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
file = io.BytesIO()
Pillow.fromarray(astronaut()).save(file, "JPEG", quality=95)
jpeg = file.getvalue()
photos = Dataset.from_dict({"image": [{"bytes": jpeg, "path": "a.jpg"}]},
                           features=Features({"image": Image()}))


def stored(data):
    return data.cast_column("image", Image(decode=False))[0]["image"]["bytes"]


def brightness(image):
    return {"brightness": float(np.asarray(image).mean())}


sets = {
    "as it was": photos,
    "map, not looking": photos.map(lambda example: {"brightness": 0.0}),
    "filter, looking": photos.filter(lambda example: example["image"].width > 9),
    "map, input_columns": photos.map(brightness, input_columns=["image"]),
    "map, looking": photos.map(lambda example: brightness(example["image"])),
}
first = np.asarray(photos[0]["image"]).astype(int)
for name, data in sets.items():
    change = np.abs(np.asarray(data[0]["image"]) - first)
    print(f"{name}: {len(stored(data)):,} bytes, pixels differ by up to {change.max()}")
    assert (stored(data) == jpeg) == (name != "map, looking"), "this has changed"
assert len(stored(data)) < len(jpeg) / 2 and change.max() > 20, "this has changed"
again = io.BytesIO()
Pillow.open(io.BytesIO(jpeg)).save(again, "JPEG", quality=75)
assert stored(data) == again.getvalue(), "this has changed"
print("the last is Pillow's JPEG of quality 75 of the first, byte by byte")
PYTHON
