"""Knowledge distillation on Imagewoof and Imagenette: the code behind the two notebooks.

The file reads in the order in which the data flows:

    settings ─► download ─► uint8 images ─► batches ─┬─► teacher (frozen) ─┐
                                                     └─► students ──► loss ◄┘ ─► metrics ─► results ─► report

One stream of batches feeds every student of a cohort: a batch is drawn and augmented once, the teacher reads it once, and each
student then takes its own step on it. Two students with the same seed therefore differ by their loss and by nothing else.

Shapes: N images, B images in a batch, C classes, S pixels a side.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, astuple, dataclass, field
from functools import cache, partial
from itertools import count, cycle, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops.misc import Conv2dNormActivation
from tqdm import tqdm

tqdm = partial(tqdm, file=sys.stdout, ncols=100, mininterval=5.0)  # stdout: notebooks paint stderr red


# ── Settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Profile:
    """How large a study is, and so how long it takes."""

    name: str
    image_size: int  # pixels a side
    seeds: tuple[int, ...]  # one student of each kind per seed
    epochs: int  # passes over `train` for every student
    teacher_epochs: int  # passes over `train` for the teacher
    batch_size: int
    controls: bool = False  # train the students of the control arms, too
    search: tuple[str, ...] = ()  # the VARIATIONS to try on the selection split


# What a search changes: a factor for lr and epochs, a value for the others.
VARIATIONS = {
    "as chosen": {},
    "lr ÷ 2": {"lr": 0.5},
    "lr × 2": {"lr": 2},
    "no dropout": {"dropout": 0.0},
    "epochs ÷ 2": {"epochs": 0.5},
    "epochs × 2": {"epochs": 2},
    "milder crops": {"min_crop": 0.6},
    "harder crops": {"min_crop": 0.15},
}

PROFILES = {
    profile.name: profile
    for profile in (
        Profile("full", image_size=160, seeds=(0, 1, 2, 3, 4), epochs=40, teacher_epochs=3, batch_size=128,
                controls=True, search=tuple(VARIATIONS)),  # fmt: skip
        Profile("gpu", image_size=160, seeds=(0, 1, 2), epochs=16, teacher_epochs=2, batch_size=128),
        Profile("cpu", image_size=64, seeds=(0, 1), epochs=5, teacher_epochs=1, batch_size=64),
        Profile("study", image_size=64, seeds=(0, 1, 2), epochs=4, teacher_epochs=1, batch_size=64,
                controls=True, search=tuple(VARIATIONS)[:4]),  # fmt: skip
        Profile("demo", image_size=64, seeds=(0, 1), epochs=3, teacher_epochs=1, batch_size=32),
    )
}


def choose_profile(name: str | None = None) -> Profile:
    """The profile called `name`, or else the one that KD_PROFILE names, or else the one that suits the hardware.

    Raises ValueError for an unknown name.
    """
    large = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 30e9
    name = name or os.environ.get("KD_PROFILE") or ("full" if large else "gpu" if torch.cuda.is_available() else "cpu")
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)} (argument or KD_PROFILE)")
    return PROFILES[name]


@cache
def choose_precision(device: torch.device) -> torch.dtype:
    """The type that matrix products run in: bfloat16 where the hardware has it, float16 on older GPUs, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Without AMX tiles, bfloat16 on a CPU measured no faster than float32.
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "amx_bf16" in flags else torch.float32


def _autocast(device: torch.device):
    precision = choose_precision(device)
    return torch.autocast(device.type, precision, enabled=precision is not torch.float32)


# ── Data: from an archive to uint8 images on the device ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class DatasetInfo:
    classes: dict[str, str]  # folder name ─► name a person can read, in the order of the labels
    counts: dict[str, int]  # images per split
    size: int | None = None  # bytes of the archive
    checksum: str | None = None  # of the archive, "md5:…" or "sha256:…"


BASE_URL = "https://s3.amazonaws.com/fast-ai-imageclas"
DEMO_SHAPES = "disc ring square diamond triangle cross saltire bars columns checks".split()


def _classes(text: str) -> dict[str, str]:
    return dict(entry.strip().split(" ", 1) for entry in text.split(","))


DATASETS = {
    "imagewoof2-160": DatasetInfo(
        classes=_classes(
            "n02086240 Shih-Tzu, n02087394 Rhodesian ridgeback, n02088364 beagle, n02089973 English foxhound, "
            "n02093754 Border terrier, n02096294 Australian terrier, n02099601 golden retriever, "
            "n02105641 Old English sheepdog, n02111889 Samoyed, n02115641 dingo"
        ),
        counts={"train": 9025, "val": 3929}, size=92612825, checksum="md5:3d200a7be99704a0d7509be2a9fbfe15",  # fmt: skip
    ),
    "imagenette2-160": DatasetInfo(
        classes=_classes(
            "n01440764 tench, n02102040 English springer, n02979186 cassette player, n03000684 chain saw, n03028079 church, "
            "n03394916 French horn, n03417042 garbage truck, n03425413 gas pump, n03445777 golf ball, n03888257 parachute"
        ),
        counts={"train": 9469, "val": 3925}, size=99003388, checksum="md5:e793b78cc4c9e9a4ccc0c1155377a412",  # fmt: skip
    ),
    "demo": DatasetInfo(classes={shape: shape for shape in DEMO_SHAPES}, counts={"train": 300, "val": 100}),
}


def _info(name: str) -> DatasetInfo:
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def download_dataset(name: str, root="data", base_url: str = "", size: int | None = None, checksum: str | None = None) -> Path:
    """Fetches `<base_url>/<name>.tgz`, checks it, unpacks it, and returns the folder `<root>/<name>`.

    An already unpacked dataset is used as it stands if its images count right, and replaced if they do not. An interrupted
    transfer continues, also in a later call. `size` (bytes) and `checksum` ("md5:…" or "sha256:…") replace the published ones when
    `base_url` (https, http or file) serves another archive; "demo" is drawn here. Raises ValueError for an unknown name, a wrong
    size or checksum, or a wrong number of images; ConnectionError if the archive cannot be had; OSError if the disk is too small.
    """
    info, root = _info(name), Path(root)
    folder = root / name
    if not _wrong_counts(folder, info):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{name}.lock"), _scratch_folder(root / f".{name}.unpacking") as scratch:
        if not (wrong := _wrong_counts(folder, info)):
            return folder  # another notebook has fetched it meanwhile
        if name == "demo" and not base_url:
            base_url, checksum = draw_demo_archive(scratch / "source")
        size, archive = size or (info.size if checksum is None else None), root / f"{name}.tgz"
        _fetch(f"{base_url or BASE_URL}/{name}.tgz", archive, size, checksum or info.checksum)
        _unpack(archive, scratch)
        if incomplete := _wrong_counts(scratch / name, info):
            raise ValueError(f"{archive} holds a wrong number of images: {incomplete}")
        if folder.exists():
            _set_aside(folder, wrong)
        (scratch / name).rename(folder)
        archive.unlink()
    return folder


def file_digest(path, kind: str = "sha256") -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _list_images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpeg", ".jpg", ".png"))


def _wrong_counts(folder: Path, info: DatasetInfo) -> str:
    """What is wrong with the number of images in a dataset's folder, or "" if nothing is."""
    found = {split: sum(len(_list_images(folder / split / name)) for name in info.classes) for split in info.counts}
    wrong = [f"expected {info.counts[split]} images in {split}, found {count}" for split, count in found.items() if count != info.counts[split]]
    return "; ".join(wrong)


def draw_demo_archive(folder: Path) -> tuple[str, str]:
    """Draws ten classes of shapes as JPEG files, packs them as `demo.tgz`, and returns its base URL (file://) and checksum."""
    rng = np.random.default_rng(0)
    for split, count in DATASETS["demo"].counts.items():
        for index in range(count):
            shape = DEMO_SHAPES[index % len(DEMO_SHAPES)]
            # As in the real data, few validation names say that the image comes from ImageNet's validation set.
            stem = f"ILSVRC2012_val_{index:08d}" if split == "val" and index < 40 else f"{shape}_{index}"
            target = folder / "demo" / split / shape / f"{stem}.JPEG"
            target.parent.mkdir(parents=True, exist_ok=True)
            mode = {3: "L", 5: "CMYK"}.get(index // 10, "RGB")  # the real data has grey-scale and CMYK files, too
            _draw_shape(shape, rng).convert(mode).save(target, quality=90)
    with tarfile.open(folder / "demo.tgz", "w:gz") as tar:
        tar.add(folder / "demo", arcname="demo")
    return folder.resolve().as_uri(), f"sha256:{file_digest(folder / 'demo.tgz')}"


def _draw_shape(shape: str, rng: np.random.Generator) -> Image.Image:
    height, width = rng.integers(80, 130, 2)
    radius = rng.uniform(22, 36)
    v, u = np.ogrid[:height, :width]
    v, u = (v - rng.uniform(radius, height - radius)) / radius, (u - rng.uniform(radius, width - radius)) / radius
    x, y, square = np.abs(u), np.abs(v), np.maximum(np.abs(u), np.abs(v)) < 1
    inside = {
        "disc": np.hypot(u, v) < 1,
        "ring": (np.hypot(u, v) < 1) & (np.hypot(u, v) > 0.6),
        "square": square,
        "diamond": x + y < 1,
        "triangle": (v < 1) & (2 * x - 1 < v),
        "cross": square & (np.minimum(x, y) < 0.25),
        "saltire": square & (np.abs(x - y) < 0.3),
        "bars": square & (np.floor(4 * v + 0 * u) % 2 == 0),
        "columns": square & (np.floor(4 * u + 0 * v) % 2 == 0),
        "checks": square & ((np.floor(3 * u) + np.floor(3 * v)) % 2 == 0),
    }[shape]
    background = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.where(inside[..., None], rng.integers(140, 256, 3, dtype=np.uint8), background))


@dataclass
class Split:
    """Decoded images with their labels."""

    images: Tensor  # [N, 3, S, S] uint8
    targets: Tensor  # [N] int64, 0 ≤ target < C
    classes: list[str]  # C names
    files: list[str]  # N paths below the split's folder

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor) -> Split:
        where = indices.to(self.targets.device)
        return Split(self.images[where], self.targets[where], self.classes, [self.files[i] for i in indices.tolist()])

    @property
    def never_seen(self) -> Tensor:
        """[N] bool, on the CPU: images from ImageNet's own validation set, which no ImageNet-trained teacher was trained on."""
        return torch.tensor([Path(file).name.startswith("ILSVRC2012_val_") for file in self.files])


