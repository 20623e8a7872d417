"""Knowledge distillation: what the two notebooks import.

    download ─► split ─► batches ─┬─► teacher (frozen) ─┐
                uint8, on device  └─► students ──► loss ◄┘ ─► step ─► results

Shapes: N images, B images in a batch, C classes, S pixels a side.
"""

import hashlib
import inspect
import io
import math
import os
import tarfile
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from http.client import HTTPException
from itertools import product
from numbers import Number
from pathlib import Path
from sys import stdout
from urllib.request import urlopen

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.datasets.folder import is_image_file
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.backends.cudnn.benchmark = True  # on a GPU: tries the algorithms, keeps the best
DOWNLOAD_SECONDS = 60  # without an answer, before a download is given up
CHECKPOINT_SECONDS = 300  # at least, between two checkpoints
progress = partial(tqdm, file=stdout, ncols=100, leave=False, mininterval=2, delay=9)


@cache
def choose_precision() -> torch.dtype:
    """bfloat16 where the hardware has it, else float16 (GPU) or float32 (CPU)."""
    if DEVICE.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    info = Path("/proc/cpuinfo")
    native = info.exists() and "_bf16" in info.read_text()  # avx512_bf16, amx_bf16
    return torch.bfloat16 if native else torch.float32


def mixed_precision() -> torch.autocast:
    """A context in which networks compute in the precision that suits the device."""
    precision = choose_precision()
    return torch.autocast(DEVICE.type, precision, enabled=precision != torch.float32)


