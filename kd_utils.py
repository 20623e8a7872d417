"""Knowledge distillation on Imagewoof and Imagenette: what the two notebooks import.

The file reads in the order in which the data flows:

    download ─► split ─► batches ─┬─► teacher (frozen) ─┐
                uint8, on device  └─► students ──► loss ◄┘ ─► step ─► results ─► report

All students of a cohort learn from one stream: a batch is drawn and augmented once, the teacher
reads it once, and each student takes its own step on it. So two students with the same seed differ
by their loss alone. Shapes: N images, B images in a batch, C classes, S pixels a side.
"""

from __future__ import annotations

import math
import os
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.datasets import ImageFolder
from torchvision.datasets.utils import calculate_md5, download_url
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHECKPOINT_SECONDS = 300  # at most, between two checkpoints
progress = partial(tqdm, file=sys.stdout, ncols=100, leave=False, mininterval=2)  # stderr is red

# ── Settings ──────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Settings:
    """Every number of a study. `dataclasses.replace(SETTINGS, epochs=30)` makes a changed copy."""
    dataset: str
    profile: str
    data_dir: Path
    runs_dir: Path  # checkpoints and results
    teacher_weights: str | None  # a name of torchvision's, a file, or None: random weights
    image_size: int  # pixels a side
    batch_size: int
    seeds: tuple[int, ...]  # one student of each kind and arm per seed
    epochs: int  # passes of every student over the training images
    teacher_epochs: int  # the same for the teacher
    sweep_epochs: int  # the same for the students that try temperatures and alphas
    temperature: float = 4.0  # this and alpha were chosen by the sweep of Imagewoof_KD.ipynb
    alpha: float = 0.9  # weight of the distillation term; the labels get 1 − alpha
    learning_rate: float = 4e-3  # at its peak
    weight_decay: float = 0.05
    teacher_learning_rate: float = 2e-4
    min_crop: float = 0.35  # the least share of an image's area that a student is shown
    stream_seed: int = 0  # of the batches, which all students share
    sweep_seed: int = 100  # of the students that try temperatures and alphas


# image_size, batch_size, seeds, epochs, teacher_epochs, sweep_epochs
PROFILES = {
    "gpu": (128, 128, (0, 1, 2, 3, 4), 20, 2, 6),
    "cpu": (96, 64, (0, 1, 2), 16, 1, 6),
    "demo": (64, 32, (0, 1), 3, 1, 1),
}


def choose_settings(dataset: str, profile: str | None = None) -> Settings:
    """The settings that suit the hardware, or those of the profile that KD_PROFILE names.
    KD_DATA_DIR and KD_RUNS_DIR name folders, KD_TEACHER_WEIGHTS torchvision's weights or a file.
    Raises ValueError for unknown names, FileNotFoundError for weights that are neither.
    """
    profile = profile or os.environ.get("KD_PROFILE") or ("gpu" if DEVICE.type == "cuda" else "cpu")
    for kind, value, known in [("dataset", dataset, DATASETS), ("profile", profile, PROFILES)]:
        if value not in known:
            raise ValueError(f"unknown {kind} {value!r}: choose one of {', '.join(known)}")
    weights = os.environ.get("KD_TEACHER_WEIGHTS", "IMAGENET1K_V1") if profile != "demo" else None
    if weights not in (None, *ResNet50_Weights.__members__) and not Path(weights).is_file():
        raise FileNotFoundError(f"teacher weights {weights!r}: neither a file nor torchvision's")
    data_dir = Path(os.environ.get("KD_DATA_DIR", "data"))
    runs_dir = Path(os.environ.get("KD_RUNS_DIR", "runs")) / f"{dataset}-{profile}"
    dataset = "demo" if profile == "demo" else dataset
    return Settings(dataset, profile, data_dir, runs_dir, weights, *PROFILES[profile])


@cache
def choose_precision() -> torch.dtype:
    """The fastest type: bfloat16 where the hardware has it, else float16 (GPU) or float32 (CPU)."""
    if DEVICE.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "amx_bf16" in cpu or "avx512_bf16" in cpu else torch.float32


def mixed_precision() -> torch.autocast:
    """A context in which networks compute in the precision that suits the device."""
    precision = choose_precision()
    return torch.autocast(DEVICE.type, precision, enabled=precision is not torch.float32)