def load_images(folder, size: int, device="cpu") -> dict[str, Split]:
    """Decodes every image of a dataset once and moves it to the device: {"train", "selection", "val"}.

    Each image is scaled to a short side of `size` pixels and cropped to its centre. The result is cached beside the dataset.
    "selection" holds 10 % of "train" (which keeps them): to make a choice, train on `selection_split(train)[0]`.
    Raises FileNotFoundError for a missing or empty class folder and ValueError for an unreadable image, naming it.
    """
    folder = Path(folder)
    found = {path.name: path.name for path in sorted((folder / "train").glob("[!.]*/"))}
    classes = DATASETS[folder.name].classes if folder.name in DATASETS else found
    splits = {split: _load_split(folder, split, classes, size, device) for split in ("train", "val")}
    splits["selection"] = selection_split(splits["train"])[1]
    return splits


def _load_split(folder: Path, split: str, classes: dict[str, str], size: int, device) -> Split:
    paths = [_list_images(folder / split / name) for name in classes]
    empty = [str(folder / split / name) for name, group in zip(classes, paths) if not group]
    if empty or not paths:
        raise FileNotFoundError(f"no image in {', '.join(empty) or folder / split}: every class needs a folder with at least one")
    targets = torch.repeat_interleave(torch.arange(len(paths)), torch.tensor([len(group) for group in paths], dtype=torch.long))
    files = [str(path.relative_to(folder / split)) for group in paths for path in group]
    cache = folder.parent / "cache" / f"{folder.name}-{split}-{size}px.pt"
    cached = _read_saved(cache, {"stamp", "images"})
    stamp = [f"{file} {(folder / split / file).stat().st_size}" for file in files]  # another file, another decoding
    if cached is None or cached["stamp"] != stamp:
        cached = {"stamp": stamp, "images": decode_images([folder / split / file for file in files], size)}
        _save_if_possible(cached, cache)
    return Split(cached["images"].to(device), targets.to(device), list(classes.values()), files)


def decode_images(paths: list[Path], size: int) -> Tensor:
    """Decodes image files into a tensor [N, 3, size, size] uint8; raises ValueError naming what cannot be read."""
    images, unreadable = torch.empty(len(paths), 3, size, size, dtype=torch.uint8), []

    def decode(index: int) -> None:
        try:
            with Image.open(paths[index]) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            images[index] = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
        except Exception as error:  # PIL raises many kinds
            unreadable.append(f"{paths[index]} ({error})")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(tqdm(pool.map(decode, range(len(paths))), total=len(paths), unit=" images", desc=f"decode to {size} px"))
    if unreadable:
        raise ValueError(f"{len(unreadable)} unreadable image(s): " + "; ".join(sorted(unreadable)[:5]))
    return images


def selection_split(train: Split, fraction: float = 0.1) -> tuple[Split, Split]:
    """Splits `train` into (rest, selection): the same `fraction` of every class, the same images each time."""
    targets, generator = train.targets.cpu(), torch.Generator().manual_seed(1998)
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    for target in targets.unique():
        members = (targets == target).nonzero().squeeze(1)
        chosen[members[torch.randperm(len(members), generator=generator)[: max(1, round(fraction * len(members)))]]] = True
    return train.subset((~chosen).nonzero().squeeze(1)), train.subset(chosen.nonzero().squeeze(1))


# ── Batches: one augmented view per image, a pure function of (seed, epoch) ──────────────────────────────────────────────────────

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(images: Tensor) -> Tensor:
    """[B, 3, S, S] with values 0…255 ─► float32 with ImageNet's channel statistics removed, channels_last."""
    mean, std = _channel_statistics(images.device)
    return images.float().sub(mean).div_(std).contiguous(memory_format=torch.channels_last)


@cache  # made once: each transfer makes the host wait for the device
@torch.inference_mode(False)
def _channel_statistics(device: torch.device) -> list[Tensor]:
    return [255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)]


def sample_crops(count: int, size: int, generator: torch.Generator, scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3)) -> Tensor:
    """Crop boxes [count, 4] int64 (top, left, height, width) in a square image, drawn like torchvision's RandomResizedCrop."""
    tries = 10
    area = torch.empty(count, tries).uniform_(*scale, generator=generator) * size**2
    aspect = torch.empty(count, tries).uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator).exp()
    width, height = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (width <= size) & (height <= size)
    first = fits.int().argmax(1, keepdim=True)  # the first try that fits
    width, height = (torch.where(fits.any(1), side.gather(1, first).squeeze(1), size) for side in (width, height))
    corner = torch.rand(2, count, generator=generator)
    top, left = (corner[0] * (size - height + 1)).long(), (corner[1] * (size - width + 1)).long()
    return torch.stack([top, left, height, width], dim=1)


def crop_and_resize(images: Tensor, boxes: Tensor, flip: Tensor) -> Tensor:
    """Cuts a box out of each image, scales it back to the image's size (bilinear), and mirrors it where `flip` says so.

    images [B, 3, S, S], boxes [B, 4] (top, left, height, width) in pixels, flip [B] bool ─► [B, 3, S, S] float32.
    """
    size = images.shape[-1]
    top, left, height, width = boxes.to(images.device).unsqueeze(-1).float().unbind(1)  # each [B, 1]
    centre = (torch.arange(size, device=images.device) + 0.5) / size  # [S]
    across = torch.where(flip.to(images.device).unsqueeze(1), 1 - centre, centre)  # [B, S]
    # Pixel coordinates to sample at; clamping keeps pixels outside the box from bleeding in at its edge.
    x = (left + across * width - 0.5).clamp(min=left, max=left + width - 1)
    y = (top + centre * height - 0.5).clamp(min=top, max=top + height - 1)
    x, y = ((2 * position + 1) / size - 1 for position in (x, y))  # grid_sample's own units: −1 … 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # [B, S, S, 2]
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


class BatchStream:
    """Augmented batches of a split. What epoch e holds depends on (seed, e) alone, so two experiments can share one stream.

    Each epoch shuffles the split and drops the last, incomplete batch. A view holds at least `min_crop` of an image's area.
    """

    def __init__(self, split: Split, batch_size: int, seed: int = 0, min_crop: float = 0.35):
        self.split, self.seed, self.min_crop = split, seed, min_crop
        self.batch_size = min(batch_size, len(split))
        self.steps = len(split) // self.batch_size  # per epoch

    def epoch(self, epoch: int, first: int = 0):
        """Yields (images [B, 3, S, S] float32 normalised, targets [B] int64) on the split's device, from batch `first` on."""
        generator, size = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch), self.split.images.shape[-1]
        order = torch.randperm(len(self.split), generator=generator)[: self.steps * self.batch_size].view(self.steps, self.batch_size)
        crops, flips = zip(*((sample_crops(self.batch_size, size, generator, (self.min_crop, 1.0)),
                              torch.rand(self.batch_size, generator=generator) < 0.5) for _ in order))  # fmt: skip
        # All of an epoch's choices go to the device at once: each transfer makes the host wait for it.
        order, crops, flips = (choices.to(self.split.images.device) for choices in (order, torch.stack(crops), torch.stack(flips)))
        for step in range(first, self.steps):
            images, targets = self.split.images[order[step]], self.split.targets[order[step]]
            yield normalise(crop_and_resize(images, crops[step], flips[step])), targets


# ── Models ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class ConvBlock(nn.Module):
    """Halves the resolution with a strided 3×3 convolution, then refines it with a residual one."""

    def __init__(self, inputs: int, outputs: int, groups: int = 1):
        super().__init__()
        self.reduce = Conv2dNormActivation(inputs, outputs, 3, stride=2)
        self.refine = Conv2dNormActivation(outputs, outputs, 3, groups=groups)

    def forward(self, x: Tensor) -> Tensor:  # [B, inputs, S, S] ─► [B, outputs, S/2, S/2]
        x = self.reduce(x)
        return x + self.refine(x)


class CustomCNN(nn.Module):
    """A small residual network: five blocks of 32-64-128-256-512 channels, average pooling, one linear layer; 3.5 M parameters."""

    def __init__(self, num_classes: int = 10, dropout: float = 0.2):
        super().__init__()
        self.blocks = nn.Sequential(
            ConvBlock(3, 32), ConvBlock(32, 64), ConvBlock(64, 128), ConvBlock(128, 256), ConvBlock(256, 512, groups=2)
        )  # two groups in the last block keep the network under 4 M parameters
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(512, num_classes))

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, S, S], S ≥ 64 ─► [B, C]
        return self.head(self.blocks(x).mean(dim=(2, 3)))


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al., 1998, section II.B) for RGB photographs: C1 6@5×5, C3 16@5×5, C5 120@5×5, F6 84; 62 k parameters.

    What differs from the paper: C5 slides over a larger map than 5×5, and its answers are averaged over all positions, so that any
    image of at least 64 px fits; max pooling replaces the trainable subsampling, and ReLU the scaled tanh; C3 sees all six maps
    instead of a table of some; the output layer is linear instead of radial basis functions.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(16, 120, 5), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(120, 84), nn.ReLU(inplace=True), nn.Linear(84, num_classes))

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, S, S], S ≥ 64 ─► [B, C]
        return self.head(self.features(x))


STUDENTS = {"Custom CNN": CustomCNN, "LeNet-5": LeNet5}


def build_teacher(num_classes: int, weights: str | os.PathLike | None = "IMAGENET1K_V1") -> nn.Module:
    """torchvision's ResNet-50 with a new linear head for `num_classes`.

    `weights` is the name of torchvision's weights ("IMAGENET1K_V1"), the path of a state dict of ResNet-50 (any float type; its
    head is dropped if it has another number of classes), or None for random weights. Raises FileNotFoundError if it is neither a
    known name nor a file, and ValueError for a file that is no such state dict.
    """
    source = _find_weights(weights)
    file = isinstance(source, Path)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the new head is the same in every run
        model = torchvision.models.resnet50(weights=None if file else source, progress=False)
        model.fc = nn.Linear(model.fc.in_features, num_classes)
    if file:
        try:
            _load_backbone(model, torch.load(source, map_location="cpu", weights_only=True))
        except Exception as error:  # a damaged or foreign file fails in many ways
            raise ValueError(f"teacher weights {source}: not a readable state dict of ResNet-50 ({error})") from error
    return model


def _load_backbone(model: nn.Module, state: dict[str, Tensor]) -> None:
    body = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    head = {f"fc.{key}": value for key, value in model.fc.state_dict().items()}
    same_head = "fc.bias" in body and body["fc.bias"].shape == head["fc.bias"].shape
    model.load_state_dict(body if same_head else {**body, **head})


def _find_weights(weights: str | os.PathLike | None):
    names = torchvision.models.ResNet50_Weights.__members__
    if weights is None or str(weights) in names:
        return names.get(str(weights))
    if not Path(weights).is_file():
        raise FileNotFoundError(f"teacher weights {str(weights)!r}: neither a file nor one of {', '.join(names)}")
    return Path(weights)