@contextmanager
def seeded(seed: int, step: int = 0):
    """Inside, chance follows from (seed, step); after, the caller's goes on."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed * 1_000_003 + step)
        yield


# ── Data: from an archive to uint8 images on the device ───────────────────
BASE_URL = "https://s3.amazonaws.com/fast-ai-imageclas"
DATASETS = {  # MD5 of the archive, images in train and val
    "imagewoof2-160": ("3d200a7be99704a0d7509be2a9fbfe15", (9025, 3929)),
    "imagenette2-160": ("e793b78cc4c9e9a4ccc0c1155377a412", (9469, 3925)),
    "demo": ("drawn, not downloaded", (200, 100)),
}
CLASS_NAMES = {  # of the folders that ImageNet calls by number
    "n02086240": "Shih-Tzu",
    "n02087394": "Rhodesian ridgeback",
    "n02088364": "beagle",
    "n02089973": "English foxhound",
    "n02093754": "Border terrier",
    "n02096294": "Australian terrier",
    "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog",
    "n02111889": "Samoyed",
    "n02115641": "dingo",
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def count_images(folder: Path) -> tuple[int, int]:
    train, val = folder.glob("train/*/[!.]*.JPEG"), folder.glob("val/*/[!.]*.JPEG")
    return len(list(train)), len(list(val))


def download_dataset(name: str, root="data", base_url=BASE_URL, md5=None) -> Path:
    """A dataset's folder, downloaded unless it is whole, or your own folder. Raises
    ValueError (name, number of images), ConnectionError, tarfile.FilterError."""
    if name not in DATASETS:
        own = Path(name).expanduser()
        if (own / "train").is_dir() and (own / "val").is_dir():
            return own
        raise ValueError(f"{name!r}: no folder with train, val, nor {list(DATASETS)}")

    folder = Path(root, name).expanduser()
    known_md5, expected = DATASETS[name]
    found = count_images(folder)
    if found == expected:
        return folder

    state = f"holds {found} images in train and val, not {expected}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        fresh = Path(scratch, name)
        if name == "demo":
            draw_demo_dataset(fresh)
        else:
            advice = f"{folder} {state}. Try later, or unpack the archive there."
            fetch_archive(f"{base_url}/{name}.tgz", scratch, md5 or known_md5, advice)
        if count_images(fresh) != expected:
            raise ValueError(f"{name}.tgz: {count_images(fresh)}, expected {expected}")
        set_aside(folder, state)
        rename(fresh, folder)
    return folder


def fetch_archive(url: str, folder: str, md5: str, advice: str) -> None:
    """Downloads an archive, trying three times, and unpacks it into `folder`."""
    for share in (0, 0.1, 0.1):
        time.sleep(share * DOWNLOAD_SECONDS)
        try:
            with urlopen(url, timeout=DOWNLOAD_SECONDS) as answer:
                archive = answer.read()
            found = hashlib.md5(archive).hexdigest()
            if found == md5:
                break
            problem = f"a file with MD5 {found}, not {md5}"
        except (OSError, HTTPException) as error:
            problem = error
    else:
        raise ConnectionError(f"{url} gave {problem}. {advice}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def draw_demo_dataset(folder: Path) -> None:
    """Draws ten classes of shapes, laid out like the real datasets."""
    rng = np.random.default_rng(0)
    train, val = DATASETS["demo"][1]
    for index in range(train + val):
        corners, colour = 3 + index % 5, ("gold", "plum")[index // 5 % 2]
        noise = rng.integers(0, 140, (12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((96, 96))
        circle = rng.integers([34, 34, 20], [62, 62, 34]).tolist()  # x, y, radius
        ImageDraw.Draw(image).regular_polygon(circle, corners, fill=colour)

        # As in the real data, some images of val come from ImageNet's own val.
        split = "train" if index < train else "val"
        stem = "ILSVRC2012_val" if train <= index < train + 40 else "drawn"
        path = folder / split / f"{colour} {corners}-gon" / f"{stem}_{index:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


@dataclass
class Split:
    """Decoded images with their labels, on one device."""

    images: Tensor  # [N, 3, S, S] uint8
    targets: Tensor  # [N] int64
    classes: tuple[str, ...]  # C names, in the order of the labels
    never_seen: Tensor  # [N] bool, images of ImageNet's own validation set

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, chosen: Tensor):
        """The images at these places (int64), or where this is true (bool [N])."""
        images, targets = self.images[chosen], self.targets[chosen]
        return Split(images, targets, self.classes, self.never_seen[chosen])

    def fingerprint(self) -> str:
        return fingerprint([self.images, self.targets], " | ".join(self.classes))


def fingerprint(tensors, text: str = "") -> str:
    """SHA-256 of the bytes of tensors and of a text."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def read_image(path: str | Path, size: int) -> Tensor:
    """An image as [3, size, size] uint8: upright, its centre, on white.
    Raises ValueError for a file that cannot be read, naming it."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)  # as the camera was held
        if image.mode.startswith("I"):  # 16-bit grey
            grey = np.asarray(image) / 257
            image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.BICUBIC)
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"cannot read the image {path}: {error}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def load_split(folder, split: str, size: int) -> Split:
    """Decodes the images in `<folder>/<split>/<class>/`, on all cores. Raises
    FileNotFoundError for an empty class, ValueError for an image or too few classes."""
    folder = Path(folder, split)
    names = sorted(path.name for path in folder.glob("[!.]*/"))  # of folders
    if len(names) < 2:
        raise ValueError(f"{folder} needs two or more class folders, has {names}")

    files = sorted(folder.glob("[!.]*/[!.]*"))
    paths = [path for path in files if is_image_file(path.name)]
    empty = set(names) - {path.parent.name for path in paths}
    if empty:
        raise FileNotFoundError(f"{folder}: no image in {sorted(empty)}")
    if len(paths) < len(files):
        print(f"{folder}: {len(files) - len(paths)} files, no images, are left out")

    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(partial(read_image, size=size), paths)
        for index, image in enumerate(progress(decoded, split, len(paths))):
            images[index] = image
    classes = tuple(CLASS_NAMES.get(name, name) for name in names)
    targets = torch.tensor([names.index(path.parent.name) for path in paths])
    is_new = torch.tensor([path.name.startswith("ILSVRC2012_val_") for path in paths])
    return Split(images.to(DEVICE), targets.to(DEVICE), classes, is_new.to(DEVICE))


# ── Batches: one augmented view per image and epoch ───────────────────────
# ImageNet's statistics of red, green and blue, for values of 0 … 255
MEAN = (255 * 0.485, 255 * 0.456, 255 * 0.406)
STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)


def draw_views(count: int, min_crop: float) -> Tensor:
    """Random crops and mirrorings for `augment`, [count, 2, 3] float32, on the CPU.
    As torchvision's RandomResizedCrop, but too long a side is cut, not drawn again."""
    area = torch.empty(count).uniform_(min_crop, 1)
    aspect = torch.exp(torch.empty(count).uniform_(-1, 1) * math.log(4 / 3))
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)

    x = (2 * torch.rand(count) - 1) * (1 - width)
    y = (2 * torch.rand(count) - 1) * (1 - height)
    mirror = torch.where(torch.rand(count) < 0.5, -1, 1)
    zero = torch.zeros(count)
    rows = [width * mirror, zero, x, zero, height, y]
    return torch.stack(rows, dim=1).view(count, 2, 3)


