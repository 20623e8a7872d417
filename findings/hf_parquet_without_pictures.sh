#!/usr/bin/env bash
# datasets 5.2.0, a folder of photographs, loaded with load_dataset("imagefolder"). One
# expects to_parquet() to write a file that holds the photographs, as save_to_disk()
# does. It writes their paths alone: about 3 KB for 1.5 MB of photographs, without a
# warning. As long as the folder stays where it is, the Parquet file loads and each
# photograph opens, so all seems well. With the folder moved away (as on any
# other machine) not one of them opens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
HF_HOME="$folder/cache" "$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, load_dataset, load_from_disk
from PIL import Image

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
for name in ("beagle", "poodle"):
    (folder / "photos" / name).mkdir(parents=True)
    for number in range(10):
        pixels = rng.integers(256, size=(160, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
size = sum(file.stat().st_size for file in folder.glob("photos/*/*.png"))
photos = load_dataset("imagefolder", data_dir=str(folder / "photos"), split="train")
photos.to_parquet(folder / "photos.parquet")
photos.save_to_disk(folder / "disk")
parquet = (folder / "photos.parquet").stat().st_size
disk = sum(file.stat().st_size for file in folder.glob("disk/*.arrow"))
print(f"20 photographs: {size:,} bytes; Parquet: {parquet:,}; save_to_disk: {disk:,}")
assert parquet < size / 100 and disk > size, "this has changed"


def readable(data):
    count = 0
    for place in range(len(data)):
        try:
            count += data[place]["image"].size == (160, 160)
        except FileNotFoundError:
            pass
    return count


for words, wanted in (("with the folder", (20, 20)), ("without it", (0, 20))):
    of_parquet = readable(Dataset.from_parquet(str(folder / "photos.parquet")))
    of_disk = readable(load_from_disk(folder / "disk"))
    print(f"{words}: {of_parquet} open from Parquet, {of_disk} from save_to_disk")
    assert (of_parquet, of_disk) == wanted, "this has changed"
    if words == "with the folder":
        (folder / "photos").rename(folder / "elsewhere")
PYTHON