# ── Data: from an archive to uint8 images on the device ───────────────────────────────────────────
BASE_URL = "https://s3.amazonaws.com/fast-ai-imageclas"
# The archive's MD5, the images in each split, and the classes in the order of folders and labels.
DATASETS = {
    "imagewoof2-160": ("3d200a7be99704a0d7509be2a9fbfe15", {"train": 9025, "val": 3929},
        "Shih-Tzu, Rhodesian ridgeback, beagle, English foxhound, Border terrier, "
        "Australian terrier, golden retriever, Old English sheepdog, Samoyed, dingo"),
    "imagenette2-160": ("e793b78cc4c9e9a4ccc0c1155377a412", {"train": 9469, "val": 3925},
        "tench, English springer, cassette player, chain saw, church, French horn, garbage truck, "
        "gas pump, golf ball, parachute"),
    "demo": ("", {"train": 300, "val": 100}, "triangle, square, pentagon, hexagon, disc, "
        "hollow triangle, hollow square, hollow pentagon, hollow hexagon, hollow disc"),
}  # fmt: skip


def count_images(folder: Path) -> dict[str, int]:
    """How many image files each split of a dataset's folder holds."""
    return {split: len(list((folder / split).glob("*/*.JPEG"))) for split in ("train", "val")}


def download_dataset(name: str, root="data", base_url: str = BASE_URL, md5: str = "") -> Path:
    """Downloads and unpacks a dataset and returns its folder, `<root>/<name>`; "demo" is drawn.
    A folder with the right number of images is used as it stands; any other is set aside.
    Raises ValueError for an unknown name or a wrong number of images, ConnectionError for an
    archive that cannot be had, and tarfile.FilterError for members that escape and for devices.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    (published_md5, expected, _), folder = DATASETS[name], Path(root, name)
    if count_images(folder) == expected:
        return folder
    Path(root).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f"{name}-") as scratch:
        fresh = Path(scratch, name)
        if name == "demo":
            draw_demo_dataset(fresh)
        else:
            archive = fetch_archive(f"{base_url}/{name}.tgz", scratch, md5 or published_md5)
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
        if (found := count_images(fresh)) != expected:
            raise ValueError(f"{base_url}/{name}.tgz holds {found} images instead of {expected}")
        if (found := count_images(folder)) != expected:  # else another notebook was faster
            if folder.exists():
                set_aside(folder, f"holds {found} images instead of {expected}")
            fresh.rename(folder)
    return folder


def fetch_archive(url: str, folder: str, md5: str) -> Path:
    """Downloads a file, trying three times; torchvision's `download_url` checks its MD5."""
    path = Path(folder, "archive.tgz")
    for _ in range(3):
        try:
            download_url(url, folder, path.name, md5)
            return path
        except Exception as error:  # networks fail in many ways
            reason = error
    got = calculate_md5(path) if path.exists() else "nothing"
    told = f"cannot download {url}: {reason} Expected MD5 {md5}, got {got}."
    raise ConnectionError(f"{told} Try later, or unpack the archive into the data folder yourself.")


