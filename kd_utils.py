"""Knowledge distillation: what the two notebooks import.

    download ─► split ─► batches ─┬─► teacher (frozen) ─┐
                uint8, on device  └─► students ──► loss ◄┘ ─► step ─► results

Shapes: N images, B images in a batch, C classes, S pixels a side.
"""

import copy
import hashlib
import math
import os
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from itertools import chain, islice, product
from pathlib import Path
from sys import stdout

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torchvision import models
from torchvision.datasets.folder import is_image_file, make_dataset
from torchvision.datasets.utils import download_url
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm


# ── The loss ──────────────────────────────────────────────────────────────
def distillation_loss(student_logits, teacher_logits, targets, temperature, alpha):
    """alpha · T² · KL(softmax(teacher/T) ‖ softmax(student/T)) + (1 − alpha) · CE

    (Hinton, Vinyals & Dean, 2015, section 2.) Logits [B, C], targets [B] int64; float32
    scalar. Some libraries call the *other* weight alpha. ValueError: shape, T, α."""
    if not (temperature > 0 and 0 <= alpha <= 1):
        raise ValueError(f"need T > 0 and 0 ≤ alpha ≤ 1, got {temperature} and {alpha}")
    given = (student_logits, teacher_logits, targets)
    shapes = [list(getattr(tensor, "shape", [])) for tensor in given]
    if len(shapes[0]) != 2 or shapes[1:] != [shapes[0], shapes[0][:1]]:
        raise ValueError(f"need logits [B, C] twice and targets [B], got {shapes}")

    student, teacher = student_logits.float(), teacher_logits.detach().float()
    soft_student = F.log_softmax(student / temperature, dim=1)
    soft_teacher = F.log_softmax(teacher / temperature, dim=1)
    # batchmean divides by B, as the definition does; the default, "mean", by B · C
    kl = F.kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True)
    cross_entropy = F.cross_entropy(student, targets)
    return alpha * temperature**2 * kl + (1 - alpha) * cross_entropy


# ── Networks ──────────────────────────────────────────────────────────────
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
        self.to(memory_format=torch.channels_last)  # faster convolutions


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


def build_classifier(num_classes: int, name="resnet50", weights=None) -> nn.Module:
    """A torchvision classifier with a new last layer, which has to be trained.
    `weights`: torchvision's name of them, the file of a state dict of this network, or
    None for random ones. ValueError if the network or its weights cannot be had."""
    network = models.get_model(name, weights=None, num_classes=num_classes)
    if weights is not None:
        load_all_but_last_layer(network, name, str(weights))
    return network.to(memory_format=torch.channels_last)


def load_all_but_last_layer(network: nn.Module, name: str, weights: str) -> None:
    named, path = models.get_model_weights(name).__members__, Path(weights).expanduser()
    if weights not in named and not path.is_file():
        raise ValueError(f"weights {weights!r}: no file, nor one of {', '.join(named)}")
    try:
        if weights in named:
            state = named[weights].get_state_dict(progress=False)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state.get("model", state))
        network.initial_weights = f"{path.name}, SHA-256 {fingerprint(state.values())}"
        # float16 makes inf of a number beyond 65,504: its largest is nearer. nan stays
        state = {key: value.nan_to_num(nan=math.nan) for key, value in state.items()}
        own = network.state_dict()
        last_layer = list(own)[-1].rpartition(".")[0]
        state |= {key: own[key] for key in own if key.startswith(f"{last_layer}.")}
        network.load_state_dict(state)
    except Exception as error:  # networks and files fail in many ways
        raise ValueError(f"no {name} from {weights}: {str(error)[:300]}") from error


# ── Device, precision, chance ─────────────────────────────────────────────
VERSION = 4  # which the notebooks ask for
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.backends.cudnn.benchmark = True  # on a GPU: tries the algorithms, keeps the best


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
    # With its cache, a loop inside of it would go on with the weights of the first step
    how = {"enabled": precision != torch.float32, "cache_enabled": False}
    return torch.autocast(DEVICE.type, precision, **how)