def describe_weights(weights: str | os.PathLike | None) -> dict[str, str]:
    """The source and SHA-256 of what `build_teacher` was given, for the record."""
    source = _find_weights(weights)
    if source is None:
        return {"teacher weights": "random initialisation"}
    if isinstance(source, Path):
        return {"teacher weights": f"local file {source.name}", "SHA-256 of the teacher weights": file_digest(source)}
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(source.url).name
    return {"teacher weights": f"torchvision ResNet50_Weights.{source.name}", "SHA-256 of the teacher weights": file_digest(file)}


def freeze(model: nn.Module) -> nn.Module:
    """Puts a model in evaluation mode and stops all gradients to it, so that nothing in it can change."""
    return model.eval().requires_grad_(False)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ── Loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float, alpha: float) -> Tensor:
    """alpha · T² · KL(softmax(teacher / T) ‖ softmax(student / T)) + (1 − alpha) · CE(student, targets), a scalar, in float32.

    student_logits and teacher_logits [B, C] (any float type), targets [B] int64. `alpha` in [0, 1] weighs the *distillation* term;
    some libraries call the other term's weight alpha. T² undoes the 1/T² by which a high temperature shrinks that term's
    gradient (Hinton, Vinyals & Dean, 2015, section 2). Raises ValueError for T ≤ 0, alpha outside [0, 1], shapes that differ, or labels
    out of range.
    """
    _check_loss_arguments(student_logits, teacher_logits, targets, temperature, alpha)
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    cross_entropy = F.cross_entropy(student, targets)
    soft_student = F.log_softmax(student / temperature, dim=1)
    soft_teacher = F.log_softmax(teacher / temperature, dim=1)
    # batchmean divides by B, as the definition does; the default, "mean", divides by B · C.
    divergence = F.kl_div(soft_student, soft_teacher, log_target=True, reduction="batchmean")
    return alpha * temperature**2 * divergence + (1 - alpha) * cross_entropy


def _check_loss_arguments(student_logits, teacher_logits, targets, temperature, alpha) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha, the weight of the distillation term, must lie in [0, 1], got {alpha}")
    if teacher_logits is None:
        raise ValueError("there are no teacher_logits to learn from: give `fit` a teacher")
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {list(student_logits.shape)} and teacher_logits {list(teacher_logits.shape)} must both be [B, C]: "
            "build student and teacher with the same num_classes"
        )
    if targets.shape != student_logits.shape[:1]:
        raise ValueError(f"targets {list(targets.shape)} must be [B] = {list(student_logits.shape[:1])}")
    if targets.device.type == "cpu":  # on a GPU this would wait for the device; `fit` checks all labels beforehand
        check_targets(targets, student_logits.shape[1])


def check_targets(targets: Tensor, num_classes: int) -> None:
    """Raises ValueError unless every target lies in 0 … num_classes − 1."""
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise ValueError(f"labels must lie in 0 … {num_classes - 1}, got {int(targets.min())} … {int(targets.max())}")


def label_loss(student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
    """Cross-entropy with the labels, the loss of Experiment 1: `distillation_loss` at alpha = 0, for which no teacher is needed."""
    return F.cross_entropy(student_logits.float(), targets)


def smoothed_loss(student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
    """A control: cross-entropy with label smoothing 0.1 (Szegedy et al., 2016, section 7). Does it help that targets are soft?"""
    return F.cross_entropy(student_logits.float(), targets, label_smoothing=0.1)


def argmax_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """A control: alpha · CE(student, the teacher's arg max) + (1 − alpha) · CE(student, targets). Do its decisions help?

    Shapes and errors as in `distillation_loss`.
    """
    _check_loss_arguments(student_logits, teacher_logits, targets, 1.0, alpha)
    student = student_logits.float()
    return alpha * F.cross_entropy(student, teacher_logits.argmax(1)) + (1 - alpha) * F.cross_entropy(student, targets)


def shuffled_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float, alpha: float) -> Tensor:
    """A control: `distillation_loss` with the teacher's answers to *other* images of the same class. Does a class average help?"""
    _check_loss_arguments(student_logits, teacher_logits, targets, temperature, alpha)
    return distillation_loss(student_logits, teacher_logits[shuffle_within_class(targets)], targets, temperature, alpha)


def shuffle_within_class(targets: Tensor) -> Tensor:
    """Indices [B] int64 that lead each image to another one with the same target, or to itself where it is the only one."""
    order = (targets + torch.rand(len(targets), dtype=torch.double, device=targets.device)).argsort()  # by class, at random within it
    ordered = targets[order]
    first = torch.searchsorted(ordered, ordered)  # of the same class
    last = ordered != torch.cat([ordered[1:], ordered.new_full((1,), -1)])
    following = torch.where(last, order[first], order.roll(-1))
    return torch.empty_like(order).scatter_(0, order, following)


# ── Training: a cohort of students on one stream of batches ──────────────────────────────────────────────────────────────────────


@dataclass
class History:
    """One entry per epoch; accuracies in 0 … 1."""

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)


CONTROLS = ("smoothed", "arg-max", "shuffled")  # arms that tell the teacher's knowledge from what else could help


@dataclass
class Student:
    """A network with the loss that it learns from. Its results do not depend on who else is in the cohort."""

    model: nn.Module
    name: str
    seed: int
    arm: str = "alone"
    loss: object = label_loss  # called with (student_logits [B, C], teacher_logits [B, C] or None, targets [B])
    lr: float | None = None  # its peak learning rate, if it is not that of the cohort
    history: History = field(default_factory=History)
    stopped: str = ""  # why it did not train to the end, if it did not


def make_students(num_classes: int, seeds, arm: str = "alone", loss=label_loss, architectures=None) -> list[Student]:
    """One student per architecture and seed. The seed fixes the initial weights, whatever the arm."""
    cohort = []
    for name, architecture in (architectures or STUDENTS).items():
        for seed in seeds:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                cohort.append(Student(architecture(num_classes), name, seed, arm, loss))
    return cohort


def make_cohort(num_classes: int, profile: Profile, losses: dict[str, object]) -> list[Student]:
    """Students of all architectures, seeds and losses {arm: loss}; control arms only if the profile has them."""
    arms = [arm for arm in losses if profile.controls or arm not in CONTROLS]
    return [student for arm in arms for student in make_students(num_classes, profile.seeds, arm, losses[arm])]


def one_cycle(step: int, total: int, warm_up: float = 0.3) -> float:
    """The share of the peak learning rate at a step: a cosine from 1/25 up to 1, then down to 0 (Smith & Topin, 2018)."""
    peak = warm_up * total
    if step < peak:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / peak)) / 2
    return (1 + math.cos(math.pi * (step - peak) / (total - peak))) / 2