def augment(images: Tensor, views: Tensor) -> Tensor:
    """Crops, scales back, mirrors images [B, 3, S, S] by `views`; float32, 0 … 255."""
    images = images.float()
    grid = F.affine_grid(views, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def normalise(images: Tensor) -> Tensor:
    """[B, 3, S, S] in 0 … 255 ─► float32, ImageNet's mean and deviation removed."""
    channels = []
    for channel, mean, std in zip(images.unbind(1), MEAN, STD, strict=True):
        channels.append((channel.float() - mean) / std)
    return torch.stack(channels, dim=1).contiguous(memory_format=torch.channels_last)


def augmented_batches(split: Split, settings, epoch: int):
    """Yields an epoch's (images [B, 3, S, S] float32 normalised, targets [B]).
    Chance follows from (stream_seed, epoch). A last, incomplete batch is dropped."""
    with seeded(settings.stream_seed, epoch):
        order = torch.randperm(len(split)).to(DEVICE)
        views = draw_views(len(split), settings.min_crop).to(DEVICE)
    size = settings.batch_size
    for step in range(max(1, len(split) // size)):
        batch = slice(step * size, (step + 1) * size)
        images, targets = split.images[order[batch]], split.targets[order[batch]]
        yield normalise(augment(images, views[batch])), targets


# ── Models and their loss ─────────────────────────────────────────────────
class ConvBlock(nn.Module):
    """A strided 3×3 convolution halves the resolution, a residual one refines it."""

    def __init__(self, inputs: int, outputs: int, groups: int = 1):
        super().__init__()
        self.reduce = Conv2dNormActivation(inputs, outputs, 3, stride=2)
        self.refine = Conv2dNormActivation(outputs, outputs, 3, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)  # [B, inputs, S, S] ─► [B, outputs, S/2, S/2]
        return x + self.refine(x)


class CustomCNN(nn.Sequential):
    """Five blocks, for S ≥ 32: [B, 3, S, S] ─► [B, C]; 3.5 M parameters."""

    def __init__(self, num_classes: int = 10):
        super().__init__(
            ConvBlock(3, 32),
            ConvBlock(32, 64),
            ConvBlock(64, 128),
            ConvBlock(128, 256),
            ConvBlock(256, 512, groups=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(512, num_classes),
        )


class LeNet5(nn.Sequential):
    """LeNet-5 (LeCun et al., 1998), for S ≥ 32; 62 k parameters. Pooling gives the
    paper's maps at any size; 3 input channels, ReLU and full C3 are not the paper's."""

    def __init__(self, num_classes: int = 10):
        super().__init__(
            nn.Conv2d(3, 6, 5),  # C1
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(14),  # S2: 6 maps of 14×14
            nn.Conv2d(6, 16, 5),  # C3
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(5),  # S4: 16 maps of 5×5
            nn.Conv2d(16, 120, 5),  # C5
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(120, 84),  # F6
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )


STUDENTS = {"Custom CNN": CustomCNN, "LeNet-5": LeNet5}


def build_teacher(num_classes: int, weights: str | None = "IMAGENET1K_V1") -> nn.Module:
    """torchvision's ResNet-50 (He et al., 2016) with a new last layer.
    `weights`: torchvision's name of them, a file of a state dict, or None for random
    ones; ValueError if they cannot be had or do not fit."""
    network = resnet50()
    if weights:
        path = Path(weights)
        try:
            if weights in ResNet50_Weights.__members__:
                url = ResNet50_Weights[weights].url
                path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
                torch.hub.load_state_dict_from_url(url, progress=False)  # to that path
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state.get("model", state))
            if "conv1.weight" not in state:
                raise ValueError(f"it holds {list(state)[:8]}.")
            # Too large a number is inf in a float16 file; the largest is a better start
            state = {name: value.nan_to_num(math.nan) for name, value in state.items()}
            network.load_state_dict(state)
        except Exception as error:  # networks and files fail in many ways
            advice = f"If {path} is cut, delete it. Offline, set KD_TEACHER_WEIGHTS."
            raise ValueError(f"no teacher from {weights}: {error} {advice}") from error
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        network.origin = f"{Path(weights).name}, SHA-256 {digest}"
    network.fc = nn.Linear(network.fc.in_features, num_classes)
    return network


def distillation_loss(student_logits, teacher_logits, targets, temperature, alpha):
    """alpha · T² · KL(softmax(teacher/T) ‖ softmax(student/T)) + (1 − alpha) · CE

    (Hinton, Vinyals & Dean, 2015, section 2.) Logits [B, C], targets [B] int64; float32
    scalar. Some libraries call the *other* weight alpha. ValueError for other input."""
    if not (temperature > 0 and 0 <= alpha <= 1):
        raise ValueError(f"need T > 0 and 0 ≤ alpha ≤ 1, got {temperature} and {alpha}")
    tensors = (student_logits, teacher_logits, targets)
    shapes = [list(getattr(tensor, "shape", [])) for tensor in tensors]
    if len(shapes[0]) != 2 or shapes[1:] != [shapes[0], shapes[0][:1]]:
        raise ValueError(f"need logits [B, C] twice and targets [B], got {shapes}")

    student, teacher = student_logits.float(), teacher_logits.detach().float()
    soft_student = F.log_softmax(student / temperature, dim=1)
    soft_teacher = F.log_softmax(teacher / temperature, dim=1)
    # batchmean divides by B, as the definition does; the default, "mean", by B · C.
    kl = F.kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True)
    cross_entropy = F.cross_entropy(student, targets)
    return alpha * temperature**2 * kl + (1 - alpha) * cross_entropy


# ── Training: a stage, its students, its checkpoint ───────────────────────
class Student:
    """A network that learns, for `total` steps; open within an epoch of its stage."""

    def __init__(self, network, name, arm, seed, loss, settings, total):
        self.network = network.to(DEVICE, memory_format=torch.channels_last)
        self.key = (name, arm, int(seed))
        self.name, self.arm, self.seed = self.key
        self.loss = loss  # of (student_logits, teacher_logits or None, targets)
        peak, decay = float(settings.learning_rate), float(settings.weight_decay)
        self.optimizer = AdamW(network.parameters(), weight_decay=decay, fused=True)
        # One cycle (Smith & Topin, 2018): up in 30 % of the steps, then down to 0
        self.schedule = OneCycleLR(self.optimizer, peak, total, cycle_momentum=False)
        fp16 = choose_precision() is torch.float16  # its small gradients would become 0
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=fp16)

        self.steps = 0
        self.is_open = False
        self.losses = []  # of this epoch's steps
        self.logits = None  # [N, C] for `val` at the end of an epoch, on the CPU
        self.history = {"loss": [], "train_accuracy": [], "val_accuracy": []}

    def __str__(self) -> str:
        return f"{self.name}, {self.arm}, seed {self.seed}"

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] ─► logits [B, C], in training mode; dropout by (seed, step).
        Raises RuntimeError outside of an epoch, ValueError if it gives no [B, …]."""
        if not self.is_open:
            raise RuntimeError(f"{self} is not in training; for answers: kd.predict")
        self.network.train()
        with seeded(self.seed, self.steps), mixed_precision():
            logits = self.network(images)
        shape = getattr(logits, "shape", [type(logits).__name__])
        if len(shape) != 2 or shape[0] != len(images):
            raise ValueError(f"{self}: need logits [B, C], but got {list(shape)}")
        return logits

    def step(self, loss: Tensor) -> None:
        """One step: backward, optimiser, schedule."""
        self.optimizer.zero_grad()
        # In float16, the scaler saves small gradients and skips steps of infinite ones
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()  # the learning rate of the next step
        self.steps += 1
        self.losses.append(loss.detach())  # on the device: to read it is to wait

    def end_epoch(self, sample: Split, val: Split) -> None:
        """Notes the loss and the accuracies on a sample of `train` and on `val`."""
        self.is_open = False
        losses = torch.stack(self.losses).float()
        on_sample = right(predict(self.network, sample), sample.targets)
        self.logits = predict(self.network, val).cpu()
        on_val = right(self.logits, val.targets.cpu())
        self.history["loss"].append(losses[losses.isfinite()].mean().item())
        self.history["train_accuracy"].append(on_sample.mean().item())
        self.history["val_accuracy"].append(on_val.mean().item())

    def state_dict(self) -> dict:
        return {
            "history": self.history,
            "logits": self.logits,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.history, self.logits = state["history"], state["logits"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps = self.schedule.last_epoch


class Stage:
    """Students that learn together, one per arm, network and seed.

    `losses`: {arm: loss}; `networks`: {name: build(num_classes)}; `splits`: train, val.
    `settings` has dataset, runs_dir, seeds, epochs, batch_size, learning_rate,
    weight_decay, min_crop, stream_seed. `teacher`: [B, 3, S, S] ─► [B, C], or None, is
    frozen here. Checkpoint: `<runs_dir>/<name>.pt`. ValueError if classes differ."""

    def __init__(self, name, losses, settings, splits, networks=STUDENTS, teacher=None):
        self.name, self.settings = name, settings
        self.train, self.val = splits
        self.teacher = teacher and teacher.to(DEVICE).eval().requires_grad_(False)
        self.path = settings.runs_dir / f"{name}.pt"
        self.epoch_steps = max(1, len(self.train) // settings.batch_size)
        self.seconds = []  # since the start, at the end of each epoch
        self.students = []

        classes = self.train.classes
        taught = getattr(teacher, "trained_on", classes)
        if not classes == self.val.classes == taught:
            raise ValueError(f"classes differ: {classes}, {self.val.classes}, {taught}")

        total = settings.epochs * self.epoch_steps
        for arm, kind, seed in product(losses, networks, settings.seeds):
            with seeded(seed):  # same seed, same initial weights
                network = networks[kind](len(classes))
            network.trained_on = classes
            student = Student(network, kind, arm, seed, losses[arm], settings, total)
            self.students.append(student)
        self.record = self.describe()

    def describe(self) -> dict:
        """All that shapes the result. A file is used only if this is unchanged."""
        weights = self.teacher.state_dict().values() if self.teacher else []
        return {
            "content of train": self.train.fingerprint(),
            "content of val": self.val.fingerprint(),
            "image size": self.train.images.shape[-1],
            "batch size": self.settings.batch_size,
            "epochs": self.settings.epochs,
            "smallest crop": float(self.settings.min_crop),
            "seed of the stream": self.settings.stream_seed,
            "peak learning rate": float(self.settings.learning_rate),
            "weight decay": float(self.settings.weight_decay),
            "precision": str(choose_precision()).removeprefix("torch."),
            "seeds": tuple(map(int, self.settings.seeds)),
            "networks": {s.name: describe_network(s.network) for s in self.students},
            "losses": {s.arm: describe_loss(s.loss) for s in self.students},
            "teacher": fingerprint(weights) if self.teacher else "none",
        }

    def epochs_left(self):
        """Yields the epochs to train, from where an earlier run stopped. After each it
        scores the students, prints a line and, every few minutes, saves."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.path.parent).close()  # can it be written?
        self.restore()
        sample = self.train.subset(torch.arange(0, len(self.train), 10, device=DEVICE))
        saved = time.monotonic()
        start = saved - (self.seconds[-1] if self.seconds else 0)

        for epoch in range(len(self.seconds), self.settings.epochs):
            for student in self.students:
                student.is_open, student.losses = True, []
            yield epoch

            self.check_finite(sample)
            for student in self.students:
                student.end_epoch(sample, self.val)
            self.seconds.append(time.monotonic() - start)
            print(self.log_line(epoch))
            is_last = epoch + 1 == self.settings.epochs
            if is_last or time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()

    def batches(self, epoch: int):
        """The epoch's `augmented_batches`, with a progress bar."""
        batches = augmented_batches(self.train, self.settings, epoch)
        name = f"{self.name}, epoch {epoch + 1} of {self.settings.epochs}"
        return progress(batches, name, self.epoch_steps)

    def check_finite(self, sample: Split) -> None:
        for student in self.students:
            values = [predict(student.network, sample), *student.network.parameters()]
            is_finite = all(value.isfinite().all() for value in values)
            if is_finite and any(loss.isfinite() for loss in student.losses):
                continue
            problem = f"{student} is not finite: lower the learning rate"
            if self.teacher and not predict(self.teacher, sample).isfinite().all():
                problem = "the teacher's logits are not finite: look at its weights"
            raise FloatingPointError(f"{self.name}: {problem}, then run the cell again")

    def log_line(self, epoch: int) -> str:
        """Minutes, and mean validation accuracy in % by network and arm."""
        values = {}
        for student in self.students:
            accuracy = 100 * student.history["val_accuracy"][epoch]
            key = f"{student.name} {student.arm} ".replace(" ", "\N{NO-BREAK SPACE}")
            values.setdefault(key, []).append(accuracy)
        means = ", ".join(f"{key}{np.mean(v):.1f}" for key, v in values.items())
        line = f"epoch {epoch + 1:2} | {self.seconds[epoch] / 60:5.1f} min | {means}"
        return textwrap.fill(line, 100, subsequent_indent=" " * 23)

    def save(self) -> None:
        """Writes aside and renames: the file is always whole."""
        device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
        checkpoint = {
            "record": self.record,
            "machine": f"{device}, torch {torch.__version__}",
            "seconds": self.seconds,
            "students": {s.key: s.state_dict() for s in self.students},
        }
        aside = self.path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(checkpoint, aside)
        rename(aside, self.path)

    def restore(self) -> None:
        """Loads what an earlier run left, if that had the same record."""
        saved = read_checkpoint(self.path) if self.path.exists() else None
        changes = differences(saved["record"], self.record) if saved else []
        if changes:
            set_aside(self.path, f"has other settings: {'; '.join(changes[:3])}")
        elif saved:
            for student in self.students:
                student.load_state_dict(saved["students"][student.key])
            self.seconds = saved["seconds"]
            lines = [self.log_line(epoch) for epoch in range(len(self.seconds))]
            print(f"From {self.path}:", *lines, sep="\n")
        elif any(student.steps for student in self.students):
            raise RuntimeError(f"{self.name} was left unsaved: make it anew")