def draw_demo_dataset(folder: Path) -> None:
    """Draws ten classes of shapes, in the layout of the real datasets, for runs without network."""
    rng, (_, counts, names) = np.random.default_rng(0), DATASETS["demo"]
    for split, index in ((split, i) for split, count in counts.items() for i in range(count)):
        noise = rng.integers(0, 110, (12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((96, 96))
        x, y, radius = rng.integers([34, 34, 20], [62, 62, 34]).tolist()
        colour, sides = tuple(rng.integers(120, 256, 3).tolist()), (3, 4, 5, 6, 30)[index % 5]
        look = {"outline": colour, "width": 5} if index % 10 > 4 else {"fill": colour}
        ImageDraw.Draw(image).regular_polygon((x, y, radius), sides, **look)
        # As in the real data, some validation images come from ImageNet's validation set.
        stem = "ILSVRC2012_val" if split == "val" and index < 40 else "drawn"
        name = f"{index % 10} " + names.split(", ")[index % 10]
        path = folder / split / name / f"{stem}_{index:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


@dataclass
class Split:
    """Decoded images with their labels, on one device."""
    images: Tensor  # [N, 3, S, S] uint8
    targets: Tensor  # [N] int64
    classes: list[str]  # C names, in the order of the labels
    never_seen: Tensor  # [N] bool, images of ImageNet's own validation set

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor) -> Split:
        unseen = self.never_seen[indices]
        return Split(self.images[indices], self.targets[indices], self.classes, unseen)


def load_split(folder, split: str, size: int) -> Split:
    """Decodes "train" or "val" once: short side scaled to `size` pixels, centre cut out.
    `folder` holds `<split>/<class>/*.jpg`. Raises FileNotFoundError for a missing or empty class
    folder, and ValueError for an image that cannot be read, naming it.
    """
    found = ImageFolder(Path(folder, split))  # labels follow the sorted folder names
    def decode(path: str) -> np.ndarray:
        try:
            return np.array(ImageOps.fit(found.loader(path), (size, size), Image.BICUBIC))
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"cannot read the image {path}: {error}") from error

    paths = [path for path, _ in found.samples]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = list(progress(pool.map(decode, paths), total=len(paths), desc=f"decode {split}"))
    images = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()
    names = DATASETS.get(Path(folder).name, ("", {}, ", ".join(found.classes)))[2].split(", ")
    never_seen = torch.tensor([Path(path).name.startswith("ILSVRC2012_val_") for path in paths])
    targets = torch.tensor(found.targets)
    return Split(images.to(DEVICE), targets.to(DEVICE), names, never_seen.to(DEVICE))


# ── Batches: one augmented view per image and epoch ───────────────────────────────────────────────
# ImageNet's statistics by channel, for values of 0 … 255, each [1, 3, 1, 1]
MEAN = 255 * torch.tensor([0.485, 0.456, 0.406], device=DEVICE).view(1, 3, 1, 1)
STD = 255 * torch.tensor([0.229, 0.224, 0.225], device=DEVICE).view(1, 3, 1, 1)