def fit(students: list[Student], train: Split, val: Split, *, epochs: int, batch_size: int, lr: float, weight_decay: float,
        teacher: nn.Module | None = None, body_lr: float | None = None, stream_seed: int = 0, min_crop: float = 0.35) -> list[Student]:  # fmt: skip
    """Trains every student of a cohort on the same batches, with AdamW and a one-cycle schedule, and fills their histories.

    `lr` is the peak learning rate of students that have none of their own; with `body_lr`, all parameters outside the model's `fc`
    layer peak there instead. `teacher` must be frozen (see `freeze`); it reads each batch once, for all students. Deterministic on a
    CPU. Inside `Run.stage`, an interrupted call continues where it was. Raises ValueError for a teacher that could change, classes
    that differ or labels out of range, FloatingPointError once no student has a finite loss, and MemoryError with advice.
    """
    _check_cohort(students, train, val, teacher)
    device, stream = train.images.device, BatchStream(train, batch_size, stream_seed, min_crop)
    for model in [student.model for student in students] + ([teacher] if teacher is not None else []):
        model.to(device, memory_format=torch.channels_last)
    for student in students:
        _check_outputs(student, normalise(train.images[:1]), len(train.classes))
        student.model.classes = train.classes  # by which `fit` knows a teacher's classes
    total = epochs * stream.steps
    steppers = [_Stepper(student, student.lr or lr, weight_decay, body_lr, total) for student in students]
    settings = dict(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, body_lr=body_lr, stream_seed=stream_seed,
                    min_crop=min_crop)  # fmt: skip
    recovery = _Recovery(steppers, total, partial(_fingerprint, students, teacher, train, val, settings))
    with recovery, torch.random.fork_rng(), _memory_advice(stream), _training_bar(stream, epochs, recovery.done) as bar:
        for epoch in range(recovery.done // stream.steps, epochs):
            start, first = time.perf_counter(), recovery.done % stream.steps
            for step, (images, targets) in enumerate(stream.epoch(epoch, first), first + 1):
                with torch.no_grad(), _autocast(device):
                    teacher_logits = teacher(images) if teacher is not None else None
                for stepper in recovery.running():
                    stepper.step(images, teacher_logits, targets)
                if step % 20 == 0 or step == stream.steps:  # reading the losses waits for the device, so not at every step
                    bar.set_postfix_str(f"loss {recovery.read_losses():.3f}", refresh=False)
                bar.update(len(targets))
                if step < stream.steps:
                    recovery.after_step()
            for stepper in recovery.running():
                stepper.end_epoch(stream.steps * stream.batch_size, val)
            bar.write(_log_line(students, epoch, epochs, time.perf_counter() - start), file=sys.stdout)
            recovery.after_step(end_of_epoch=True)
    return students


def _check_cohort(students: list[Student], train: Split, val: Split, teacher: nn.Module | None) -> None:
    if teacher is not None and (teacher.training or any(parameter.requires_grad for parameter in teacher.parameters())):
        raise ValueError("the teacher could change while the students train: pass freeze(teacher)")
    for split in (train, val):
        check_targets(split.targets, len(train.classes))
    # Equal numbers of classes in another order would train without complaint, and on garbage.
    for who, owner in [("val", val), ("the teacher", teacher), *((student.name, student.model) for student in students)]:
        if (classes := getattr(owner, "classes", train.classes)) != train.classes:
            raise ValueError(f"{who} has the classes {', '.join(classes)}, but train has {', '.join(train.classes)}, in this order")


@torch.no_grad()
def _check_outputs(student: Student, image: Tensor, num_classes: int) -> None:
    outputs = student.model.eval()(image).shape[1]
    if outputs != num_classes:
        raise ValueError(f"{student.name} has {outputs} outputs for {num_classes} classes: build it with num_classes={num_classes}")


class _Stepper:
    """What one student needs for its steps: optimiser, schedule, gradient scaler and running totals."""

    def __init__(self, student: Student, lr: float, weight_decay: float, body_lr: float | None, total_steps: int):
        self.student, self.total_steps, self.steps_done = student, total_steps, 0
        head = [p for name, p in student.model.named_parameters() if body_lr is None or name.startswith("fc.")]
        body = [p for name, p in student.model.named_parameters() if body_lr is not None and not name.startswith("fc.")]
        if not head:
            raise ValueError(f"{student.name} has no layer called fc to be its head, which fine-tuning needs")
        groups = [{"params": head, "peak": lr}] + ([{"params": body, "peak": body_lr}] if body else [])
        self.device = head[0].device
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=choose_precision(self.device) is torch.float16)
        self.totals = torch.zeros(2, device=self.device)  # sums of loss and of correct answers, read once an epoch
        self.recent_losses: list[Tensor] = []  # on the device, until `_Recovery.read_losses`

    def step(self, images: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * one_cycle(self.steps_done, self.total_steps)
        torch.manual_seed(self.student.seed * 1_000_003 + self.steps_done)  # paired students drop the same units
        self.student.model.train()
        with _autocast(self.device):
            logits = self.student.model(images)
        loss = self.student.loss(logits, teacher_logits, targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.recent_losses.append(loss.detach())
        self.totals += torch.stack([loss.detach() * len(targets), (logits.argmax(1) == targets).sum()])
        self.steps_done += 1

    def end_epoch(self, images_seen: int, val: Split) -> None:
        train_loss, train_accuracy = (self.totals / images_seen).tolist()
        self.totals.zero_()
        scores, history = metrics(predict(self.student.model, val), val.targets), self.student.history
        for values, value in zip(vars(history).values(), (train_loss, train_accuracy, scores["nll"], scores["accuracy"]), strict=True):
            values.append(value)

    def state(self, finished: bool) -> dict:
        result = {"model": self.student.model.state_dict(), "history": asdict(self.student.history), "stopped": self.student.stopped}
        if not finished:
            result |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            result |= {"totals": self.totals, "steps_done": self.steps_done}
        return result

    def load_state(self, state: dict) -> None:
        self.student.model.load_state_dict(state["model"])
        self.student.history, self.student.stopped = History(**state["history"]), state["stopped"]
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.totals.copy_(state["totals"])
            self.steps_done = state["steps_done"]


def _training_bar(stream: BatchStream, epochs: int, steps_done: int):
    images, done = (steps * stream.batch_size for steps in (epochs * stream.steps, steps_done))
    return tqdm(total=images, initial=done, unit=" images", unit_scale=True, disable=images == done)


def _log_line(students: list[Student], epoch: int, epochs: int, seconds: float) -> str:
    """Means over seeds, for each kind of student; accuracies only where there are several arms."""
    kinds: dict[tuple, list] = {}
    for student in students:
        if not student.stopped:
            kinds.setdefault((student.name, student.arm), []).append([values[-1] for values in astuple(student.history)])
    several, line = len({arm for _, arm in kinds}) > 1, f"{epoch + 1}/{epochs}"
    for (name, arm), last in kinds.items():
        loss, train, _, val = np.mean(last, axis=0)
        line += f" │ {name} {arm} {val:.1%}" if several else f" │ {name} loss {loss:.3f} train {train:.1%} val {val:.1%}"
    return line + (" on val" if several else "") + f" │ {seconds:.0f} s"


def fine_tune(teacher: nn.Module, train: Split, val: Split, *, epochs: int, batch_size: int, lr: float = 1e-3) -> Student:
    """Fine-tunes a pretrained teacher, a cohort of one whose body learns ten times slower than its new head, and freezes it."""
    cohort = [Student(teacher, "ResNet-50", seed=0, arm="teacher")]
    fit(cohort, train, val, epochs=epochs, batch_size=batch_size, lr=lr, body_lr=lr / 10, weight_decay=0.01)
    freeze(teacher)
    return cohort[0]


def search(run: Run, train: Split, training: dict, temperature: float, alpha: float,
           temperatures=(1.0, 2.0, 4.0), alphas=(0.5, 0.9), seed: int = 100) -> list[dict]:  # fmt: skip
    """Tries the profile's VARIATIONS of `training`, for students alone and distilled alike, and a grid of temperatures and alphas.

    Everybody, the teacher included, trains on nine tenths of `train` and is scored on the rest, so neither `val` nor the report's
    seeds inform a choice. Writes `<run.folder>/search.json`, one row per trial: student, arm, variation, temperature, alpha, accuracy.
    """
    rest, selection = selection_split(train)
    teacher = build_teacher(len(train.classes), run.teacher_weights)
    fine_tune(teacher, rest, selection, epochs=run.profile.teacher_epochs, batch_size=training["batch_size"])
    base = {"temperature": temperature, "alpha": alpha}
    grid = [{"temperature": t, "alpha": a} for t in temperatures for a in alphas if (t, a) != (temperature, alpha)]
    cohorts: dict[tuple, list[tuple[Student, dict]]] = {}  # by what the stream decides: students that can share it
    for variation in run.profile.search:
        change = VARIATIONS[variation]
        key = max(1, round(training["epochs"] * change.get("epochs", 1))), change.get("min_crop", 0.35)
        for settings in [{}, base] + (grid if not change else []):
            loss, arm = (partial(distillation_loss, **settings), "distilled") if settings else (label_loss, "alone")
            for student in make_students(len(train.classes), [seed], arm, loss, _vary(change)):
                student.lr = training["lr"] * change.get("lr", 1)
                cohorts.setdefault(key, []).append((student, {"variation": variation, **settings}))
    rows = []
    for (epochs, min_crop), trials in cohorts.items():
        fit([student for student, _ in trials], rest, selection, teacher=teacher, **{**training, "epochs": epochs, "min_crop": min_crop})
        rows += [{"student": s.name, "arm": s.arm, **what, "accuracy": s.history.val_accuracy[-1]} for s, what in trials if not s.stopped]
    _write_json(run.folder / "search.json", {"around": {**training, **base}, "seed": seed, "images": len(selection), "trials": rows})
    return rows


def _vary(change: dict) -> dict:
    """The architectures that a variation applies to; LeNet-5 has no dropout."""
    return {"Custom CNN": partial(CustomCNN, dropout=change["dropout"])} if "dropout" in change else STUDENTS


# ── Metrics and statistics ───────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def predict(model: nn.Module, split: Split, batch_size: int = 256) -> Tensor:
    """Logits [N, C] float32, on the CPU, of the un-augmented images; leaves the model in evaluation mode."""
    model.eval()
    device = split.images.device
    with _autocast(device):
        return torch.cat([model(normalise(images)).float() for images in split.images.split(batch_size)]).cpu()


def metrics(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Accuracy (0 … 1), negative log-likelihood (nats) and expected calibration error of logits [N, C] for targets [N]."""
    targets = targets.cpu()
    return {
        "accuracy": (logits.argmax(1) == targets).double().mean().item(),
        "nll": F.cross_entropy(logits, targets).item(),
        "ece": expected_calibration_error(logits, targets),
    }


def reliability(logits: Tensor, targets: Tensor, bins: int = 15) -> Tensor:
    """Counts, right answers and summed confidence by equal-width bin of confidence, [bins, 3] float64 (Guo et al., 2017, section 2)."""
    confidence, predicted = logits.double().softmax(1).max(1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    values = torch.stack([torch.ones_like(confidence), (predicted == targets.cpu()).double(), confidence], dim=1)
    return torch.zeros(bins, 3, dtype=torch.double).index_add_(0, bin_of, values)


def expected_calibration_error(logits: Tensor, targets: Tensor, bins: int = 15) -> float:
    """The mean gap between confidence and accuracy over bins of confidence (Guo et al., 2017, section 2)."""
    _, right, confidence = reliability(logits, targets, bins).unbind(1)
    return (right - confidence).abs().sum().item() / len(targets)


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature, of 400 between 0.1 and 10, at which logits [N, C] / T have the lowest NLL (Guo et al., 2017, section 4.2)."""
    temperatures, targets = torch.logspace(-1, 1, 400), targets.cpu()
    return min(temperatures.tolist(), key=lambda temperature: F.cross_entropy(logits / temperature, targets).item())


def confusion_matrix(logits: Tensor, targets: Tensor) -> Tensor:
    """Counts [C, C] int64: rows are true classes, columns predicted ones."""
    num_classes = logits.shape[1]
    return torch.bincount(targets.cpu() * num_classes + logits.argmax(1), minlength=num_classes**2).view(num_classes, num_classes)


def agreement(logits: Tensor, other_logits: Tensor) -> float:
    """The share of images for which two models give the same answer."""
    return (logits.argmax(1) == other_logits.argmax(1)).double().mean().item()


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution, by integrating its density from 0."""
    x, width = np.linspace(0, 13, 130_001, retstep=True)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    density = np.exp(log_scale - (degrees + 1) / 2 * np.log1p(x**2 / degrees))
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * width)])
    return float(np.interp(0.475, area, x))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its standard deviation and 95 % t-interval, which is nan where the seeds do not differ."""

    mean: float
    sd: float
    low: float
    high: float
    n: int


def interval(values) -> Interval:
    """The mean of `values` and its 95 % t-interval. For a paired comparison, pass the differences."""
    values = np.asarray(list(values), dtype=float)
    sd = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    half = t_quantile(len(values) - 1) * sd / math.sqrt(len(values)) if sd > 1e-9 else math.nan
    return Interval(float(values.mean()), sd, float(values.mean() - half), float(values.mean() + half), len(values))


def verdict(gain: Interval) -> str:
    """"helps", "hurts", or "inconclusive" where the interval contains zero or there is none."""
    return "helps" if gain.low > 0 else "hurts" if gain.high < 0 else "inconclusive"


# ── Runs: what was trained, on record ────────────────────────────────────────────────────────────────────────────────────────────


class Run:
    """One study of one dataset: its profile, its folders, and the JSON file that each experiment leaves for the report.

    Every choice has a default for the hardware and an environment variable: KD_PROFILE, KD_DATA_DIR, KD_RUNS_DIR,
    KD_TEACHER_WEIGHTS (see `build_teacher`). Raises ValueError for an unknown dataset or profile.
    """

    def __init__(self, dataset: str, profile: str | None = None):
        _info(dataset)
        self.profile = choose_profile(profile)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dataset = "demo" if self.profile.name == "demo" else dataset
        self.data_dir = Path(os.environ.get("KD_DATA_DIR", "data"))
        self.folder = Path(os.environ.get("KD_RUNS_DIR", "runs")) / dataset / self.profile.name
        self.teacher_weights = None if self.dataset == "demo" else os.environ.get("KD_TEACHER_WEIGHTS", "IMAGENET1K_V1")
        _find_weights(self.teacher_weights)  # a wrong name is better known now than after Experiment 1
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str):
        """Measures the wall time of a stage, for the record, and lets each `fit` inside it continue after an interruption."""
        stage = _Stage(name, self.folder / "checkpoints")
        token, start = _current_stage.set(stage), time.perf_counter()
        try:
            yield
        finally:
            _current_stage.reset(token)
        self.seconds[name] = round(time.perf_counter() - start + stage.earlier_seconds, 1)
        print(f"{name}: {self.seconds[name] / 60:.1f} minutes")

    def describe(self) -> dict[str, str]:
        """What runs here: dataset, profile, device, precision and versions."""
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        return {
            "dataset": self.dataset,
            "profile": self.profile.name,
            "device": f"{device}, {str(choose_precision(self.device)).removeprefix('torch.')}",
            "versions": f"Python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__}",
        }

    def save(self, experiment: str, students: list[Student], val: Split, training: dict,
             teacher: nn.Module | None = None, selection: Split | None = None, **distillation) -> None:  # fmt: skip
        """Scores an experiment's students (and teacher) on `val` after their last epoch and writes `<folder>/<experiment>.json`.

        With `selection`, each student is also scored after its logits are divided by one temperature that was fitted there.
        """
        models = {student.name: student.model for student in students}
        other = {"experiment1": "Experiment 2", "experiment2": "Experiment 1"}[experiment]  # whose time is not ours
        size, teacher_logits = self.profile.image_size, None
        if teacher is not None:
            models["ResNet-50"], teacher_logits = teacher, predict(teacher, val)
            distillation = {**distillation, "teacher epochs": self.profile.teacher_epochs, **describe_weights(self.teacher_weights)}
        record = {
            "ran on": self.describe(),
            "settings": {"image size": size, "seeds": self.profile.seeds, "validation images": len(val), **training},
            "distillation": distillation,
            "students": [
                {"name": s.name, "arm": s.arm, "seed": s.seed, "history": asdict(s.history), **_score(s.model, val, teacher_logits, selection)}
                for s in students
                if not s.stopped
            ],
            "stopped": [s.stopped for s in students if s.stopped],
            "teacher": score(teacher_logits, val) if teacher is not None else None,
            "costs": {name: cost(model, size, self.device) for name, model in models.items()},
            "minutes": {stage: round(seconds / 60, 1) for stage, seconds in self.seconds.items() if other not in stage},
        }
        _write_json(self.folder / f"{experiment}.json", record)

    def load(self, experiment: str) -> dict | None:
        """What `save` (or `search`) wrote, or None if that experiment has not been run with this profile."""
        path = self.folder / f"{experiment}.json"
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError as error:
            _set_aside(path, f"not a readable record ({error})")


def _score(model: nn.Module, val: Split, teacher_logits: Tensor | None, selection: Split | None) -> dict:
    logits = predict(model, val)
    result = score(logits, val, teacher_logits)
    if selection is not None:
        temperature = fit_temperature(predict(model, selection), selection.targets)
        fitted = metrics(logits / temperature, val.targets)
        result |= {"temperature": temperature, "fitted_nll": fitted["nll"], "fitted_ece": fitted["ece"]}
    return result


def score(logits: Tensor, split: Split, teacher_logits: Tensor | None = None) -> dict:
    """All metrics of one model's logits [N, C]; a metric that does not apply is None."""
    unseen, correct = split.never_seen, logits.argmax(1) == split.targets.cpu()
    return {
        **metrics(logits, split.targets),
        "never_seen_accuracy": correct[unseen].double().mean().item() if unseen.any() else None,
        "never_seen_images": int(unseen.sum()),
        "agreement": agreement(logits, teacher_logits) if teacher_logits is not None else None,
        "predicted": logits.argmax(1).tolist(),
        "confusion": confusion_matrix(logits, split.targets).tolist(),
        "reliability": reliability(logits, split.targets).tolist(),
    }


def cost(model: nn.Module, size: int, device: torch.device, timed: bool = True) -> dict[str, float]:
    """Parameters, multiply-adds per image, bytes on disk; if `timed`, milliseconds for one image and images/s in batches of 64."""
    single, batch = (torch.zeros(count, 3, size, size, device=device).to(memory_format=torch.channels_last) for count in (1, 64))
    model = model.to(device).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(single)
    torch.save(model.state_dict(), buffer := io.BytesIO())
    result = {"parameters": count_parameters(model), "multiply_adds": counter.get_total_flops() // 2, "bytes": buffer.tell()}
    if timed:
        result["latency_ms"] = 1000 * _median_seconds(model, single, repeats=50)
        result["images_per_second"] = 64 / _median_seconds(model, batch, repeats=10)
    return result


@torch.inference_mode()
def _median_seconds(model: nn.Module, images: Tensor, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 2):  # two to warm up
        start = time.perf_counter()
        with _autocast(images.device):
            model(images)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:]))