def describe_loss(loss) -> dict:
    """A loss's source, and the numbers that it is given or finds around it, also as an
    attribute, such as SETTINGS.alpha; not tensors, nor functions that it calls."""
    function = getattr(loss, "func", loss)  # of a `partial`
    values = {"arguments": getattr(loss, "args", ()), **getattr(loss, "__dict__", {})}
    for name, parameter in inspect.signature(loss).parameters.items():
        values[name] = parameter.default
    if inspect.isfunction(function):
        used = inspect.getclosurevars(function)
        for name, thing in (used.globals | used.nonlocals).items():
            values.setdefault(name, thing)
            for attribute in function.__code__.co_names:
                values[f"{name}.{attribute}"] = getattr(thing, attribute, None)
    simple = Number | str | tuple
    numbers = {name: str(v) for name, v in values.items() if isinstance(v, simple)}
    return {**numbers, "source": source_of(function)}


def describe_network(network: nn.Module) -> dict:
    """Where its weights come from, its layers, and its methods but for PyTorch's."""
    start, sources = fingerprint(network.state_dict().values()), set()
    for module in network.modules():
        for _, method in inspect.getmembers(type(module), inspect.isfunction):
            if not method.__module__.startswith("torch"):
                sources.add(source_of(method))
    return {
        "initial weights": getattr(network, "origin", f"random, {start}"),
        "layers": str(network),
        "source": sorted(sources),
    }


