#!/usr/bin/env bash
# torchvision 0.29.1: in its dataset classes, `class_to_idx` has one entry for each class,
# as in ImageFolder, and many scripts take num_classes=len(dataset.class_to_idx). That of
# Imagenette, of ten classes, has 20 entries, since a class stands there with each of its
# synonyms. A network built so has 20 outputs, half of which never get a photograph. It
# trains without an error. `classes` and `wnid_to_idx` have ten entries.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 \
    pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder, Imagenette

# The folders of fastai's imagenette2-160, with one image in each
WNIDS = "n01440764 n02102040 n02979186 n03000684 n03028079"
WNIDS += " n03394916 n03417042 n03425413 n03445777 n03888257"
for wnid in WNIDS.split():
    path = Path("imagenette2-160/train", wnid, f"{wnid}_1.JPEG")
    path.parent.mkdir(parents=True)
    Image.new("RGB", (160, 160)).save(path)

plain = ImageFolder("imagenette2-160/train")
dataset = Imagenette(".", "train", "160px")
sizes = {
    "ImageFolder.class_to_idx": len(plain.class_to_idx),
    "Imagenette.class_to_idx": len(dataset.class_to_idx),
    "Imagenette.classes": len(dataset.classes),
    "Imagenette.wnid_to_idx": len(dataset.wnid_to_idx),
}
print("torchvision 0.29.1:", sizes, dataset.classes[7])
labels = torch.tensor([label for _, label in dataset])
network = nn.Sequential(nn.Flatten(), nn.LazyLinear(len(dataset.class_to_idx)))
images = torch.rand(len(labels), 3, 8, 8)
loss = F.cross_entropy(network(images), labels)
print(f"labels 0 to {int(labels.max())}, {network[1].out_features} outputs: loss {loss:.2f}")
assert list(sizes.values()) == [10, 20, 10, 10] and int(labels.max()) == 9, "changed"
PYTHON