# ── Report: tables, sentences and figures, made from the records alone ───────────────────────────────────────────────────────────

COLOURS = {"alone": "#5b7a9d", "distilled": "#d1782f", "teacher": "#4d8b57", "smoothed": "#8a6fb0", "arg-max": "#b0a03c", "shuffled": "#b05c6e"}


def _table(header: list[str], rows: list[list], align: str = "--:") -> str:
    lines = [header, ["---"] + [align] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)


def _percent(values: Interval, sign: str = "") -> str:
    low, high = (values.low, values.high) if sign else (max(values.low, 0), min(values.high, 1))  # an accuracy stays in 0 … 1
    mean, low, high = (f"{round(100 * value, 1) + 0.0:{sign}.1f}" for value in (values.mean, low, high))  # + 0.0: no "-0.0"
    return f"{mean} [no interval]" if math.isnan(values.low) else f"{mean} [{low}, {high}]"


def accuracy_table(run: Run, experiment: str) -> str:
    """One experiment's scores on `val`: means over seeds, the accuracy with its 95 % t-interval."""
    record = run.load(experiment)
    several = len({s["arm"] for s in record["students"]}) > 1
    groups: dict[str, list] = {}
    for s in record["students"]:
        groups.setdefault(f"{s['name']}, {s['arm']}" if several else s["name"], []).append(s)
    if record["teacher"]:
        groups["ResNet-50, the teacher"] = [record["teacher"]]
    columns = {"NLL": ("nll", "{:.3f}"), "ECE": ("ece", "{:.3f}"), "agrees with the teacher on %": ("agreement", "{:.1%}")}
    columns = {f"% on {record['students'][0]['never_seen_images']} never-seen images": ("never_seen_accuracy", "{:.1%}"), **columns}
    if not record["teacher"]:
        columns.popitem()  # nobody to agree with
    rows = []
    for name, members in groups.items():
        means = [_mean(members, key, form) for key, form in columns.values()]
        accuracy = interval(member["accuracy"] for member in members)
        rows.append([name, _percent(accuracy) if len(members) > 1 else f"{100 * accuracy.mean:.1f}", *means, len(members)])
    return _table(["network", "accuracy % [95 % interval]", *columns, "seeds"], rows)


def _mean(members: list[dict], key: str, form: str) -> str:
    return "—" if members[0][key] is None else form.format(np.mean([member[key] for member in members])).rstrip("%")


def cost_table(costs: dict[str, dict]) -> str:
    """Costs by network (see `cost`) as Markdown."""
    columns = {
        "parameters": lambda c: f"{c['parameters']:,}",
        "multiply-adds per image": lambda c: f"{c['multiply_adds'] / 1e6:,.1f} M",
        "size on disk": lambda c: f"{c['bytes'] / 1e6:.2f} MB",
    }
    if all("latency_ms" in c for c in costs.values()):
        columns["latency of one image"] = lambda c: f"{c['latency_ms']:.1f} ms"
        columns["images/s in batches of 64"] = lambda c: f"{c['images_per_second']:,.0f}"
    return _table(["network", *columns], [[name, *(show(c) for show in columns.values())] for name, c in costs.items()])


def results(run: Run) -> dict[str, dict[str, dict[int, dict]]]:
    """{student: {arm: {seed: its record}}} from both experiments; raises ValueError if they ran with different settings."""
    first, second = run.load("experiment1"), run.load("experiment2")
    if first and second:
        one, two = ({**record["ran on"], **record["settings"]} for record in (first, second))
        differing = [f"{key}: {one.get(key)} / {two.get(key)}" for key in one | two if one.get(key) != two.get(key)]
        if differing:
            raise ValueError(f"Experiments 1 and 2 do not compare, run them again alike ({'; '.join(differing)})")
    found: dict = {}
    for record in filter(None, (first, second)):
        for student in record["students"]:
            if second:  # Experiment 1 has no teacher to be compared with
                student["agreement"] = float(np.mean(np.equal(student["predicted"], second["teacher"]["predicted"])))
                student["likeness"] = confusion_likeness(student["confusion"], second["teacher"]["confusion"])
            found.setdefault(student["name"], {}).setdefault(student["arm"], {})[student["seed"]] = student
    return found


def differences(arms: dict, arm: str = "distilled", other: str = "alone", key: str = "accuracy") -> dict[int, float]:
    """{seed: value with `arm` − value with `other`} for the seeds that both have: paired, so that what they share cancels."""
    one, two = arms.get(arm, {}), arms.get(other, {})
    return {seed: one[seed][key] - two[seed][key] for seed in sorted(one.keys() & two.keys())}


def _values(members: dict[int, dict], key: str = "accuracy") -> Interval:
    return interval(member[key] for member in members.values())


def report_table(run: Run) -> str:
    """The result in one table; says what is missing if an experiment has not been run."""
    rows = []
    for name, arms in results(run).items():
        alone, distilled = (_percent(_values(arms[arm])) if arm in arms else "not run" for arm in ("alone", "distilled"))
        gains = list(differences(arms).values())
        won = f"{sum(gain > 0 for gain in gains)} of {len(gains)}" if gains else "—"
        rows.append([name, alone, distilled, _percent(interval(gains), "+") if gains else "—", won])
    missing = [key.replace("experiment", "Experiment ") for key in ("experiment1", "experiment2") if run.load(key) is None]
    note = f"\n\n**{' and '.join(missing)}: not run yet with profile `{run.profile.name}`.** Run its cells, then this report again."
    return _table(["student", "alone %", "distilled %", "gain [95 % interval]", "seeds won"], rows) + (note if missing else "")


REASONS = {
    "helps": "The whole 95 % interval lies above zero.",
    "hurts": "The whole 95 % interval lies below zero.",
    "inconclusive": "The 95 % interval contains zero, so this run cannot tell the change from chance; more seeds would narrow it.",
}