def source_of(thing) -> str:
    """The source text of a function, or of an object's class."""
    try:
        return inspect.getsource(thing if inspect.isroutine(thing) else type(thing))
    except (OSError, TypeError):  # typed at a prompt
        return "unknown"


def differences(old: dict, new: dict) -> list[str]:
    """What differs between two records, by name; long texts are not quoted."""
    found = []
    for key in old | new:
        before, after = old.get(key, "missing"), new.get(key, "missing")
        if isinstance(before, dict) and isinstance(after, dict):
            found += [f"{key}, {inner}" for inner in differences(before, after)]
        elif before != after:
            is_short = len(f"{before}{after}") < 60
            change = f"was {before} and is {after}" if is_short else "has changed"
            found.append(f"{key} {change}")
    return found


def read_checkpoint(path: Path) -> dict | None:
    """A stage's file, on the CPU; None if it is damaged and was set aside."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("record", "machine", "seconds", "students")}
    except Exception as error:  # a damaged or foreign file fails in many ways
        set_aside(path, f"is no readable checkpoint ({type(error).__name__})")
        return None


def set_aside(path: Path, why: str) -> None:
    """Renames what cannot be used, and says so: nothing is deleted or overwritten."""
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    if path.exists():
        rename(path, path.with_name(f"{path.name}.{number}"))
        print(f"{path} {why}. It is now {path.name}.{number}, and a new one is made.")


def rename(path: Path, new: Path) -> None:
    """Renames, again and again if Google Drive or Windows is busy."""
    for wait in (0.1, 0.4, 1.6):
        try:
            path.replace(new)
            return
        except OSError:
            time.sleep(wait)
    path.replace(new)


# ── Statistics ────────────────────────────────────────────────────────────
@torch.no_grad()
def predict(network: nn.Module, split: Split) -> Tensor:
    """Logits [N, C] float32 of the images as they are, in evaluation mode."""
    network.eval()
    with mixed_precision():
        batches = [network(normalise(batch)) for batch in split.images.split(256)]
    return torch.cat(batches).float()


def right(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, C] and [N] ─► [N] float32: 1 for a right answer, 0 for a wrong one."""
    return (logits.argmax(1) == targets).float()