def draw_views(count: int, min_crop: float) -> Tensor:
    """Random crops and mirrorings for `augment`, [count, 2, 3] float32, on the CPU.
    A crop holds `min_crop` to 100 % of the area, with sides like 3:4 to 4:3, as in torchvision's
    RandomResizedCrop (but a side too long is shortened instead of drawn again).
    """
    area, shape = torch.empty(count).uniform_(min_crop, 1), torch.empty(count).uniform_(-1, 1)
    aspect = (shape * math.log(4 / 3)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = ((2 * torch.rand(count) - 1) * (1 - side) for side in (width, height))
    mirror, zero = torch.where(torch.rand(count) < 0.5, -1, 1), torch.zeros(count)
    return torch.stack([width * mirror, zero, x, zero, height, y], dim=1).view(count, 2, 3)


def augment(images: Tensor, views: Tensor) -> Tensor:
    """Crops, scales back and mirrors images [B, 3, S, S] by `views`; float32 in 0 … 255."""
    grid = F.affine_grid(views, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def normalise(images: Tensor) -> Tensor:
    """[B, 3, S, S] in 0 … 255 ─► float32, ImageNet's mean and standard deviation removed."""
    return ((images - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def augmented_batches(split: Split, settings: Settings, epoch: int, first: int = 0):
    """Yields an epoch's (images [B, 3, S, S] float32 normalised, targets [B]) from batch `first`.
    Its random choices follow from (stream_seed, epoch), so experiments share one stream, and reach
    the device at once, before the first batch. The last, incomplete batch is dropped.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.stream_seed * 1_000_003 + epoch)
        order, views = torch.randperm(len(split)), draw_views(len(split), settings.min_crop)
    order, views = order.to(DEVICE), views.to(DEVICE)
    for step in range(first, max(1, len(split) // settings.batch_size)):
        batch = slice(step * settings.batch_size, (step + 1) * settings.batch_size)
        images, targets = split.images[order[batch]], split.targets[order[batch]]
        yield normalise(augment(images, views[batch])), targets


# ── Models ────────────────────────────────────────────────────────────────────────────────────────
class ConvBlock(nn.Module):
    """Halves the resolution with a strided 3×3 convolution, then refines it with a residual one."""
    def __init__(self, inputs: int, outputs: int, groups: int = 1):
        super().__init__()
        self.reduce = Conv2dNormActivation(inputs, outputs, 3, stride=2)
        self.refine = Conv2dNormActivation(outputs, outputs, 3, groups=groups)

    def forward(self, x: Tensor) -> Tensor:  # [B, inputs, S, S] ─► [B, outputs, S/2, S/2]
        x = self.reduce(x)
        return x + self.refine(x)


class CustomCNN(nn.Sequential):
    """Blocks of 32-64-128-256-512 channels for S ≥ 32, [B, 3, S, S] ─► [B, C]; 3.5 M parameters."""
    def __init__(self, num_classes: int = 10):
        super().__init__(
            ConvBlock(3, 32), ConvBlock(32, 64), ConvBlock(64, 128), ConvBlock(128, 256),
            ConvBlock(256, 512, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(512, num_classes),
        )  # fmt: skip


class LeNet5(nn.Sequential):
    """LeNet-5 (LeCun et al., 1998, section II.B) for photographs of S ≥ 32; 62 k parameters.
    Adaptive max pooling gives the paper's maps at any image size. Other differences: three input
    channels, ReLU, C3 sees all six maps, a linear output.
    """
    def __init__(self, num_classes: int = 10):
        super().__init__(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.AdaptiveMaxPool2d(14),  # C1, S2: 6 maps of 14×14
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AdaptiveMaxPool2d(5),  # C3, S4: 16 maps of 5×5
            nn.Conv2d(16, 120, 5), nn.ReLU(), nn.Flatten(),  # C5
            nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes),  # F6 and the output
        )  # fmt: skip


STUDENTS = {"Custom CNN": CustomCNN, "LeNet-5": LeNet5}


def build_teacher(num_classes: int, weights: str | None = "IMAGENET1K_V1") -> nn.Module:
    """torchvision's ResNet-50 (He et al., 2016) with a new last layer; `weights` as in `Settings`.
    Raises ValueError for a file that is no state dict of the network with its 1,000 classes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        known = weights in ResNet50_Weights.__members__
        network = resnet50(weights=weights if known else None, progress=False)
        if weights and not known:
            try:
                state = torch.load(weights, map_location="cpu", weights_only=True)
                # A number too large for float16 is inf there; its largest is a better start.
                network.load_state_dict({k: v.nan_to_num(math.nan) for k, v in state.items()})
            except Exception as error:  # a damaged or foreign file fails in many ways
                raise ValueError(f"{weights} is no state dict of ResNet-50: {error}") from error
        network.fc = nn.Linear(network.fc.in_features, num_classes)
    if weights:  # for the record
        cached = Path(torch.hub.get_dir(), "checkpoints")
        path = cached / Path(ResNet50_Weights[weights].url).name if known else Path(weights)
        name = f"torchvision {weights}" if known else f"local file {path.name}"
        network.origin = f"{name}, SHA-256 {sha256(path.read_bytes()).hexdigest()}"
    return network


# ── Loss ──────────────────────────────────────────────────────────────────────────────────────────
def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor,
                      temperature: float, alpha: float) -> Tensor:  # fmt: skip
    """alpha · T² · KL(softmax(teacher/T) ‖ softmax(student/T)) + (1 − alpha) · CE(student, targets)
    (Hinton, Vinyals & Dean, 2015, section 2.) Logits [B, C] of any float type and targets [B] int64
    give a float32 scalar. `alpha` weighs the *distillation* term; some libraries mean the other.
    Raises ValueError for T ≤ 0, alpha outside [0, 1] and shapes that do not fit.
    """
    if not (temperature > 0 and 0 <= alpha <= 1):
        raise ValueError(f"need temperature > 0 and 0 ≤ alpha ≤ 1, got {temperature} and {alpha}")
    given = (student_logits, teacher_logits, targets)
    shapes = [None if values is None else list(values.shape) for values in given]
    if len(shapes[0]) != 2 or shapes[1:] != [shapes[0], shapes[0][:1]]:
        raise ValueError(f"need logits [B, C] of student and teacher, targets [B]; got {shapes}")
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    soft_student = F.log_softmax(student / temperature, dim=1)
    soft_teacher = F.log_softmax(teacher / temperature, dim=1)
    # batchmean divides by B, as the definition does; the default, "mean", divides by B · C.
    kl = F.kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True)
    return alpha * temperature**2 * kl + (1 - alpha) * F.cross_entropy(student, targets)


# ── Training: a cohort of students on one stream of batches ───────────────────────────────────────
class Student:
    """A network that learns, with its loss, optimiser, schedule and history.
    `student(images)` gives logits in training mode and mixed precision; dropout depends on (seed,
    step) alone. `student.step(loss)` takes one step of optimiser and schedule. `loss` is called
    with (student_logits [B, C], teacher_logits [B, C] or None, targets [B]).
    """
    def __init__(self, network: nn.Module, name: str, arm: str, seed: int, loss, optimizer):
        self.network, self.name, self.arm, self.seed = network, name, arm, seed
        self.loss, self.optimizer, self.schedule = loss, optimizer, None
        fp16 = choose_precision() is torch.float16  # its gradients need scaling
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=fp16)
        self.losses, self.logits = [], None  # of this epoch's steps; for `val`, at its end
        self.history = {"loss": [], "train_accuracy": [], "val_accuracy": []}

    def __str__(self) -> str:
        numbers = [f"{key} {value}, " for key, value in getattr(self.loss, "keywords", {}).items()]
        return f"{self.name}, {self.arm}, {''.join(numbers)}seed {self.seed}"

    def plan(self, total_steps: int) -> None:
        """A one-cycle schedule (Smith & Topin, 2018): up to the optimiser's rate, down to 0."""
        if self.schedule:
            raise ValueError(f"{self} has been trained: make the students anew, then train them")
        peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule = OneCycleLR(self.optimizer, peaks, total_steps, cycle_momentum=False)

    def __call__(self, images: Tensor) -> Tensor:  # [B, 3, S, S] ─► [B, C]
        torch.manual_seed(self.seed * 1_000_003 + self.schedule.last_epoch)
        self.network.train()
        with mixed_precision():
            return self.network(images)

    def step(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.losses.append(loss.detach())  # stays on the device: reading it would make us wait

    def end_epoch(self, sample: Split, val: Split) -> None:
        train_logits, self.logits = predict(self.network, sample), predict(self.network, val)
        self.check_losses()
        self.history["loss"].append(torch.stack(self.losses).mean().item())
        self.history["train_accuracy"].append(score(train_logits, sample)["accuracy"].item())
        self.history["val_accuracy"].append(score(self.logits, val)["accuracy"].item())
        self.losses = []

    def check_losses(self) -> None:
        """Raises FloatingPointError if a loss of this epoch or a weight is not finite."""
        weights = [value.float().mean() for value in self.network.state_dict().values()]
        finite = torch.stack([*self.losses, *weights]).isfinite().tolist()
        if False in finite:
            step = self.schedule.last_epoch - max(0, len(self.losses) - 1 - finite.index(False))
            raise FloatingPointError(f"{self}: the loss is not finite at step {step}. Lower the "
                "learning rate and run all cells again: all stages then start anew.")  # fmt: skip

    def state(self, finished: bool) -> dict:
        """What a checkpoint holds; a finished student needs no optimiser any more."""
        plain = {key: vars(self)[key] for key in "name arm seed history logits losses".split()}
        parts = ["network"] + ([] if finished else ["optimizer", "scaler", "schedule"])
        return plain | {part: vars(self)[part].state_dict() for part in parts}

    def load_state(self, state: dict) -> None:
        self.history, self.logits, self.losses = state["history"], state["logits"], state["losses"]
        for part in filter(state.get, ("network", "optimizer", "scaler", "schedule")):
            vars(self)[part].load_state_dict(state[part])


def make_students(losses: dict, settings: Settings, num_classes: int, networks=None, seeds=None):
    """One student per arm of {arm: loss}, network and seed, which fixes the initial weights."""
    students, networks = [], networks or STUDENTS
    for arm, name, seed in product(losses, networks, settings.seeds if seeds is None else seeds):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = networks[name](num_classes).to(DEVICE, memory_format=torch.channels_last)
        lr, decay = settings.learning_rate, settings.weight_decay
        optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=decay, fused=True)
        students.append(Student(network, name, arm, seed, losses[arm], optimizer))
    return students


def training_batches(students, train: Split, val: Split, settings: Settings, stage: str,
                     epochs: int, teacher: nn.Module | None = None):  # fmt: skip
    """Yields the batches of all epochs (see `augmented_batches`) for the training loop around it.
    At each epoch's end it scores every student and prints a line. `<runs_dir>/<stage>.pt` is the
    checkpoint: a finished stage is loaded, an interrupted one continues, bit for bit on a CPU.
    Raises ValueError for what does not fit together, FloatingPointError for a loss not finite.
    """
    check_cohort(students, train, val, teacher)
    steps = max(1, len(train) // settings.batch_size)
    total = epochs * steps
    for student in students:
        student.plan(total)
    path = settings.runs_dir / f"{stage}.pt"
    about = describe_stage(students, train, settings, epochs, teacher)
    step, seconds = load_checkpoint(path, about, students)
    saved, start = time.monotonic(), time.monotonic() - seconds
    sample = train.subset(torch.arange(0, len(train), 10, device=DEVICE))
    with progress(total=total, initial=step, desc=stage, disable=step == total) as bar:
        while step < total:
            for images, targets in augmented_batches(train, settings, step // steps, step % steps):
                yield images, targets
                step += 1
                bar.update()
                if step % steps == 0:
                    for student in students:
                        student.end_epoch(sample, val)
                    bar.write(log_line(students, step // steps, time.monotonic() - start))
                if step == total or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    seconds, saved = time.monotonic() - start, time.monotonic()
                    save_checkpoint(path, about, students, step, seconds, step == total)


def check_cohort(students, train: Split, val: Split, teacher: nn.Module | None) -> None:
    """Raises ValueError for a teacher that could change, or classes that do not match."""
    if teacher and (teacher.training or any(p.requires_grad for p in teacher.parameters())):
        raise ValueError("the teacher could change: freeze it, .eval().requires_grad_(False)")
    owners = {"val": val, "the teacher": teacher, **{str(s): s.network for s in students}}
    for who, owner in owners.items():  # the same classes in another order would train on garbage
        if (classes := getattr(owner, "classes", train.classes)) != train.classes:
            raise ValueError(f"{who} has the classes {classes}, but train has {train.classes}")
    for student in students:
        student.network.classes = train.classes


def log_line(students, epoch: int, seconds: float) -> str:
    """Epoch, seconds so far, and validation accuracy in % by network and arm, means over seeds."""
    line = f"{epoch:2} | {seconds:.0f} s"
    for name in dict.fromkeys(s.name for s in students):
        members = [(s.arm, 100 * s.history["val_accuracy"][-1]) for s in students if s.name == name]
        means = {arm: np.mean([value for a, value in members if a == arm]) for arm, _ in members}
        line += f" | {name}: " + ", ".join(f"{arm} {mean:.1f}" for arm, mean in means.items())
    return line if len(line) <= 100 else f"{line[:97]}..."


def describe_stage(students, train: Split, settings: Settings, epochs: int, teacher) -> dict:
    """What must be unchanged for a checkpoint to be continued."""
    defaults = students[0].optimizer.defaults
    about = {key: getattr(settings, key) for key in ("dataset", "image_size", "batch_size")}
    about |= {"epochs": epochs, "training images": len(train), "min_crop": settings.min_crop}
    about |= {"stream_seed": settings.stream_seed, "peak learning rate": defaults["lr"]}
    about |= {"weight decay": defaults["weight_decay"]}
    if teacher:
        values = [v.cpu().reshape(-1).view(torch.uint8) for v in teacher.state_dict().values()]
        about["SHA-256 of the trained teacher"] = sha256(torch.cat(values).numpy()).hexdigest()
    for number, student in enumerate(students, 1):
        size = sum(p.numel() for p in student.network.parameters())
        origin = getattr(student.network, "origin", "random weights")
        about[f"student {number}"] = f"{student}: {size:,} parameters from {origin}"
    return about


def save_checkpoint(path: Path, about: dict, students, step: int, seconds: float, finished: bool):
    """Writes aside, flushes to the disk and renames: at any moment the file is whole."""
    [student.check_losses() for student in students]
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    machine = f"{device}, {str(choose_precision())[6:]}, {versions}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(aside := path.with_suffix(".tmp"), "wb") as file:
        states = [student.state(finished) for student in students]
        torch.save({"about": about, "machine": machine, "step": step, "seconds": seconds,
                    "finished": finished, "students": states}, file)  # fmt: skip
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def load_checkpoint(path: Path, about: dict, students) -> tuple[int, float]:
    """Restores the students; returns their steps and seconds so far, 0 without a usable file."""
    if not path.exists():
        return 0, 0.0
    try:
        saved = torch.load(path, map_location=DEVICE, weights_only=True)
        old, finished = saved["about"], saved["finished"]
        changed = [key for key in old | about if old.get(key) != about.get(key)]
        told = [f"{key} was {old.get(key)} and is {about.get(key)}" for key in changed[:3]]
        problem = f"has other settings ({'; '.join(told)})" if told else None
    except Exception as error:  # a damaged or foreign file fails in many ways
        problem = f"is no readable checkpoint ({type(error).__name__})"
    if problem:
        set_aside(path, problem)
        return 0, 0.0
    for student, state in zip(students, saved["students"], strict=True):
        student.load_state(state)
    print(f"{path}: {'finished before' if finished else 'continues'}")
    return saved["step"], saved["seconds"]


def set_aside(path: Path, why: str) -> None:
    """Renames a file or folder that cannot be used, and says so: nothing is deleted."""
    new = path.with_name(f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
    path.rename(new)
    print(f"{path} {why}. It is now called {new.name}, and a new one is made.")


# ── Metrics and statistics ────────────────────────────────────────────────────────────────────────
@torch.no_grad()
def predict(network: nn.Module, split: Split) -> Tensor:
    """Logits [N, C] float32 of the images as they are, in evaluation mode."""
    network.eval()
    with mixed_precision():
        return torch.cat([network(normalise(batch)).float() for batch in split.images.split(256)])


def score(logits: Tensor, split: Split) -> dict[str, Tensor]:
    """Accuracy (on all, and on never-seen images), NLL (nats), ECE: scalars; recall [C], right [N].
    ECE is the expected calibration error with 15 equal bins (Guo et al., 2017, section 2).
    """
    confidence, answers = logits.softmax(1).max(1)
    right, unseen = (answers == split.targets).float(), split.never_seen.float()
    bins = (15 * confidence).long().clamp(max=14)
    gaps = torch.zeros(15, device=logits.device).index_add_(0, bins, right - confidence)
    truth = F.one_hot(split.targets, logits.shape[1]).float()  # [N, C]
    return {
        "accuracy": right.mean(),
        "never_seen": (right * unseen).sum() / unseen.sum(),
        "nll": F.cross_entropy(logits, split.targets),
        "ece": gaps.abs().sum() / len(right),
        "recall": right @ truth / truth.sum(0),
        "right": right,
    }


def interval(values) -> tuple[float, float, float]:
    """The mean of paired gains and its 95 % t-interval: nan if n < 2 or all are equal; n ≤ 12."""
    # 97.5 % quantiles of Student's t distribution for 1 to 11 degrees of freedom
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)
    n, mean = len(values), float(np.mean(values)) if len(values) else math.nan
    if n < 2 or np.ptp(values) < 1e-6:
        return mean, math.nan, math.nan
    half = quantiles[min(n - 2, 10)] * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def verdict(gains) -> str:
    """What the 95 % interval of paired gains allows to say."""
    _, low, high = interval(gains)
    return "helps" if low > 0 else "hurts" if high < 0 else "inconclusive"


# ── Report: made from what the finished stages left in `runs_dir` ─────────────────────────────────
class Results:
    """What finished stages left: `stages`, `teacher` (its logits), and `rows`, one per student.
    Raises ValueError if Experiments 1 and 2 were run with different settings.
    """
    def __init__(self, settings: Settings, val: Split):
        self.stages, experiments = {}, ("Experiment 1", "Experiment 2")
        for stage in ("teacher", *experiments, "sweep teacher", "sweep"):
            if (path := settings.runs_dir / f"{stage}.pt").exists():
                saved = torch.load(path, map_location=DEVICE, weights_only=True)
                self.stages |= {stage: saved} if saved["finished"] else {}
        self.missing = [stage for stage in experiments if stage not in self.stages]
        one, two = (self.stages.get(s, {"about": {}, "students": []}) for s in experiments)
        shared = [key for key in one["about"].keys() & two["about"].keys() if "student" not in key]
        if differing := [key for key in shared if one["about"][key] != two["about"][key]]:
            raise ValueError(f"Experiments 1 and 2 differ in {differing}: run both alike")
        teacher = self.stages.get("teacher", {"students": [{"logits": None}]})["students"][0]
        self.rows, self.teacher = one["students"] + two["students"], teacher["logits"]
        for row in self.rows:
            row |= {key: value.cpu().numpy() for key, value in score(row["logits"], val).items()}
            if self.teacher is not None:
                same = row["logits"].argmax(1) == self.teacher.argmax(1)
                row["agreement"] = same.float().mean().item()

    def values(self, name: str, arm: str, key: str = "accuracy") -> dict:
        """{seed: value} of one network in one arm; empty if it was not trained."""
        rows = [row for row in self.rows if (row["name"], row["arm"]) == (name, arm)]
        return {row["seed"]: row.get(key, math.nan) for row in rows}

    def gains(self, name: str, key="accuracy", arm="distilled", other="alone") -> np.ndarray:
        """[seeds] or [seeds, C]: `arm` − `other`, paired by seed: what both share cancels."""
        one, two = self.values(name, arm, key), self.values(name, other, key)
        return np.array([one[seed] - two[seed] for seed in one if seed in two])

    def probabilities(self, arm: str, name: str = "Custom CNN") -> Tensor:
        """[N, C], the mean over seeds of one network's probabilities for `val`."""
        logits = torch.stack(list(self.values(name, arm, "logits").values()))  # [seeds, N, C]
        return logits.softmax(2).mean(0)

    def mean(self, name: str, arm: str, key: str = "accuracy", form: str = ".1%") -> str:
        values = list(self.values(name, arm, key).values())
        return format(np.mean(values), form).rstrip("%") if values else "not run"


def confusions(logits: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """[C, C]: % of a true class (row) by answer. [C]: by how much each is named too often."""
    labels = (split.targets.cpu(), logits.argmax(1).cpu())
    truth, answers = (F.one_hot(each, logits.shape[1]).float() for each in labels)  # [N, C]
    return 100 * (truth.T @ answers) / truth.sum(0)[:, None], answers.sum(0) / truth.sum(0) - 1


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table, its first column aligned left and the others right."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def points(gains) -> str:
    """Paired gains in percentage points: their mean and 95 % interval."""
    if not len(gains) or np.isnan(gains).any():
        return "–"
    mean, low, high = (100 * value for value in interval(gains))
    return f"{mean:+.1f}" + ("" if math.isnan(low) else f" [{low:+.1f}, {high:+.1f}]")


def result_table(results: Results) -> str:
    rows = []
    for name in STUDENTS:
        gains = results.gains(name)
        means = [results.mean(name, arm) for arm in ("alone", "distilled")]
        rows.append([name, *means, points(gains), f"{int((gains > 0).sum())} of {len(gains)}"])
    note = f"\n\n**Not run yet: {' and '.join(results.missing)}.**" if results.missing else ""
    header = "student, alone %, distilled %, gain [95 % interval], seeds won"
    return table(header.split(", "), rows) + note


def verdict_lines(results: Results, val: Split) -> str:
    """One line per student: did it help, also on never-seen images, and beyond the class mean?"""
    lines, unseen = [], int(val.never_seen.sum())
    told = {"helps": "what the teacher says about the single image teaches more",
            "hurts": "the mean answer teaches more", "inconclusive": "no clear lead"}  # fmt: skip
    for name in STUDENTS:
        gains, lead = results.gains(name), results.gains(name, other="class mean")
        if not len(gains):
            lines.append(f"- **{name}: no verdict.** A gain needs both experiments.")
            continue
        fresh, control = results.gains(name, "never_seen"), results.gains(name, arm="class mean")
        luck = 196 * results.gains(name, "right").mean(0).std() / math.sqrt(len(val))  # 1.96 SE
        line = f"- **Distillation into {name}: {verdict(gains)}.** Gain {points(gains)} points "
        line += f"(± {luck:.1f} for the choice of images); on the {unseen} never-seen images "
        line += f"{points(fresh)}: {verdict(fresh)}."
        if len(lead):
            line += f" The teacher's mean answer to a class gains {points(control)}: "
            line += f"{verdict(control)}. *Distilled* leads it by {points(lead)}: "
            line += f"{told[verdict(lead)]}."
        lines.append(line)
    return "\n".join(lines)