def report_verdict(run: Run) -> str:
    """The verdict on each student, decided by the interval of its paired gains, with its reason and what the controls say."""
    lines = []
    for name, arms in results(run).items():
        if not (gains := differences(arms)):
            lines.append(f"- **{name}: no verdict.** A gain needs both experiments.")
            continue
        gain, wins = interval(gains.values()), sum(value > 0 for value in gains.values())
        spread = f" (standard deviation {100 * gain.sd:.1f})" if gain.n > 1 else ""
        lines.append(
            f"- **{name}: {verdict(gain)}.** Distillation changed its accuracy by {_points(gain)} on average{spread}; "
            f"it was better with {wins} of {gain.n} seeds. "
            + ("Seeds that do not differ give no interval." if math.isnan(gain.low) else REASONS[verdict(gain)])
            + _judge_controls(arms)
        )
    for record in filter(None, (run.load("experiment1"), run.load("experiment2"))):
        lines += [f"- **Left out:** {sentence}." for sentence in record["stopped"]]
    return "\n".join(lines) or "- No experiment has been run yet."


def _points(gain: Interval) -> str:
    return f"{round(100 * gain.mean, 1) + 0.0:+.1f} points"


def _judge_controls(arms: dict) -> str:
    """Was it the teacher's knowledge? Only if distillation helps, and beats every control, does the answer read yes."""
    leads = {arm: interval(differences(arms, other=arm).values()) for arm in CONTROLS if differences(arms, other=arm)}
    if not leads:
        return ""
    helped = verdict(interval(differences(arms).values())) == "helps"
    found = ", ".join(f"{verdict_word(lead)} {arm}" for arm, lead in leads.items())
    if helped and [verdict(lead) for lead in leads.values()] == ["helps"] * len(CONTROLS):
        return f" Was it the teacher's knowledge of the single image? Yes, as far as the controls can tell: distilled was {found}."
    return f" Was it the teacher's knowledge of the single image? Not shown: distilled was {found}{'' if helped else ', and no gain over alone is established'}."


def controls_table(run: Run) -> str:
    """Each arm's gain over `alone` and the lead of `distilled` over it, both paired by seed with 95 % intervals."""
    rows = []
    for name, arms in results(run).items():
        for arm in (*CONTROLS, "distilled"):
            gains, leads = differences(arms, arm), differences(arms, other=arm)
            if arm not in arms or not (gains or leads):
                continue
            lead = [_percent(interval(leads.values()), "+"), verdict_word(interval(leads.values())) + " it"] if leads and arm != "distilled" else ["—", "—"]
            rows.append([name, arm, _percent(_values(arms[arm])), _percent(interval(gains.values()), "+") if gains else "—", *lead])
    if not any(row[1] in CONTROLS for row in rows):
        return f"No controls here: profile `{run.profile.name}` leaves them out; `study` and `full` train them."
    return _table(["student", "arm", "accuracy %", "gain over alone", "lead of distilled over it", "distilled is"], rows)


def verdict_word(lead: Interval) -> str:
    """A verdict on a lead over another arm, in words for a table."""
    return {"helps": "better than", "hurts": "worse than", "inconclusive": "not told apart from"}[verdict(lead)]


def _compare_arms(run: Run, columns: dict[str, str], note: str) -> str:
    """Means of what the records hold under `columns` {key: header}, alone and distilled, and the paired difference with its interval."""
    rows = []
    for name, arms in results(run).items():
        known = [arm for arm in ("alone", "distilled") if all(columns.keys() <= member.keys() for member in arms.get(arm, {}).values())]
        rows += [[name, arm, *(f"{_values(arms[arm], key).mean:.3f}" for key in columns)] for arm in known if arm in arms]
        if differences(arms):
            rows.append([name, "difference", *(_signed(interval(differences(arms, key=key).values())) for key in columns)])
    return _table(["student", "", *columns.values()], rows) if rows else note


def calibration_table(run: Run) -> str:
    """NLL and ECE on `val`, as they are and after division of the logits by one temperature (see `Run.save`)."""
    columns = {"nll": "NLL", "ece": "ECE", "temperature": "temperature", "fitted_nll": "NLL with it", "fitted_ece": "ECE with it"}
    return _compare_arms(run, columns, "Nothing to compare yet.")


def likeness_table(run: Run) -> str:
    """How like the teacher the students are, and how accurate on the images that it has never seen."""
    if not (record := run.load("experiment2")):
        return "How like the teacher the students have become: this needs Experiment 2."
    teacher = record["teacher"]
    columns = {"agreement": "same answer as the teacher", "likeness": "correlation of confusions", "accuracy": "accuracy"}
    if teacher["never_seen_accuracy"] is not None:
        columns["never_seen_accuracy"] = f"accuracy on {teacher['never_seen_images']} never-seen images"
    row = ["ResNet-50", "teacher", "—", "—", *(f"{teacher[key]:.3f}" for key in columns if "accuracy" in key)]
    return _compare_arms(run, columns, "") + "\n" + "| " + " | ".join(row) + " |"


def _signed(values: Interval) -> str:
    return f"{values.mean:+.3f}" + ("" if math.isnan(values.low) else f" [{values.low:+.3f}, {values.high:+.3f}]")


def confusion_likeness(confusion, teacher_confusion) -> float:
    """The correlation of two networks' rates of confusing class i with class j, over all i ≠ j; nan where one confuses nothing."""
    rates = [matrix / matrix.sum(1, keepdims=True).clip(1) for matrix in (np.asarray(confusion, float), np.asarray(teacher_confusion, float))]
    one, two = (rate[~np.eye(len(rate), dtype=bool)] for rate in rates)
    return float(np.corrcoef(one, two)[0, 1]) if one.std() and two.std() else math.nan


def report_confusions(run: Run) -> str:
    """Which classes the teacher mixes up most, and whether distilled students err like it more than students alone do."""
    if not (record := run.load("experiment2")) or not run.load("experiment1"):
        return "What the students learned of the teacher's confusions: this needs both experiments."
    names, confusion = list(_info(run.dataset).classes.values()), np.array(record["teacher"]["confusion"])
    wrong = confusion - np.diag(confusion.diagonal())
    pairs = sorted(np.ndindex(wrong.shape), key=lambda pair: -wrong[pair])[:3]
    told = "; ".join(f"{names[i]} taken for {names[j]} ({wrong[i, j]} of {confusion[i].sum()})" for i, j in pairs)
    lines = [f"- The teacher's most frequent confusions: {told}."]
    words = {"helps": "errs more like the teacher", "hurts": "errs less like the teacher", "inconclusive": "may err more or less like the teacher, for the interval contains zero"}
    for name, arms in results(run).items():
        if differences(arms):
            lines.append(f"- **{name}**: distilled, it {words[verdict(interval(differences(arms, key='likeness').values()))]}.")
    return "\n".join(lines)


# The notebook that these succeed (Imagenette at 160 px, one seed, 30 epochs, cross-entropy with the teacher's arg max): % alone, distilled.
PREDECESSOR = {"Custom CNN": (84.3, 84.5), "LeNet-5": (72.2, 71.1)}


def predecessor_table(run: Run) -> str:
    """Next to the figures of the notebook that this one succeeds, with what keeps the two apart."""
    if run.dataset != "imagenette2-160":
        return "The notebook before this one used Imagenette, so there is nothing to compare with here."
    rows = []
    for name, arms in results(run).items():
        if name in PREDECESSOR:
            ours = [_percent(_values(arms[arm])) if arm in arms else "not run" for arm in ("alone", "distilled")]
            rows.append([name, *PREDECESSOR[name], f"{PREDECESSOR[name][1] - PREDECESSOR[name][0]:+.1f}", *ours])
    profile = run.profile
    note = "comparable in image size" if profile.image_size == 160 else f"not comparable: {profile.image_size} px instead of 160"
    return _table(["student", "before, alone %", "before, distilled %", "difference", "here, alone %", "here, distilled %"], rows) + (
        f"\n\nIts one seed and 30 epochs give no interval; the sampling error of one accuracy alone is ±1.1 to ±1.4 points (95 %). What it called distilled is the arm arg-max. This run: {note}, "
        f"{profile.epochs} epochs, {len(profile.seeds)} seeds, and other layers in the custom CNN."
    )


def search_table(run: Run) -> str:
    """The variations that a search tried, for students alone and distilled with the same temperature and alpha."""
    if not (record := run.load("search")):
        why = "the settings are those chosen on Imagewoof" if run.profile.search else f"profile `{run.profile.name}` leaves it out"
        return f"No search here: {why}."
    around, rows = record["around"], []
    for name, variation in dict.fromkeys((trial["student"], trial["variation"]) for trial in record["trials"]):
        here = [t for t in record["trials"] if (t["student"], t["variation"]) == (name, variation)]
        alone = [t["accuracy"] for t in here if t["arm"] == "alone"]
        distilled = [t["accuracy"] for t in here if all(t.get(key) == around[key] for key in ("temperature", "alpha"))]
        rows.append([name, variation, *(f"{100 * values[0]:.1f}" if values else "stopped" for values in (alone, distilled))])
    told = ", ".join(f"{key} {value}" for key, value in around.items())
    return _table(["student", "variation", "alone %", "distilled %"], sorted(rows)) + f"\n\nAround {told}; one seed, {record['seed']}; % on `selection`, whose {record['images']} images give an accuracy a standard error of up to {50 / math.sqrt(record['images']):.1f} points."


def provenance_table(run: Run) -> str:
    """What produced the numbers: settings, device, versions, teacher weights, minutes per stage."""
    records = {f"Experiment {key[-1]}": record for key in ("experiment1", "experiment2") if (record := run.load(key))}
    columns = []
    for record in records.values():
        minutes = {f"minutes: {stage}": value for stage, value in record["minutes"].items()}
        columns.append({**record["ran on"], **record["settings"], **record["distillation"], **minutes})
    keys = list(dict.fromkeys(key for column in columns for key in column))
    return _table(["", *records], [[key, *(column.get(key, "—") for column in columns)] for key in keys], align=":--")


def plot_images(images: Tensor, titles: list[str], columns: int = 10, normalised: bool = False) -> None:
    """Draws images [N, 3, S, S] (uint8, or float32 from a BatchStream) in a grid with a title above each."""
    if normalised:
        images = images.cpu() * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    rows = math.ceil(len(images) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.35 * columns, 1.7 * rows), dpi=72, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles):
        axis.imshow(image.permute(1, 2, 0).cpu().clamp(0, 1 if normalised else 255))
        axis.set_title(title.replace(" ", "\n", 1), fontsize=10)
    plt.show()