@contextmanager
def seeded(seed: int, step: int = 0):
    """Random numbers inside follow from (seed, step); outside they go on unchanged."""
    generators = (torch.default_generator, *torch.cuda.default_generators)
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:  # torch.manual_seed does this 100 times slower
            generator.manual_seed(seed * 1_000_003 + step)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


# ── Settings ──────────────────────────────────────────────────────────────
def check_numbers(settings, **limits) -> None:
    """Turns numbers into plain ones. ValueError for one outside of its (low, high)."""
    for setting in fields(settings):
        kind, value = type(setting.default), getattr(settings, setting.name)
        low, high = limits.get(setting.name, (1 if kind is int else 1e-9, 1e9))
        if kind in (int, float):
            is_real = isinstance(value, int | float | np.number)
            if not is_real or not low <= value <= high or kind(value) != value:
                need = f"{kind.__name__} in {low:g} … {high:g}"
                raise ValueError(f"{setting.name}: {need} is needed, not {value!r}")
            object.__setattr__(settings, setting.name, kind(value))


@dataclass(frozen=True)
class Recipe:
    """What belongs to a network: the same in all of its arms."""

    learning_rate: float = 2e-3  # at its peak
    temperature: float = 4.0  # T, which softens the answers
    alpha: float = 0.9  # weight of the *distillation* term; the labels get 1 - alpha

    def __post_init__(self):
        check_numbers(self, alpha=(0, 1))


@dataclass(frozen=True)
class Settings:
    """All numbers of a study: some for the notebooks only. ValueError for nonsense."""

    dataset: str = "imagewoof2-160"  # or a folder or zip of your own
    data_dir: Path = Path("data")
    runs_dir: Path = Path("runs")  # checkpoints and results
    keep_weights: bool = True  # False: finished students leave their answers only

    image_size: int = 128  # pixels a side
    batch_size: int = 64  # images
    min_crop: float = 0.35  # the least share of an image's area that a view shows
    stream_seed: int = 1  # of the batches, which all students share

    seeds: tuple[int, ...] = (5, 6, 7, 8, 9)  # a student per network, arm and seed
    epochs: int = 20  # passes of every student over the training images
    weight_decay: float = 0.05
    recipe: Recipe = Recipe()  # of every network without an own one in `recipes`
    recipes: dict[str, Recipe] = field(default_factory=dict)  # {network: recipe}

    teacher: str = "resnet50"  # torchvision's name
    teacher_weights: str | None = "IMAGENET1K_V1"  # or a file, or None: random
    teacher_epochs: int = 2
    trial_epochs: int = 20  # of students that help to choose a recipe
    trial_seeds: tuple[int, ...] = (200, 201, 202)

    def __post_init__(self):
        from_0 = dict.fromkeys(("stream_seed", "weight_decay"), (0, 1e9))
        check_numbers(self, min_crop=(0.01, 1), image_size=(32, 4096), **from_0)
        for name in ("seeds", "trial_seeds"):
            given = getattr(self, name)
            seeds = list(given) if np.iterable(given) else []
            if not seeds or sorted(set(map(int, seeds))) != sorted(seeds):
                raise ValueError(f"{name}: such as (0, 1), none twice, not {given!r}")
            object.__setattr__(self, name, tuple(map(int, seeds)))
        object.__setattr__(self, "runs_dir", Path(self.runs_dir).expanduser())

    def recipe_of(self, network_name: str) -> Recipe:
        return self.recipes.get(network_name, self.recipe)


# ── Students, and the stage in which they learn ───────────────────────────
CHECKPOINT_SECONDS = 300  # at least, between two checkpoints
progress_bar = partial(tqdm, file=stdout, ncols=80, leave=False, mininterval=1, delay=5)