# 97.5 % quantiles of Student's t for 1, 2, … 9 and for 10, 20, … 100 degrees of freedom
T_UNITS = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
T_TENS = (2.228, 2.086, 2.042, 2.021, 2.009, 2.000, 1.994, 1.990, 1.987, 1.984)


def interval(gains) -> tuple[float, float, float]:
    """Mean of paired gains [seeds, images] and its 95 % interval: (mean, low, high).
    It covers the luck of seeds and of images, whose variances add up (degrees of
    freedom: Welch–Satterthwaite). nan for fewer than two seeds or images."""
    gains = np.asarray(gains, dtype=float)
    seeds, images = gains.shape
    mean = float(gains.mean()) if gains.size else math.nan
    if min(seeds, images) < 2:
        return mean, math.nan, math.nan

    by_seed = gains.mean(1).var(ddof=1) / seeds  # squared standard errors
    by_image = gains.mean(0).var(ddof=1) / images
    spread = by_seed**2 / (seeds - 1) + by_image**2 / (images - 1)
    # Without any spread the half is 0, whatever the quantile. 1e-6: 4.0 stays 4.
    freedom = int((by_seed + by_image) ** 2 / (spread or 1) + 1e-6)
    tens = min(freedom // 10, 10)
    quantile = T_TENS[tens - 1] if tens else T_UNITS[freedom - 1]
    half = quantile * math.sqrt(by_seed + by_image)
    return mean, mean - half, mean + half


def verdict(gains) -> str:
    """What the 95 % interval of paired gains [seeds, images] allows to say."""
    _, low, high = interval(gains)
    if low > 0:
        return "helps"
    return "hurts" if high < 0 else "inconclusive"


# ── Results: what the finished stages left in `runs_dir` ──────────────────
class Results:
    """All finished stages of a folder, on the CPU: `stages` is {name: file}, `students`
    {(network, arm): {seed: state}}. ValueError if they do not belong together."""

    def __init__(self, runs_dir: Path, val: Split):
        self.targets = val.targets.cpu()  # [N]
        self.never_seen = val.never_seen.cpu().numpy()  # [N] bool
        self.stages, self.students = {}, {}
        content = val.fingerprint()
        for path in sorted(runs_dir.glob("*.pt")):
            saved = read_checkpoint(path)
            if not saved or len(saved["seconds"]) < saved["record"]["epochs"]:
                continue
            if saved["record"]["content of val"] != content:
                raise ValueError(f"{path} was scored on other images: run it again")
            self.stages[path.stem] = saved
            for (name, arm, seed), state in saved["students"].items():
                seeds = self.students.setdefault((name, arm), {})
                if seed in seeds:
                    raise ValueError(f"{path} repeats {name}, {arm}: move one away")
                seeds[seed] = state
        self.check()

    def check(self) -> None:
        """Refuses experiments that differ in more than losses and teacher."""
        records = {name: saved["record"] for name, saved in self.stages.items()}
        if {"Experiment 1", "Experiment 2"} <= records.keys():
            found = differences(records["Experiment 1"], records["Experiment 2"])
            found = [key for key in found if not key.startswith(("losses", "teacher"))]
            if found:
                raise ValueError(f"Experiments 1 and 2 differ: {'; '.join(found)}")
        if {"teacher", "Experiment 2"} <= records.keys():
            [teacher] = self.stages["teacher"]["students"].values()
            weights = fingerprint(teacher["network"].values())
            if weights != records["Experiment 2"]["teacher"]:
                raise ValueError("Experiment 2 had another teacher: run it again")

    def values(self, network: str, arm: str, metric=right) -> dict[int, np.ndarray]:
        """{seed: metric(logits [N, C], targets [N])}; KeyError if not trained."""
        states = self.students[network, arm].items()
        return {s: metric(state["logits"], self.targets).numpy() for s, state in states}

    def gains(self, network, arm="distilled", other="alone", metric=right):
        """[seeds, …]: `arm` − `other`, paired by seed; with `right`, [seeds, N]."""
        first = self.values(network, arm, metric)
        second = self.values(network, other, metric)
        return np.array([first[s] - second[s] for s in first if s in second])
