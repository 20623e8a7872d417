"""How fast kd_utils is, next to what a tutorial would write:
    python tests/bench_kd_utils.py [size [images [batch size [repeats]]]]

Both sides of a comparison run in turn; medians of the repeats, with their range. The
images are Imagewoof's where the folder data holds it, else the drawn ones.
"""

import io
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from conftest import Settings, label_loss
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

import kd_utils as kd

kd.progress = lambda *given, **named: tqdm(*given, **named | {"disable": True})


distilled = partial(kd.distillation_loss, temperature=2.0, alpha=0.5)
# Alike in cost
LOSSES = {"alone": label_loss, "class mean": distilled, "distilled": distilled}


def seconds(work):
    start = time.perf_counter()
    work()
    if kd.DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(repeats, *works):
    """Seconds of each work in each repeat; a round before them warms up."""
    rounds = [[seconds(work) for work in works] for _ in range(repeats + 1)]
    return torch.tensor(rounds[1:]).T  # [works, repeats]


def show(what, values, form=".2f"):
    median, low, high = torch.quantile(values, 0.5), values.min(), values.max()
    print(f"| {what} | {median:{form}} [{low:{form}}, {high:{form}}] |", flush=True)


class Bench:
    def __init__(self, size=64, images=1024, batch_size=64, repeats=3):
        data_dir = Path("data")
        name = "imagewoof2-160" if (data_dir / "imagewoof2-160").exists() else "demo"
        self.folder, self.repeats = kd.download_dataset(name, data_dir), repeats
        whole = kd.load_split(self.folder, "train", size)
        self.chosen = torch.linspace(0, len(whole) - 1, min(images, len(whole))).long()
        self.split = whole.subset(self.chosen.to(kd.DEVICE))
        self.size = size
        self.settings = Settings(
            Path("runs"), seeds=(0, 1, 2), epochs=1, batch_size=batch_size
        )
        self.teacher = kd.build_teacher(10, None).eval().requires_grad_(False)
        self.teacher.to(kd.DEVICE, memory_format=torch.channels_last)
        print(
            f"{name}, {len(self.split)} images of {size} px, batches of {batch_size}, "
            f"{kd.DEVICE}, {kd.choose_precision()}, medians [range] of {repeats}\n"
        )
        print("| what | measured |\n|---|--:|")

    def loader(self):
        transform = v2.Compose(
            [
                v2.RandomResizedCrop(self.size, scale=(0.35, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        folder = ImageFolder(self.folder / "train", transform)
        images, count = Subset(folder, self.chosen.tolist()), self.settings.batch_size
        return DataLoader(images, count, shuffle=True, num_workers=2, drop_last=True)

    def input_path(self):
        loader = self.loader()
        times = alternate(
            self.repeats,
            lambda: [None for _ in loader],
            lambda: [None for _ in kd.augmented_batches(self.split, self.settings, 0)],
        )
        what = "1 input path: ImageFolder with DataLoader ÷ ours"
        show(what, times[0] / times[1], ".1f")

    def ours(self, count=None, split=None, networks=kd.STUDENTS, losses=LOSSES):
        split = split or self.split
        few = split.subset(torch.arange(8, device=kd.DEVICE))  # scoring is not compared
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            settings = replace(self.settings, runs_dir=Path(folder), epochs=1)
            teacher, pair = self.teacher, (split, few)
            stage = kd.Stage("b", losses, settings, pair, networks, teacher)
            del stage.students[count:]
            for epoch in stage.epochs_left():
                for images, targets in stage.batches(epoch):
                    with torch.no_grad(), kd.mixed_precision():
                        teacher_logits = teacher(images)
                    for student in stage.students:
                        logits = student.forward(images)
                        student.step(student.loss(logits, teacher_logits, targets))

    def tutorial(self):
        for arm, build, _ in product(LOSSES, kd.STUDENTS.values(), self.settings.seeds):
            network = build(10).to(kd.DEVICE)
            optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
            for images, targets in self.loader():
                images, targets = images.to(kd.DEVICE), targets.to(kd.DEVICE)
                with torch.no_grad():
                    teacher_logits = self.teacher(images) if arm != "alone" else None
                loss = LOSSES[arm](network(images), teacher_logits, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def study(self):
        times = alternate(self.repeats, self.tutorial, self.ours)
        what = "2 a study, 18 students, one epoch: a loop per student ÷ ours"
        show(what, times[0] / times[1])

    def arithmetic(self):
        square = torch.randn(2048, 2048, device=kd.DEVICE, dtype=kd.choose_precision())
        images, targets = next(kd.augmented_batches(self.split, self.settings, 0))
        arm, networks = {"alone": label_loss}, {"CNN": kd.CustomCNN}
        settings = replace(self.settings, seeds=(0,), epochs=10**5)
        pair = (self.split, self.split)
        [student] = kd.Stage("a", arm, settings, pair, networks).students
        student.is_open = True
        few = self.split.subset(torch.arange(len(images), device=kd.DEVICE))
        works, flops = {"teacher inference": lambda: kd.predict(self.teacher, few)}, {}
        works["CNN training"] = lambda: student.step(
            label_loss(student.forward(images), None, targets)
        )
        for name, work in works.items():
            with FlopCounterMode(display=False) as counter:
                work()
            flops[name] = counter.get_total_flops()
        times = alternate(5 * self.repeats, lambda: square @ square, *works.values())
        for name, took in zip(works, times[1:], strict=True):
            shares = 100 * (flops[name] / took) / (2 * 2048**3 / times[0])
            show(f"3 {name}: % of a large matrix product's rate", shares, ".0f")

    def growth(self):
        cnn = {"CNN": kd.CustomCNN}
        alone = {"alone": label_loss, "b": label_loss, "c": label_loss}
        for part, count in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (4, 1)):
            every = torch.arange(0, len(self.split), part, device=kd.DEVICE)
            split = self.split.subset(every)
            work = partial(self.ours, count, split, cnn, alone)
            milliseconds = 1000 * alternate(self.repeats, work)[0] / len(split)
            what = f"4 teacher, {count} CNN, {len(split)} images: ms an image"
            show(what, milliseconds)


if __name__ == "__main__":
    bench = Bench(*map(int, sys.argv[1:]))
    for part in (bench.input_path, bench.arithmetic, bench.growth, bench.study):
        part()