def plot_curves(students: list[Student]) -> None:
    """Training and validation accuracy by epoch, one line per seed, one panel per kind of student and arm."""
    names, arms = (list(dict.fromkeys(getattr(student, what) for student in students)) for what in ("name", "arm"))
    size = (4.6 * len(names), 3.2 * len(arms))
    figure, axes = plt.subplots(len(arms), len(names), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for axis, (arm, name) in zip(axes.flat, product(arms, names)):
        for student, marker in zip((s for s in students if (s.name, s.arm) == (name, arm)), cycle("os^Dv")):
            history, look = student.history, dict(color=COLOURS[student.arm], marker=marker, markersize=4)
            epochs = range(1, len(history.val_accuracy) + 1)
            axis.plot(epochs, 100 * np.array(history.train_accuracy), ":", alpha=0.6, label=f"train, seed {student.seed}", **look)
            axis.plot(epochs, 100 * np.array(history.val_accuracy), "-", label=f"val, seed {student.seed}", **look)
        axis.set(title=f"{name}, {arm}", xlabel="epoch", ylabel="accuracy %", ylim=(0, 100))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    plt.show()


def plot_temperature(teacher: nn.Module, val: Split, temperatures=(1, 2, 4, 8)) -> None:
    """The teacher's answer to one image, softened: of its right answers, the one given with a confidence nearest to 90 %."""
    logits = predict(teacher, val)
    confidence = torch.where(logits.argmax(1) == val.targets.cpu(), logits.softmax(1).max(1).values, torch.inf)
    index = int((confidence - 0.9).abs().argmin())
    figure, axes = plt.subplots(1, 1 + len(temperatures), figsize=(13, 2.9), layout="constrained")
    axes[0].imshow(val.images[index].permute(1, 2, 0).cpu())
    axes[0].set_title(f"label: {val.classes[val.targets[index]]}\nteacher: {logits[index].softmax(0).max():.0%} sure", fontsize=10)
    axes[0].axis("off")
    for axis, temperature in zip(axes[1:], temperatures):
        bars = axis.barh(val.classes, (logits[index] / temperature).softmax(0), color=COLOURS["teacher"])
        axis.bar_label(bars, fmt="{:.1%}", fontsize=7, padding=2)
        axis.set(title=f"T = {temperature}", xlim=(0, 1.2), xticks=(0, 0.5, 1), xlabel="probability")
        axis.invert_yaxis()
        axis.tick_params(labelsize=8, labelleft=axis is axes[1])
    plt.show()


def plot_report(run: Run) -> None:
    """Left: each seed's accuracy alone and distilled, joined. Right: each arm's mean gain over `alone` with its 95 % interval."""
    if not (students := results(run)):
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    bars: list[tuple[str, str, np.ndarray]] = []  # student, arm, gains in points
    for place, (name, arms) in enumerate(students.items()):
        for offset, arm in ((-0.15, "alone"), (0.15, "distilled")):
            values = 100 * np.array([member["accuracy"] for member in arms.get(arm, {}).values()])
            left.plot(np.full(len(values), place + offset), values, "o", color=COLOURS[arm], label=None if place else arm)
        for seed in differences(arms):
            pair = 100 * np.array([arms[arm][seed]["accuracy"] for arm in ("alone", "distilled")])
            left.plot([place - 0.15, place + 0.15], pair, color="#999999", zorder=0)
        bars += [(name, arm, 100 * np.array(list(differences(arms, arm).values()))) for arm in (*CONTROLS, "distilled") if differences(arms, arm)]
    for height, (_, arm, gains) in enumerate(bars):
        gain = interval(gains)
        half = 0 if math.isnan(gain.low) else gain.high - gain.mean
        right.errorbar(gain.mean, height, xerr=half, fmt="o", color=COLOURS[arm], capsize=4)
        right.plot(gains, np.full(gain.n, height + 0.25), "|", color=COLOURS[arm])
    left.set(xticks=range(len(students)), xticklabels=students, ylabel="validation accuracy %", xlim=(-0.6, len(students) - 0.4))
    left.legend()
    right.axvline(0, color="black", linewidth=1)
    right.set(yticks=range(len(bars)), yticklabels=[f"{name}, {arm}" for name, arm, _ in bars], ylim=(max(len(bars), 1) - 0.5, -0.5))
    right.set_xlabel("accuracy gained over the student alone, points")
    right.set_title("dot: mean, bar: 95 % interval, ticks: seeds", fontsize=10)
    plt.show()


def plot_reliability(run: Run) -> None:
    """How often a student is right when it is so sure: below the diagonal it is over-confident. Bins of under 20 answers are left out."""
    if not (students := results(run)):
        return
    figure, axes = plt.subplots(1, len(students), figsize=(3.8 * len(students), 3.5), squeeze=False, layout="constrained")
    for axis, (name, arms) in zip(axes.flat, students.items()):
        axis.plot([0, 100], [0, 100], color="#999999", linewidth=1)
        for arm in (arm for arm in ("alone", "distilled") if arm in arms):
            count_, right, confidence = np.sum([member["reliability"] for member in arms[arm].values()], axis=0).T
            shown = count_ >= 20
            axis.plot(100 * confidence[shown] / count_[shown], 100 * right[shown] / count_[shown], "o-", color=COLOURS[arm], markersize=4, label=arm)
        axis.set(title=name, xlabel="confidence %", ylabel="right %", xlim=(0, 100), ylim=(0, 100), aspect="equal")
        axis.legend()
    plt.show()


def plot_classes(run: Run) -> None:
    """Left: the teacher's confusions, % of each true class. Others: what distillation changed by class, each seed and the mean."""
    students = {name: arms for name, arms in results(run).items() if differences(arms)}
    if not students:
        return
    names, confusion = list(_info(run.dataset).classes.values()), np.array(run.load("experiment2")["teacher"]["confusion"], float)
    figure, axes = plt.subplots(1, 1 + len(students), figsize=(6 + 2.6 * len(students), 4.2), layout="constrained", width_ratios=[2] + [1] * len(students))
    shares = 100 * confusion / confusion.sum(1, keepdims=True).clip(1)
    errors = np.where(np.eye(len(names)), np.nan, shares)
    axes[0].imshow(errors, cmap="Greens", aspect="auto")
    for row, column in np.ndindex(shares.shape):
        colour = "white" if errors[row, column] > 0.6 * np.nanmax(errors) else "black"
        axes[0].text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes[0].set(xticks=range(len(names)), yticks=range(len(names)), yticklabels=names, title="teacher: % of a true class (row) called …")
    axes[0].set_xticklabels(names, rotation=45, ha="right")
    for axis, (name, arms) in zip(axes[1:], students.items()):
        recalls = {arm: {seed: _recalls(member["confusion"]) for seed, member in arms[arm].items()} for arm in ("alone", "distilled")}
        gains = 100 * np.array([recalls["distilled"][seed] - recalls["alone"][seed] for seed in differences(arms)])  # [seeds, C]
        axis.barh(range(len(names)), gains.mean(0), color=COLOURS["distilled"], alpha=0.6)
        for gain in gains:
            axis.plot(gain, range(len(names)), "|", color="#333333")
        axis.axvline(0, color="black", linewidth=1)
        axis.set(ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)), yticklabels=[], xlabel="points")
        axis.set_title(f"{name}: gain by class", fontsize=10)
    axes[0].title.set_fontsize(10)
    axes[0].tick_params(labelsize=8)
    plt.show()


def _recalls(confusion) -> np.ndarray:
    confusion = np.asarray(confusion, float)
    return confusion.diagonal() / confusion.sum(1).clip(1)


def plot_search(run: Run) -> None:
    """Accuracy on the selection split by temperature and alpha, and in brackets what that is above the student alone."""
    if not (record := run.load("search")):
        return
    trials = [trial for trial in record["trials"] if trial["variation"] == "as chosen"]
    names = list(dict.fromkeys(trial["student"] for trial in trials))
    figure, axes = plt.subplots(1, len(names), figsize=(4.4 * len(names), 2.8), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names):
        level = {(t.get("alpha"), t.get("temperature")): 100 * t["accuracy"] for t in trials if t["student"] == name}
        alone = level.pop((None, None), math.nan)
        alphas, temperatures = (sorted({key[place] for key in level}) for place in (0, 1))
        change = np.array([[level.get((alpha, t), math.nan) - alone for t in temperatures] for alpha in alphas])
        bound = max(np.nanmax(np.abs(change)), 1) if np.isfinite(change).any() else 1
        axis.imshow(change, cmap="PuOr_r", vmin=-2 * bound, vmax=2 * bound, aspect="auto")  # white: as good as alone
        for row, column in np.ndindex(change.shape):
            axis.text(column, row, f"{alone + change[row, column]:.1f}\n({change[row, column]:+.1f})", ha="center", va="center")
        axis.set(xticks=range(len(temperatures)), xticklabels=temperatures, yticks=range(len(alphas)), yticklabels=alphas)
        axis.set(xlabel="temperature", ylabel="alpha", title=f"{name}, % on selection (alone: {alone:.1f})")
    plt.show()


# ── Recovery: what survives a broken download, a full disk or a lost session; nothing below is about distillation ────────────────

RETRY_WAITS = (1, 2, 4, 8, 16)  # seconds before the next try of a transfer that makes no progress
NETWORK_TIMEOUT = 60  # seconds without a byte
CHECKPOINT_SECONDS = 60  # at most, between two checkpoints
CHECKPOINTS_KEPT = 3  # per stage: the present settings' and the latest two of others


def _write_atomically(path: Path, write) -> None:
    """Lets `write(file)` fill a file beside `path`, brings it to the disk and renames it: `path` is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.part"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > 3600:
            left.unlink(missing_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with scratch.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _write_json(path: Path, content: dict) -> None:
    _write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def _save_if_possible(content: dict, path: Path) -> None:
    """Saves what could be computed again; a full or read-only disk costs that time, and not the run."""
    try:
        _write_atomically(path, partial(torch.save, content))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        print(f"{path} could not be written, so an interruption would repeat the work: {error}")


def _read_saved(path: Path, keys: set[str]) -> dict | None:
    """What `torch.save` wrote, or None; a damaged or foreign file is set aside."""
    if not path.exists():
        return None
    try:
        if (damaged := zipfile.ZipFile(path).testzip()) is not None:
            raise ValueError(f"its part {damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(content, dict) and keys <= content.keys()):
            raise ValueError("it holds something else")
        return content
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damage shows in many ways
        _set_aside(path, f"cannot be used ({error})")


def _set_aside(path: Path, why: str) -> None:
    """Renames a file or folder that cannot be used: it is not trusted any more, and not lost either."""
    aside = next(name for number in count(1) if not (name := path.with_name(f"{path.name}.aside{number}")).exists())
    path.rename(aside)
    print(f"{path} {why}; set aside as {aside.name}")


@contextmanager
def _locked(path: Path):
    """One process at a time; the system frees the lock of a process that dies."""
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows, or a mounted drive: the checksum has to notice two writers
            pass
        yield


@contextmanager
def _scratch_folder(folder: Path):
    """An empty folder that is gone afterwards, with what a killed process may have left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _fetch(url: str, target: Path, size: int | None, checksum: str | None) -> None:
    """Brings a file here and checks it; a wrong one is set aside and fetched once more."""
    known = size or checksum
    for _ in range(2):
        if not (known and target.exists() and not _mismatch(target, size, checksum)):
            have = target.stat().st_size if target.exists() else 0
            _require_space(target.parent, 2.2 * (size or 0) - have, "the archive and its images")
            _transfer(url, target)
        if not (mismatch := _mismatch(target, size, checksum)):
            return
        _set_aside(target, mismatch)
    raise ValueError(f"{url}: {mismatch}, twice; check base_url, size and checksum")