class Student:
    """A network that learns by the loss of one arm, in the epochs of its stage."""

    def __init__(self, network, key, loss, settings: Settings, epoch_steps: int):
        self.network = network.to(DEVICE)
        self.network_name, self.arm, self.seed = self.key = key
        self.recipe = settings.recipe_of(self.network_name)
        self.loss = partial(loss, recipe=self.recipe)
        peak, decay = self.recipe.learning_rate, settings.weight_decay
        self.optimizer = AdamW(network.parameters(), weight_decay=decay, fused=True)
        # One cycle (Smith & Topin, 2018): up in 30 % of the steps, then down to 0
        total = settings.epochs * epoch_steps
        self.schedule = OneCycleLR(self.optimizer, peak, total, cycle_momentum=False)
        fp16 = choose_precision() is torch.float16  # its small gradients would become 0
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=fp16)

        self.in_epoch, self.steps = False, 0
        self.losses = []  # of this epoch's steps, on the device
        self.logits = None  # [N, C] for `val` at the end of an epoch, on the CPU
        self.history = {"loss": [], "train_accuracy": [], "val_accuracy": []}

    def __str__(self) -> str:
        return f"{self.network_name}, {self.arm}, seed {self.seed}"

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] ─► logits [B, C]. RuntimeError outside of an epoch."""
        if not self.in_epoch:
            raise RuntimeError(f"{self} is not in training; for answers: kd.predict")
        self.network.train()
        with seeded(self.seed, self.steps), mixed_precision():
            return self.network(images)

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

    def end_epoch(self, sample: "Split", val: "Split") -> None:
        """Notes the loss, and the accuracies on a sample of `train` and on `val`.
        FloatingPointError: not finite (in float16, the scaler may skip some steps)."""
        self.in_epoch = False
        losses = torch.stack(self.losses).float().cpu()
        self.logits = predict(self.network, val).cpu()
        on_val = correct(self.logits, val.targets.cpu())
        on_sample = correct(predict(self.network, sample), sample.targets)
        good_losses = losses[losses.isfinite()]
        if 2 * len(good_losses) < len(losses) or not self.logits.isfinite().all():
            raise FloatingPointError(f"{self} is not finite: lower its learning rate")
        self.history["loss"].append(good_losses.mean().item())
        self.history["train_accuracy"].append(on_sample.mean().item())
        self.history["val_accuracy"].append(on_val.mean().item())

    def state_dict(self, parts) -> dict:
        state = {part: getattr(self, part).state_dict() for part in parts}
        return {**state, "history": self.history, "logits": self.logits}

    def load_state_dict(self, state: dict) -> None:
        self.history, self.logits = state.pop("history"), state.pop("logits")
        for part, value in state.items():
            getattr(self, part).load_state_dict(value)
        self.steps = self.schedule.last_epoch
        self.network = self.network if "network" in state else None  # answers only


class Stage:
    """Students that learn together, one per arm (a way to learn: its loss), network and
    seed. All arms of a seed have the same initial weights, batches and dropout.
    `losses`: {arm: loss(student_logits, teacher_logits or None, targets, recipe)};
    `networks`: {name: build}, called with num_classes=C; `splits`: train and val;
    `teacher`: a module, [B, 3, S, S] ─► [B, C], is frozen here. A stage's file is
    `<runs_dir>/<name>.pt`. ValueError for names, classes, logits that do not fit."""

    def __init__(self, name, losses, settings, splits, networks=STUDENTS, teacher=None):
        if not name.strip(".") or Path(name).name != name:
            raise ValueError(f"a stage is named like a file, without folders: {name!r}")
        self.name, self.settings = name, settings
        self.train_split, self.val_split = splits
        self.path = settings.runs_dir / f"{name}.pt"
        self.epoch_steps = max(1, len(self.train_split) // settings.batch_size)
        self.students = []
        self.seconds = []  # since the start, after each epoch
        classes = self.train_split.classes
        for names in (self.val_split.classes, getattr(teacher, "class_names", classes)):
            if tuple(names) != classes:
                differ = sorted(set(names) ^ set(classes)) or f"in their order, {names}"
                raise ValueError(f"{name}: train, val and teacher differ: {differ}")
        self.teacher = teacher
        if teacher is not None:
            teacher.to(DEVICE, torch.float32).eval().requires_grad_(False)
        self.record = describe_stage(self, networks)
        for key in product(losses, networks, settings.seeds):
            self.add_student(*key, losses, networks)

    def add_student(self, arm, network_name, seed, losses, networks) -> None:
        with seeded(seed):  # same seed, same initial weights
            classes = self.train_split.classes
            network = networks[network_name](num_classes=len(classes))
        network.class_names, study = classes, self.record["study"]
        if f"{network_name}, seed {seed}" not in study:
            behaviour = describe_network(network_name, network, self.train_split)
            study[f"{network_name}, seed {seed}"] = behaviour
        key = (str(network_name), str(arm), seed)
        student = Student(network, key, losses[arm], self.settings, self.epoch_steps)
        found = describe_loss(student, classes, self.teacher)
        self.record["losses"][str(student)] = found
        for other in [self.teacher or nn.Module(), *(s.network for s in self.students)]:
            if not set(network.parameters()).isdisjoint(other.parameters()):
                raise ValueError(f"{student} shares weights with others: build it anew")
        self.students.append(student)

    def epochs_left(self):
        """Yields the epochs to train, from where an earlier run stopped. After each it
        scores the students and, every few minutes, saves."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        restore(self)
        sample = self.train_split.subset(slice(0, None, 10))
        saved = time.monotonic()
        start = saved - (self.seconds[-1] if self.seconds else 0)

        epochs = self.settings.epochs
        for epoch in range(len(self.seconds), epochs):
            for student in self.students:
                student.in_epoch, student.losses = True, []
            yield epoch
            for student in self.students:
                student.end_epoch(sample, self.val_split)
            spent = time.monotonic() - start
            self.seconds.append(spent)
            if epoch in (0, (epochs - 1) // 2, epochs - 1):
                print(f"{self.name}: epoch {epoch + 1}, {spent / 60:.1f} minutes")
            if epoch + 1 == epochs or time.monotonic() - saved > CHECKPOINT_SECONDS:
                save(self)
                saved = time.monotonic()

    def batches(self, epoch: int):
        batches = augmented_batches(self.train_split, self.settings, epoch)
        told = f"{self.name[:30]}, epoch {epoch + 1}"
        return progress_bar(batches, told, self.epoch_steps)


# ── Batches: one augmented view per image and epoch ───────────────────────
MEAN = (255 * 0.485, 255 * 0.456, 255 * 0.406)  # ImageNet's: red, green, blue
STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)  # for values of 0 … 255


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
    return torch.stack([width * mirror, zero, x, zero, height, y], 1).view(count, 2, 3)


