"""How fast kd_utils is, by itself and next to what a tutorial would write:
    python tests/bench_kd_utils.py [size [images [batch size [repeats]]]]

Both sides of a comparison run in turn; medians of the repeats, with their range. The
images are Imagewoof's where the folder data holds it, else random ones.
"""

import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from conftest import distilled, label_loss, make_settings
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import kd_utils as kd

LOSSES = {"alone": label_loss, "class mean": distilled, "distilled": distilled}


def wait():
    if kd.DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(work):
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def alternate(repeats, *works):
    """Seconds of each work in each repeat; a round before them warms up."""
    rounds = [[seconds(work) for work in works] for _ in range(repeats + 1)]
    return torch.tensor(rounds[1:]).T  # [works, repeats]


def show(what, values, form=".2f"):
    median, low, high = torch.quantile(values, 0.5), values.min(), values.max()
    print(f"| {what} | {median:{form}} [{low:{form}}, {high:{form}}] |", flush=True)


def draw_random_dataset(folder, count=100):
    rng = np.random.default_rng(0)
    for split, label, number in product(("train", "val"), range(10), range(count)):
        path = folder / split / str(label) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (160, 160, 3), np.uint8)).save(path)
    return folder


class Bench:
    def __init__(self, size=64, images=1024, batch_size=64, repeats=3):
        self.scratch = tempfile.TemporaryDirectory()
        self.folder, self.repeats = Path("data/imagewoof2-160"), repeats
        if not self.folder.exists():
            self.folder = draw_random_dataset(Path(self.scratch.name, "random"))
        whole = kd.load_splits(self.folder, size)["train"]
        self.chosen = torch.linspace(0, len(whole) - 1, min(images, len(whole))).long()
        self.split = whole.subset(self.chosen.to(kd.DEVICE))
        numbers = {"image_size": size, "batch_size": batch_size, "epochs": 1}
        self.settings = make_settings(Path(self.scratch.name, "runs"), **numbers)
        teacher = kd.build_classifier(10).to(kd.DEVICE)
        self.teacher = teacher.eval().requires_grad_(False)
        device = torch.cuda.get_device_name() if kd.DEVICE.type == "cuda" else "CPU"
        print(
            f"{self.folder.name}, {len(self.split)} images of {size} px, batches of "
            f"{batch_size}, {device}, {kd.choose_precision()}, "
            f"torch {torch.__version__}, medians [range] of {repeats}\n"
        )
        print("| what | measured |\n|---|--:|")

    def loader(self):
        transform = v2.Compose(
            [
                v2.RandomResizedCrop(self.settings.image_size, scale=(0.35, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        folder = ImageFolder(self.folder / "train", transform)
        images, count = Subset(folder, self.chosen.tolist()), self.settings.batch_size
        return DataLoader(images, count, shuffle=True, num_workers=2, drop_last=True)

    def chance(self):
        def draw():
            for step in range(1000):
                with kd.seeded(0, step):
                    pass

        show("seeded: µs a call", 1000 * alternate(self.repeats, draw)[0], ".1f")

    def input_path(self):
        loader = self.loader()
        times = alternate(
            self.repeats,
            lambda: [None for _ in loader],
            lambda: [None for _ in kd.augmented_batches(self.split, self.settings, 0)],
        )
        show(
            "input path: ImageFolder with DataLoader ÷ ours", times[0] / times[1], ".1f"
        )

    def make_stage(self, losses=LOSSES, **changes):
        few = self.split.subset(slice(0, 64))
        settings = replace(self.settings, **changes)
        parts = (settings, (self.split, few), kd.STUDENTS, self.teacher)
        return kd.Stage("bench", losses, *parts)

    def ours(self, stage):
        for images, targets in kd.augmented_batches(self.split, stage.settings, 0):
            with torch.no_grad(), kd.mixed_precision():
                teacher_logits = stage.teacher(images)
            for student in stage.students:
                student_logits = student.forward(images)
                student.step(student.loss(student_logits, teacher_logits, targets))
        for student in stage.students:
            student.end_epoch(stage.val_split, stage.val_split)
            student.in_epoch, student.losses = True, []

    def tutorial(self):
        for arm, build, _ in product(LOSSES, kd.STUDENTS.values(), range(3)):
            network = build(10).to(kd.DEVICE)
            optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
            for images, targets in self.loader():
                images, targets = images.to(kd.DEVICE), targets.to(kd.DEVICE)
                with torch.no_grad():
                    teacher_logits = self.teacher(images) if arm != "alone" else None
                loss = LOSSES[arm](network(images), teacher_logits, targets, None)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def study(self):
        stage = self.make_stage(epochs=100, seeds=(0, 1, 2))
        for student in stage.students:
            student.in_epoch = True
        works = self.tutorial, partial(self.ours, stage)
        times = alternate(self.repeats, *works)
        what = "a study, 18 students, one epoch: a loop per student ÷ ours"
        show(what, times[0] / times[1])
        show("the same: seconds", times[1])
        if kd.DEVICE.type == "cuda":
            reserved = torch.cuda.max_memory_reserved() / 2**30
            print(f"| the same: GiB reserved | {reserved:.1f} |")

    def arithmetic(self):
        side, count = (8192, 20) if kd.DEVICE.type == "cuda" else (1024, 5)
        square = torch.randn(side, side, device=kd.DEVICE, dtype=kd.choose_precision())
        images, targets = next(kd.augmented_batches(self.split, self.settings, 0))
        few = self.split.subset(slice(0, len(images)))
        works = {"teacher, inference": partial(kd.predict, self.teacher, few)}
        for student in self.make_stage({"x": label_loss}, epochs=10**4).students[::2]:
            student.in_epoch = True

            def step(student=student):
                loss = student.loss(student.forward(images), None, targets)
                student.step(loss)

            works[f"{student.network_name}, a step"] = step
        flops = []
        for work in works.values():
            with FlopCounterMode(display=False) as counter:
                work()
            flops.append(counter.get_total_flops())
        products = lambda: [square @ square for _ in range(count)]  # noqa: E731
        times = alternate(10 * self.repeats, products, *works.values())
        rate = count * 2 * side**3 / times[0].median()
        for name, flop, took in zip(works, flops, times[1:], strict=True):
            show(f"{name}: ms", 1000 * took)
            share = 100 * flop / took / rate
            show(f"{name}: % of {count} matrix products' rate ({side}³)", share, ".1f")


if __name__ == "__main__":
    bench = Bench(*map(int, sys.argv[1:]))
    for part in (bench.chance, bench.input_path, bench.arithmetic, bench.study):
        part()