def _mismatch(path: Path, size: int | None, checksum: str | None) -> str:
    kind = checksum.split(":")[0] if checksum else None
    actual = path.stat().st_size, f"{kind}:{file_digest(path, kind)}" if kind else None
    if actual == (size or actual[0], checksum):
        return ""
    return f"expected {size or 'any number of'} bytes, {checksum}, got {actual[0]} bytes, {actual[1]}"


def _require_space(folder: Path, needed: float, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = f"{what} need {needed:,.0f} bytes in {folder.resolve()}, and {free:,} are free: make room or choose another folder"
        raise OSError(errno.ENOSPC, message)


def _transfer(url: str, target: Path) -> None:
    """Receives the rest of a file, with growing pauses after failures that a server or a line may recover from."""
    failures, most = 0, -1
    while True:
        try:
            return _receive(url, target)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the server has nothing beyond what is here: whether that is all, the checksum tells
                return
            if error.code < 500 and error.code not in (408, 429):
                raise ConnectionError(f"{url}: the server answers {error.code} {error.reason}; check the address") from error
            reason = error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = error
        have = target.stat().st_size if target.exists() else 0
        failures, most = 0 if have > most >= 0 else failures + 1, max(have, most)
        if failures > len(RETRY_WAITS):
            raise ConnectionError(f"{url}: gave up after {failures} tries ({reason}); {have} bytes are kept, run again to continue") from reason
        time.sleep(RETRY_WAITS[max(failures - 1, 0)])


def _receive(url: str, target: Path) -> None:
    have = target.stat().st_size if target.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT) as response:
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise ValueError(f"{url} leads to {response.url}, which is not encrypted: refused")
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server sends the whole file
        total = have + int(response.headers.get("Content-Length") or 0)
        with target.open("ab" if have else "wb") as file, tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=target.name) as bar:
            while chunk := response.read(1 << 18):
                file.write(chunk)
                bar.update(len(chunk))
        if target.stat().st_size < total:
            raise ConnectionError(f"the connection ended after {target.stat().st_size} of {total} bytes")


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks an archive of plain files and folders; raises ValueError for any other member, or a damaged archive."""

    def plain(member: tarfile.TarInfo, destination: str) -> tarfile.TarInfo:
        if not (member.isfile() or member.isdir()) or member.name.startswith("/"):
            raise ValueError(f"{archive}: {member.name!r} is not a plain file or folder inside the archive: refused")
        return tarfile.data_filter(member, destination)

    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter=plain)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: cannot be unpacked ({error})") from error


@contextmanager
def _memory_advice(stream: BatchStream):
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|ALLOC_FAILED|can't allocate memory|not enough memory", str(error)):
            raise
        size = stream.split.images.shape[-1]
        advice = f"lower batch_size (now {stream.batch_size}) or choose a smaller profile with KD_PROFILE (images have {size} px now)"
        raise MemoryError(f"training does not fit into the memory: restart the kernel, {advice}, and run all cells again") from error


def _digest(tensors) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _fingerprint(students: list[Student], teacher: nn.Module | None, train: Split, val: Split, settings: dict) -> dict:
    """Everything that decides what `fit` ends with, in values that can be compared."""
    models = {"the students' initial weights": [student.model for student in students], "the teacher": [teacher] if teacher else []}
    return {
        **settings,
        "precision": str(choose_precision(train.images.device)),
        "classes": train.classes,
        "students": [f"{student.name}, seed {student.seed}, {student.arm}, {student.lr}" for student in students],
        "losses": [_describe_loss(student.loss) for student in students],
        **{split: _digest([data.images, data.targets]) for split, data in (("train", train), ("val", val))},
        **{who: [_describe_model(model) for model in group] for who, group in models.items()},
    }


def _describe_model(model: nn.Module) -> str:
    return f"{model} {_describe_code(type(model).forward)} {_digest(model.state_dict().values())}"


def _describe_loss(loss) -> str:
    function, arguments = (loss.func, (loss.args, loss.keywords)) if isinstance(loss, partial) else (loss, "")
    return f"{getattr(function, '__qualname__', function)} {arguments} {_describe_code(function)}"


def _describe_code(function) -> str:
    """A function's instructions and the numbers and names that it uses, so that one edited under its old name is another one."""
    if not inspect.isfunction(function):
        return ""
    code, outside = function.__code__, inspect.getclosurevars(function)
    inside = [value for value in code.co_consts if not inspect.iscode(value)]
    values = {key: value for key, value in (outside.nonlocals | outside.globals).items() if isinstance(value, int | float | str)}
    return hashlib.sha256(repr((code.co_code, code.co_names, inside, values)).encode()).hexdigest()[:12]


@dataclass
class _Stage:
    """Where the calls of `fit` inside a `Run.stage` keep their checkpoints."""

    name: str
    folder: Path
    calls: int = 0
    earlier_seconds: float = 0.0  # spent in earlier sessions

    def checkpoint(self, settings: dict) -> Path:
        """The file for these settings; says why there is none yet if there are some for others, of which it keeps the latest."""
        self.calls += 1
        stem = re.sub(r"\W+", "-", self.name).lower() + (f"-{self.calls}" if self.calls > 1 else "")
        path = self.folder / f"{stem}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}.pt"
        others = sorted(self.folder.glob(f"{stem}-{8 * '[0-9a-f]'}.pt"), key=lambda other: other.stat().st_mtime)
        if others and path not in others:
            if (other := _read_saved(others[-1], {"settings"})) is not None:
                print(f"{self.name} starts afresh, since {_changes(other['settings'], settings)}; {others[-1].name} is kept")
            for old in others[: 1 - CHECKPOINTS_KEPT]:
                old.unlink(missing_ok=True)
        return path


def _changes(old: dict, new: dict) -> str:
    changed = [key for key in new if old.get(key) != new[key]]
    shown = {key: f"{key} was {old.get(key)} and is {new[key]}" for key in changed if isinstance(new[key], int | float | None)}
    return ", ".join(shown.get(key, f"{key} changed") for key in changed)


_current_stage: ContextVar[_Stage | None] = ContextVar("current stage", default=None)


class _Recovery:
    """Takes an interrupted `fit` up from its checkpoint, writes new ones, and stops students that went wrong.

    A checkpoint holds the number of steps done, the settings, and each student's weights, optimiser, gradient scaler, running
    totals and history. Random generators need no state: every draw is a function of the seed and the step.
    """

    def __init__(self, steppers: list[_Stepper], total: int, fingerprint):
        self.steppers, self.total, self.done, self.path = steppers, total, 0, None
        self.earlier_seconds, self.started = 0.0, time.perf_counter()
        self.written, self.write_seconds, self.interrupted = self.started, 0.0, False
        if stage := _current_stage.get():
            self.settings = fingerprint()
            self.path = stage.checkpoint(self.settings)
            self._resume(stage)

    def _resume(self, stage: _Stage) -> None:
        if (saved := self._saved()) is None:
            return
        for stepper, state in zip(self.steppers, saved["students"], strict=True):
            stepper.load_state(state)
        self.done, self.earlier_seconds = saved["done"], saved["seconds"]
        stage.earlier_seconds += self.earlier_seconds
        what = "was finished before and is loaded" if self.done == self.total else f"continues after step {self.done} of {self.total}"
        print(f"{stage.name} {what} from {self.path}")

    def _saved(self) -> dict | None:
        saved = _read_saved(self.path, {"settings", "done", "seconds", "students"}) if self.path else None
        return saved if saved and saved["settings"] == self.settings else None

    def __enter__(self) -> _Recovery:
        """Holds the first Ctrl-C, or Jupyter's stop button, back until a step is complete."""
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def _interrupt(self, *_) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *_) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.previous)

    def running(self) -> list[_Stepper]:
        return [stepper for stepper in self.steppers if not stepper.student.stopped]

    def read_losses(self) -> float:
        """The mean loss since the last reading; stops every student whose loss was not finite."""
        running = self.running()
        if not running[0].recent_losses:
            return math.nan
        losses = torch.stack([torch.stack(stepper.recent_losses) for stepper in running]).tolist()
        for stepper, values in zip(running, losses):
            stepper.recent_losses.clear()
            if bad := [index for index, value in enumerate(values) if not math.isfinite(value)]:
                self._stop(stepper, f"the loss was {values[bad[0]]} at step {stepper.steps_done - len(values) + bad[0] + 1}")
        return float(np.mean(losses))

    def _stop(self, stepper: _Stepper, why: str) -> None:
        saved, student = self._saved(), stepper.student
        if saved is not None:
            stepper.load_state(saved["students"][self.steppers.index(stepper)])
        good = f"its weights are those of the last good checkpoint, {self.path}, step {stepper.steps_done}" if saved else "no checkpoint held it"
        student.stopped = f"{student.name} with seed {student.seed} was stopped: {why} of {self.total}; {good}"
        print(student.stopped)
        if not self.running():
            raise FloatingPointError(f"no student is left. {student.stopped}. Try a lower learning rate")

    def after_step(self, end_of_epoch: bool = False) -> None:
        """Counts the step and writes a checkpoint if one is due: at an epoch's end, unless that costs over 5 % of the time, and each minute."""
        self.done += 1
        since = time.perf_counter() - self.written
        due = since > CHECKPOINT_SECONDS or (end_of_epoch and since > 20 * self.write_seconds)
        if self.path and (due or self.interrupted or self.done == self.total):
            self._write()
        if self.interrupted:
            raise KeyboardInterrupt(f"after step {self.done} of {self.total}; run the cell again to continue" if self.path else "")

    def _write(self) -> None:
        start = time.perf_counter()
        self.read_losses()
        for stepper in self.running():
            if not nn.utils.get_total_norm(stepper.student.model.parameters()).isfinite():
                self._stop(stepper, f"its weights were not finite after step {self.done}")
        finished = self.done == self.total
        students = [stepper.state(finished) for stepper in self.steppers]
        seconds = self.earlier_seconds + start - self.started
        _save_if_possible({"settings": self.settings, "done": self.done, "seconds": seconds, "students": students}, self.path)
        self.written = time.perf_counter()
        self.write_seconds = self.written - start