def augment(images: Tensor, views: Tensor) -> Tensor:
    """Crops, scales back, mirrors images [B, 3, S, S] by `views`; float32, 0 … 255."""
    images = images.float()
    grid = F.affine_grid(views, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def normalise(images: Tensor) -> Tensor:
    """[B, 3, S, S] in 0 … 255 ─► float32, ImageNet's mean and deviation removed."""
    channels = zip(images.float().unbind(1), MEAN, STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)


def augmented_batches(split: "Split", settings: Settings, epoch: int):
    """Yields an epoch's (images [B, 3, S, S] float32 normalised, targets [B]).
    Chance follows from (stream_seed, epoch). A last, incomplete batch is dropped."""
    with seeded(settings.stream_seed, epoch):
        order = torch.randperm(len(split)).to(DEVICE)
        views = draw_views(len(split), settings.min_crop).to(DEVICE)
    size = settings.batch_size
    batches = zip(order.split(size), views.split(size), strict=True)
    for chosen, view in islice(batches, max(1, len(split) // size)):
        yield normalise(augment(split.images_at(chosen), view)), split.targets[chosen]


# ── Data: from an archive to uint8 images on the device ───────────────────
BASE_URL = "https://s3.amazonaws.com/fast-ai-imageclas"
DATASETS = {  # MD5 of the archive, images in train and val
    "imagewoof2-160": ("3d200a7be99704a0d7509be2a9fbfe15", (9025, 3929)),
    "imagenette2-160": ("e793b78cc4c9e9a4ccc0c1155377a412", (9469, 3925)),
}


def download_dataset(name: str, root="data", base_url=BASE_URL, md5=None) -> Path:
    """A dataset's folder, downloaded unless it is there. ValueError (name, number of
    images), ConnectionError, tarfile.FilterError (hostile archive)."""
    if name not in DATASETS:
        raise ValueError(f"{name!r}: no dataset, only {', '.join(DATASETS)}")
    folder, (known_md5, expected) = Path(root, name).expanduser(), DATASETS[name]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            url = f"{base_url}/{name}.tgz"
            try:
                download_url(url, scratch, md5=md5 or known_md5)
            except Exception as error:  # networks fail in many ways
                raise ConnectionError(f"{url} cannot be had now: {error}") from error
            with tarfile.open(Path(scratch, f"{name}.tgz")) as tar:
                tar.extractall(scratch, filter="data")
            Path(scratch, name).rename(folder)
    found = tuple(len(list(folder.glob(f"{s}/*/[!.]*"))) for s in ("train", "val"))
    if found != expected:
        raise ValueError(f"{folder} holds {found} images, not {expected}: move it away")
    return folder


@dataclass(frozen=True)
class Split:
    """N of the M photographs of a dataset, on one device. All splits share them."""

    pixels: Tensor  # [M, 3, S, S] uint8
    paths: list[str]  # M files
    classes: tuple[str, ...]  # C names, in the order of the labels
    places: Tensor  # [N] int64: which of the M
    targets: Tensor  # [N] int64, the labels; -1: none
    whole: "Split | None" = None  # what this is a part of

    def __len__(self) -> int:
        return len(self.places)

    def images_at(self, chosen) -> Tensor:
        """A copy of these of the N images."""
        return self.pixels[self.places[chosen]]

    def batches(self):
        """Yields all images as they are, [B, 3, S, S] uint8."""
        for places in self.places.split(256):
            yield self.pixels[places]

    def subset(self, chosen: Tensor):
        """The images at these places (int64), or where this is true (bool [N])."""
        places, targets = self.places[chosen], self.targets[chosen]
        return replace(self, places=places, targets=targets, whole=self.whole or self)

    def fingerprint(self) -> str:
        return fingerprint(chain(self.batches(), [self.targets]), str(self.classes))


def fingerprint(tensors, text: str = "") -> str:
    """SHA-256 of the bytes of tensors and of a text."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def read_image(path: str | Path, size: int) -> Tensor:
    """An image as [3, size, size] uint8: upright, its centre, on white; of more than
    8 bits, from its darkest to its brightest. ValueError, naming the file, for none."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)  # as the camera was held
            zero_is_white = getattr(file, "tag_v2", {}).get(262) == 0  # in a TIFF
        if image.mode[0] in "IF":  # 16 or 32 bits, whose white is not known
            grey = np.asarray_chkfinite(image, dtype=float)
            grey = -grey if zero_is_white else grey  # of 8 bits, Pillow does this
            grey = 255 * (grey - grey.min()) / max(np.ptp(grey), 1e-9)
            image = Image.fromarray(grey.round().astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.BICUBIC)
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"cannot read the image {path}: {error}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def decode(paths, size: int) -> tuple[Tensor, Tensor]:
    """Images [M, 3, size, size] uint8, on all cores, and which could be read [M]."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    readable = torch.zeros(len(paths), dtype=torch.bool)

    def read(place: int) -> None:
        with suppress(ValueError):
            images[place] = read_image(paths[place], size)
            readable[place] = True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(read, range(len(paths)))
        list(progress_bar(done, "photographs", len(paths)))
    return images.to(DEVICE), readable


def class_folders(folder: Path) -> list[str]:
    return sorted({p.name for p in folder.glob("[!.]*/")} - {"unlabelled", "__MACOSX"})


def find_classes(folder: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """The sides, train and val or only the folder itself, and {class folder: label}."""
    is_split = (folder / "train").is_dir() and (folder / "val").is_dir()
    sides = ("train", "val") if is_split else (".",)
    first, last = (class_folders(folder / side) for side in (sides[0], sides[-1]))
    differ = sorted(set(first) ^ set(last))
    if differ:
        raise ValueError(f"{folder}: train and val differ by the classes {differ}")
    if len(first) < 2 or {"train", "val", "valid", "test"} & set(first):
        raise ValueError(f"{folder}: need train and val, or class folders; has {first}")
    return sides, {name: label for label, name in enumerate(first)}


def list_photographs(folder: Path, numbers: dict[str, int]) -> list[tuple[str, int]]:
    """(path, number) of `<folder>/<name>/**`, as torchvision's ImageFolder does."""

    def is_photograph(path: str) -> bool:  # and not hidden, such as a Mac's ._dog.jpg
        return is_image_file(path) and f"{os.sep}." not in path[len(str(folder)) :]

    return make_dataset(folder, numbers, None, is_photograph, allow_empty=True)


def load_splits(folder, size: int, names=None) -> dict[str, Split]:
    """Decodes `train`, `val` and, which may be empty, `unlabelled`. Without train and
    val, a fifth of each class becomes val. What is hidden, no image or cannot be read
    is left out. `names`: {folder: its class}. ValueError: few, empty, unlike ones."""
    folder = Path(folder)
    sides, numbers = find_classes(folder)
    listed = {side: list_photographs(folder / side, numbers) for side in sides}
    listed["unlabelled"] = list_photographs(folder, {"unlabelled": -1})

    paths = [path for side in listed.values() for path, _ in side]
    images, readable = decode(paths, size)
    if not readable.any():
        raise ValueError(f"{folder}: no photograph that can be read, in {[*numbers]}")
    classes = tuple((names or {}).get(name, name) for name in numbers)
    splits, first = {}, 0
    for side, photographs in listed.items():
        places = first + torch.arange(len(photographs))
        first += len(photographs)
        labels = torch.tensor([label for _, label in photographs], dtype=torch.int64)
        good = [column[readable[places]].to(DEVICE) for column in (places, labels)]
        splits[side] = Split(images, paths, classes, *good)
    if "." in splits:
        splits["train"], splits["val"] = split_off(splits.pop("."))

    for side in ("train", "val"):
        counts = splits[side].targets.bincount(minlength=len(classes))
        if not counts.all():
            empty = [classes[label] for label in (counts == 0).nonzero()]
            raise ValueError(f"{folder}: no photograph for {side} of {empty}")
    return splits


def find_copies(split: Split) -> Tensor:
    """Pairs [K, 2] of places in a split: photographs that are nearly the same, or
    mirrored. Copies in Imagewoof are alike by 0.97 or more, others by 0.94 or less."""
    small = [F.adaptive_avg_pool2d(batch.float(), 16) for batch in split.batches()]
    looks, found = torch.cat([look(images) for images in small]), []
    for start, images in zip(range(0, len(looks), 256), small, strict=True):
        both = look(images), look(images.flip(3))
        alike = torch.maximum(*(rows @ looks[start:].T for rows in both))
        pairs = (alike > 0.95).nonzero().cpu()
        found.append(start + pairs[pairs[:, 0] < pairs[:, 1]])
    return torch.cat(found)


def look(small: Tensor) -> Tensor:
    """[B, 3, 16, 16] ─► [B, 388], of length 1. Half of it is the outlines, half what is
    finer: skies and white grounds have only their outlines in common."""
    outlines = F.avg_pool2d(small, 2)
    details = small - F.interpolate(outlines, scale_factor=2, mode="bilinear")
    details = details.mean(1)[:, 1:-1, 1:-1]  # interpolation is rough at the edges
    parts = [part.flatten(1) for part in (outlines, details)]
    # eps: in a plain ground, there is but noise
    parts = [F.normalize(x - x.mean(1, keepdim=True), eps=1.0) for x in parts]
    return torch.cat(parts, 1) / math.sqrt(2)


def split_off(split: Split) -> list[Split]:
    """train, and as val a fifth of each class, by chance. Copies stay together."""
    labels, group = split.targets.cpu(), torch.arange(len(split))
    for first, second in find_copies(split).tolist():
        group[group == group[second]] = group[first].item()
    with seeded(0):
        order = torch.randperm(len(split))

    is_val = torch.zeros(len(split), dtype=torch.bool)
    for label in labels.unique():
        room = max(1, round((labels == label).sum().item() / 5))
        for place in order[labels[order] == label]:
            members = group == group[place]
            if not is_val[place] and members.sum() <= room:
                is_val |= members
                room -= members.sum().item()
    parts = [split.subset(side.to(DEVICE)) for side in (~is_val, is_val)]
    return [replace(part, whole=None) for part in parts]


# ── Records and files: what shapes a result, and what is kept ─────────────
def describe_stage(stage: Stage, networks) -> dict:
    """What shapes a result: a file is used only if this is unchanged. Networks and
    losses are described by what they do: source text shows no changed global."""
    settings, train, teacher = stage.settings, stage.train_split, stage.teacher
    names = ("batch_size", "min_crop", "stream_seed", "weight_decay")
    study = {name: getattr(settings, name) for name in names}
    study["image_size"] = train.pixels.shape[-1]
    study["precision"] = str(choose_precision()).removeprefix("torch.")
    study["images of train"] = (train.whole or train).fingerprint()
    study["images of val"] = stage.val_split.fingerprint()
    for name in networks:
        recipe = vars(settings.recipe_of(name))
        used = recipe if teacher is not None else ["learning_rate"]
        study |= {f"{key} of {name}": recipe[key] for key in used}
    record = {name: getattr(settings, name) for name in ("epochs", "seeds")}
    record |= {"study": study, "keep_weights": settings.keep_weights, "losses": {}}
    record |= {"learns from": train.fingerprint(), "teacher": "none"}
    if teacher is not None:
        record["teacher"] = fingerprint(teacher.state_dict().values())
        record["taught"] = describe_network("the teacher", teacher, train)
    return record


def describe_network(name: str, network: nn.Module, train: Split) -> dict:
    """What a network does with four images, on the CPU whatever the device: answers in
    both modes, sizes of gradients. ValueError if they are no logits [B, C]."""
    images = normalise((train.whole or train).images_at(slice(4)).cpu())
    probe, need = copy.deepcopy(network).cpu(), (len(images), len(train.classes))
    with seeded(0):
        for weight in probe.parameters():  # a last layer of zeros would hide all else
            weight.data += 0.02 * torch.arange(weight.numel()).sin().view(weight.shape)
        answers = [probe.train()(images), probe.eval()(images), probe(10 * images)]
    for logits in answers:
        shape = tuple(getattr(logits, "shape", [type(logits).__name__]))
        if shape != need or not logits.isfinite().all():
            raise ValueError(f"{name}: need logits {need}, no nan or inf; got {shape}")
    if images._version:  # it counts changes in place
        raise ValueError(f"{name} changes the images, which others see, too: copy them")
    trained = [weight for weight in probe.parameters() if weight.requires_grad]
    if trained:
        answers[1].square().sum().backward()
    norms = [weight.grad.norm() for weight in trained if weight.grad is not None]
    return {
        "initial weights": getattr(network, "initial_weights", "random"),
        "answers": torch.stack(answers).detach(),
        "gradients": torch.tensor([0.0, *norms]),  # 0: so that it is never empty
    }


def describe_loss(student: Student, classes, teacher) -> dict:
    """What a loss does with made-up logits. ValueError if it changes what it gets."""
    targets = torch.arange(2 * len(classes), device=DEVICE) % len(classes)
    with seeded(0):
        made_up = torch.randn(2, len(targets), len(classes))
        made_up *= torch.linspace(0.5, 10, len(targets))[:, None]  # unsure to sure
        student_logits = made_up[0].to(DEVICE).requires_grad_()
        teacher_logits = made_up[1].to(DEVICE, copy=True) if teacher else None
        loss = student.loss(student_logits.clone(), teacher_logits, targets)
    if targets._version or (teacher and teacher_logits._version):
        raise ValueError(f"{student}: its loss changes logits or targets: copy them")
    [gradient] = torch.autograd.grad(loss, student_logits)
    found = {"value": loss.detach(), "gradient": gradient.norm(dim=1)}
    return {key: value.float().nan_to_num().cpu() for key, value in found.items()}


def differences(old: dict, new: dict) -> list[str]:
    """What differs between two records, by name; tensors may be rounded otherwise."""
    found = []
    for key in old | new:
        was, now = old.get(key, "missing"), new.get(key, "missing")
        if isinstance(was, dict) and isinstance(now, dict):
            found += [f"{key}: {inner}" for inner in differences(was, now)]
        elif torch.is_tensor(was) and torch.is_tensor(now):
            limit = 1e-3 * now.abs().max().item()
            close = partial(torch.allclose, rtol=0, atol=limit)
            if was.shape != now.shape or not close(was, now):
                found.append(f"{key} changed")
        elif was != now:
            found.append(f"{key} was {was} and is {now}")
    return found


def save(stage: Stage) -> None:
    """Writes aside and renames: the file is always whole."""
    parts = ["network", "optimizer", "schedule", "scaler"]
    if len(stage.seconds) == stage.settings.epochs:  # finished
        parts = ["network"] if stage.settings.keep_weights else []
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    checkpoint = {
        "record": stage.record,
        "machine": f"{device}, torch {torch.__version__}",
        "seconds": stage.seconds,
        "students": {s.key: s.state_dict(parts) for s in stage.students},
    }
    aside = stage.path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(checkpoint, aside)
    aside.replace(stage.path)


def restore(stage: Stage) -> None:
    """Loads what an earlier run left. A file that cannot be used is renamed."""
    saved = read_checkpoint(stage.path)
    changes = differences(saved["record"], stage.record) if saved else ["no checkpoint"]
    if not changes:
        for student in stage.students:
            student.load_state_dict(saved["students"][student.key])
        stage.seconds = saved["seconds"]
        print(f"{stage.path}: {len(stage.seconds)} epochs are loaded")
    elif any(student.steps or student.in_epoch for student in stage.students):
        raise RuntimeError(f"{stage.name} was left unsaved: make it anew")
    elif stage.path.exists():
        aside = stage.path.with_name(f"{stage.path.name}.{time.time_ns()}")
        stage.path.rename(aside)
        print(f"{stage.path} is now {aside.name}: {'; '.join(changes[:3])}")


def read_checkpoint(path: Path) -> dict | None:
    """A stage's file, on the CPU; None for none, or a damaged or a foreign one."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        record = saved["record"]
        is_stage = record["study"] and len(saved["seconds"]) <= record["epochs"]
        return saved if is_stage and saved["students"] else None
    except Exception:  # such a file fails in many ways
        return None


# ── Answers and statistics ────────────────────────────────────────────────────────────
@torch.no_grad()
def predict(network: nn.Module, split: Split) -> Tensor:
    """Logits [N, C] float32 of the images as they are, in evaluation mode."""
    network.eval()
    with mixed_precision():
        batches = [network(normalise(batch)) for batch in split.batches()]
    return torch.cat(batches).float()


def correct(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, C] and [N] ─► [N] float32: 1 for a right answer, 0 for a wrong one."""
    return (logits.argmax(1) == targets).float()
