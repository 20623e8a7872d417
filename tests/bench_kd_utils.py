"""How fast kd_utils is, next to the ways it replaces: python tests/bench_kd_utils.py [--device cuda] [--size 160] [--only 1 3]

Both sides of every comparison run in turn, and the figures are medians of the repeats with their range.
Uses Imagewoof where data/ holds it, and the drawn images otherwise.
"""

import argparse
import os
import resource
import statistics
import sys
import time
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import kd_utils as kd

kd.tqdm = partial(kd.tqdm, file=sys.stderr)  # nothing but the table on stdout
TRAINING = dict(lr=2e-3, weight_decay=0.05, body_lr=None)
DISTILLATION = partial(kd.distillation_loss, temperature=2.0, alpha=0.5)


def seconds(work, device):
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(device, repeats, **sides):
    """{side: [seconds of each repeat]}; the first round warms up and is not counted."""
    times = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, work in sides.items():
            took = seconds(work, device)
            if turn:
                times[name].append(took)
    return times


def row(what, times, over, under, unit="s", amount=None, target=None):
    """Prints both sides and the ratio over ÷ under, by repeat."""
    ratios = [a / b for a, b in zip(times[over], times[under])]
    shown = {name: statistics.median(values) for name, values in times.items()}
    sides = ", ".join(f"{name} {amount / value:,.0f} {unit}" if amount else f"{name} {value:.3f} {unit}" for name, value in shown.items())
    aim = f" | target {target}" if target else ""
    print(f"| {what} | {sides} | {over} ÷ {under} (time) | {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]{aim} |", flush=True)


@contextmanager
def precision(dtype):
    """Lets everything in kd_utils compute in `dtype`."""
    chosen, kd.choose_precision = kd.choose_precision, lambda device: dtype
    try:
        yield
    finally:
        kd.choose_precision = chosen


def peak_bytes(work, device):
    """The most memory in use during `work`: of the device, or of this process on a CPU (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        work()
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except OSError:
        work()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # since the process began


T4 = {"flops": 65e12, "bytes": 320e9}  # a second, at most, in float16 (NVIDIA's data sheet of the T4)
REACHED = {"flops": 0.35, "bytes": 0.7}  # shares of these, an assumption


class Roofline(TorchDispatchMode):
    """Adds up each operation's least time: by its FLOPs or by the bytes it reads and writes, whichever takes longer.

    Williams, Waterman & Patterson, 2009. Run it with tensors on the meta device, which have shapes and no content.
    """

    def __init__(self):
        super().__init__()
        self.spent = np.zeros(3)  # seconds, FLOPs, bytes

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation.is_view:
            return result
        count = flop_registry.get(operation.overloadpacket, lambda *_, **__: 0)
        flops = count(*args, **(kwargs or {}), out_val=result)
        moved = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor))
        least = max(flops / (T4["flops"] * REACHED["flops"]), moved / (T4["bytes"] * REACHED["bytes"]))
        self.spent += least, flops, moved
        return result


class Bench:
    def __init__(self, device, size, batch_size, images, repeats):
        self.device, self.size, self.batch_size, self.repeats = device, size, batch_size, repeats
        name = "imagewoof2-160" if (ROOT / "data" / "imagewoof2-160").exists() else "demo"
        self.folder = kd.download_dataset(name, ROOT / "data")
        data = kd.load_images(self.folder, size, device)
        self.val = data["val"]
        chosen = torch.linspace(0, len(data["train"]) - 1, min(images, len(data["train"]))).long()
        self.train = data["train"].subset(chosen)
        self.stream = kd.BatchStream(self.train, batch_size)
        self.used = self.stream.steps * batch_size
        self.teacher = kd.freeze(kd.build_teacher(10, None)).to(device, memory_format=torch.channels_last)
        print(f"{name}, {self.used} images of {size} px, batches of {batch_size}, {device}, {kd.choose_precision(device)}, torch {torch.__version__}\n")
        print("| what | medians | ratio | median [range] |\n|---|---|---|---|")

    def loader(self):
        """The tutorials' input path, with the same augmentation on the same images."""
        transform = v2.Compose([
            v2.PILToTensor(), v2.RandomResizedCrop(self.size, scale=(0.35, 1.0), antialias=True), v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(kd.IMAGENET_MEAN, kd.IMAGENET_STD),
        ])  # fmt: skip
        images = torchvision.datasets.ImageFolder(self.folder / "train", transform)
        wanted = {str(self.folder / "train" / file) for file in self.train.files}
        images.samples = [sample for sample in images.samples if sample[0] in wanted]
        return DataLoader(images, self.batch_size, shuffle=True, num_workers=2, persistent_workers=True, drop_last=True,
                          pin_memory=self.device.type == "cuda")  # fmt: skip

    def stepper(self, build=kd.CustomCNN, loss=kd.label_loss):
        student = kd.Student(build(10).to(self.device, memory_format=torch.channels_last), "student", 0, loss=loss)
        return kd._Stepper(student, **TRAINING, total_steps=10**6)

    def train_from_stream(self, steppers, teacher=None):
        for images, targets in self.stream.epoch(0):
            self.one_step(steppers, images, targets, teacher)

    def one_step(self, steppers, images, targets, teacher=None):
        with torch.no_grad(), kd._autocast(self.device):
            teacher_logits = teacher(images) if teacher is not None else None
        for stepper in steppers:
            stepper.step(images, teacher_logits, targets)
            stepper.recent_losses.clear()

    def input_path(self):
        loader = self.loader()

        def theirs():
            for images, targets in loader:
                images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

        def ours():
            for _ in self.stream.epoch(0):
                pass

        times = alternate(self.device, self.repeats, DataLoader=theirs, ours=ours)
        row("1 input path", times, "DataLoader", "ours", "images/s", self.used, "≥ 5 on a CPU, ≥ 50 on a GPU")

    def overhead(self):
        for name, build in kd.STUDENTS.items():
            steppers = [self.stepper(build)]
            batch = next(iter(self.stream.epoch(0)))

            def fixed():
                for _ in range(self.stream.steps):
                    self.one_step(steppers, *batch)

            times = alternate(self.device, self.repeats, stream=partial(self.train_from_stream, steppers), fixed=fixed)
            aim = "≤ 1.08 on a CPU, ≤ 1.10 on a GPU" if name == "Custom CNN" else None
            row(f"2 overhead of the stream, {name}", times, "stream", "fixed", target=aim)

    def epoch(self):
        loader, model = self.loader(), kd.CustomCNN(10).to(self.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def plain():
            total = 0.0
            for images, targets in loader:
                images, targets = images.to(self.device), targets.to(self.device)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), targets)
                loss.backward()
                optimizer.step()
                total += loss.item()

        times = alternate(self.device, self.repeats, plain=plain, ours=partial(self.train_from_stream, [self.stepper()]))
        row("3 epoch of the custom CNN", times, "plain", "ours", target="≥ 2.5 on a CPU, ≥ 20 on a GPU")

    def cohort(self):
        batches = list(self.stream.epoch(0))[:8]

        def together(steppers):
            for images, targets in batches:
                self.one_step(steppers, images, targets, self.teacher)

        def apart(steppers):
            for stepper in steppers:
                together([stepper])

        for n in (1, 2, 4, 8):
            steppers = [self.stepper(build, DISTILLATION) for build in [kd.CustomCNN, kd.LeNet5] * (n // 2) or [kd.CustomCNN]]
            times = alternate(self.device, self.repeats, together=partial(together, steppers), apart=partial(apart, steppers))
            aim = "≤ 0.62 on a CPU, ≤ 0.5 on a GPU" if n == 4 else None
            row(f"4 cohort of {n}", times, "together", "apart", target=aim)
        times = alternate(self.device, self.repeats, teacher=partial(together, []), step=partial(together, steppers[:4]))
        row("4 the teacher's share of a step of four", times, "teacher", "step")

    def precision_and_layout(self):
        """One training step of the custom CNN and one batch of the teacher, in every combination that the device knows."""
        images, targets = next(iter(self.stream.epoch(0)))
        dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if self.device.type == "cuda" else [])
        layouts = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
        training, inference = {}, {}
        for dtype in dtypes:
            for layout, memory_format in layouts.items():
                for compiled in (False, True):
                    name = f"{str(dtype).removeprefix('torch.')}, {layout}{', compiled' if compiled else ''}"
                    batch = images.contiguous(memory_format=memory_format)
                    with precision(dtype):
                        stepper = self.stepper()
                    stepper.student.model.to(memory_format=memory_format)
                    teacher = kd.freeze(kd.build_teacher(10, None)).to(self.device, memory_format=memory_format)
                    if compiled:
                        stepper.student.model.compile()
                        teacher.compile()
                    training[name] = partial(self._in, dtype, [stepper], batch, targets)
                    inference[name] = partial(self._in, dtype, [], batch, targets, teacher)
        for what, sides in (("custom CNN, training", training), ("teacher, inference", inference)):
            times = alternate(self.device, self.repeats, **sides)
            for name in sides:
                row(f"5 {what}: {name}", {"float32, channels first": times["float32, channels first"], name: times[name]},
                    "float32, channels first", name, "images/s", self.batch_size)  # fmt: skip

    def _in(self, dtype, *step):
        with precision(dtype):
            self.one_step(*step)

    def growth(self):
        """Time and memory of a distilling step by batch and image size, and of an epoch by the number of images."""
        steppers = [self.stepper(build, DISTILLATION) for build in kd.STUDENTS.values()]
        for size in sorted({64, 96, 128, self.size}):
            self._grow(f"6 {size} px, batch {self.batch_size}", steppers, self.batch_size, size)
        for batch_size in (self.batch_size // 2, 2 * self.batch_size):
            self._grow(f"6 {self.size} px, batch {batch_size}", steppers, batch_size, self.size)
        for part in (4, 2, 1):
            stream = kd.BatchStream(self.train.subset(torch.arange(0, len(self.train), part)), self.batch_size)
            times = alternate(self.device, self.repeats, epoch=lambda: [self.one_step(steppers, *batch, self.teacher) for batch in stream.epoch(0)])
            self._tell(f"6 epoch of {stream.steps * stream.batch_size} images", times["epoch"], stream.steps * stream.batch_size)
        files = [self.folder / "train" / file for file in self.train.files]
        took = alternate(self.device, 1, decode=lambda: kd.decode_images(files, self.size))["decode"]
        self._tell(f"6 decode, cache of {3 * self.size**2:,} bytes an image", took, len(files))

    def _grow(self, what, steppers, batch_size, size):
        images = F.interpolate(self.train.images[:batch_size].float(), size)
        batch = kd.normalise(images), self.train.targets[:batch_size], self.teacher
        times = alternate(self.device, self.repeats, step=partial(self.one_step, steppers, *batch))["step"]
        peak = peak_bytes(partial(self.one_step, steppers, *batch), self.device)
        self._tell(what, times, batch_size, f", peak {peak / 2**20:,.0f} MiB")

    def _tell(self, what, times, images, more=""):
        took = statistics.median(times)
        print(f"| {what} | {took:.3f} s{more} | time an image | {1000 * took / images:.2f} ms [{1000 * min(times) / images:.2f}, "
              f"{1000 * max(times) / images:.2f}] |", flush=True)  # fmt: skip

    def accuracy(self, epochs=6, seeds=(0, 1, 2)):
        """The custom CNN after the same few epochs: ours, and a plain float32 loop with the same optimiser and schedule."""
        with redirect_stdout(sys.stderr):
            ours = kd.fit(kd.make_students(10, seeds, architectures={"Custom CNN": kd.CustomCNN}), self.train, self.val,
                          epochs=epochs, batch_size=self.batch_size, lr=2e-3, weight_decay=0.05)  # fmt: skip
        ours = [student.history.val_accuracy[-1] for student in ours]
        plain = [self._plain_accuracy(seed, epochs) for seed in seeds]
        gap = kd.interval(a - b for a, b in zip(ours, plain))
        print(f"| 8 accuracy on val after {epochs} epochs | ours {100 * statistics.mean(ours):.1f} %, plain {100 * statistics.mean(plain):.1f} % | "
              f"ours − plain, {len(seeds)} seeds | {100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}] points |", flush=True)  # fmt: skip

    def _plain_accuracy(self, seed, epochs):
        torch.manual_seed(seed)
        model, loader = kd.CustomCNN(10).to(self.device), self.loader()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * len(loader), cycle_momentum=False)
        for _ in range(epochs):
            model.train()
            for images, targets in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(images.to(self.device)), targets.to(self.device)).backward()
                optimizer.step()
                schedule.step()
        with precision(torch.float32):
            return kd.metrics(kd.predict(model, self.val), self.val.targets)["accuracy"]

    def limit(self):
        """Each network's share of the rate of a large matrix product, alternating with it."""
        n, dtype = (8192 if self.device.type == "cuda" else 2048), kd.choose_precision(self.device)
        a = torch.randn(n, n, device=self.device, dtype=dtype)
        images, targets = next(iter(self.stream.epoch(0)))
        trainable = kd.build_teacher(10, None).to(self.device, memory_format=torch.channels_last)
        training = kd._Stepper(kd.Student(trainable, "teacher", 0), **TRAINING, total_steps=10**6)

        def infer():
            with torch.no_grad(), kd._autocast(self.device):
                self.teacher(images)

        works = {
            "7 teacher, inference": (self.teacher, infer, 1, "≥ 50 % on a CPU, ≥ 40 % on a GPU"),
            "7 teacher, training": (self.teacher, lambda: self.one_step([training], images, targets), 3, "≥ 33 %, ≥ 30 %"),
            "7 custom CNN, training": (kd.CustomCNN(10).to(self.device).eval(), partial(self.one_step, [self.stepper()], images, targets), 3, None),
        }
        for what, (model, work, passes, aim) in works.items():
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(images)
            times = alternate(self.device, 2 * self.repeats, product=lambda: a @ a, network=work)
            rates = [2 * n**3 / t for t in times["product"]], [passes * counter.get_total_flops() / t for t in times["network"]]
            product, network = (statistics.median(values) / 1e9 for values in rates)
            shares = [100 * b / a for a, b in zip(*rates)]
            print(f"| {what} | product {product:,.0f}, network {network:,.0f} GFLOP/s | network ÷ product (rate) | "
                  f"{statistics.median(shares):.0f} % [{min(shares):.0f}, {max(shares):.0f}]{f' | target {aim}' if aim else ''} |", flush=True)  # fmt: skip

    def estimate(self):
        """What a notebook with profile `gpu` should take on a T4, from the FLOPs and bytes of its operations."""
        profile, info = kd.PROFILES["gpu"], kd.DATASETS["imagenette2-160"]
        train, val = info.counts["train"], info.counts["val"]
        students = [self._roofline(build(10), profile) for build in kd.STUDENTS.values()]
        (learn, infer), rounds = self._roofline(kd.build_teacher(10, None), profile), profile.epochs
        alone = rounds * len(profile.seeds) * sum(train * step + val * look for step, look in students)
        augment = rounds * train * self._augmentation(profile)
        files = [self.folder / "train" / file for file in self.train.files[:1024]]
        decode = seconds(lambda: kd.decode_images(files, profile.image_size), torch.device("cpu")) * (train + val) / len(files)
        parts = {
            "students alone": alone + augment,
            "teacher": profile.teacher_epochs * (train * learn + val * infer),
            "students distilled": alone + augment + rounds * train * infer,
        }
        shown = ", ".join(f"{name} {took / 60:.1f} min" for name, (took, *_) in parts.items())
        took, flops, moved = sum(parts.values()) + [decode, 0, 0]
        print(f"| 9 a notebook, profile gpu, on a T4: an estimate | {shown}; decoding, on this CPU, {decode / 60:.1f} min | "
              f"{flops / 1e15:.1f} PFLOP, {moved / 1e12:.1f} TB | {took / 60:.1f} min | target ≤ 20 min |", flush=True)  # fmt: skip

    def _roofline(self, model, profile):
        """Seconds, FLOPs and bytes an image, of training and of inference."""
        model = model.to("meta", torch.float16, memory_format=torch.channels_last)
        batch, size = profile.batch_size, profile.image_size
        images = torch.empty(batch, 3, size, size, dtype=torch.float16, device="meta").contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), Roofline() as inference:
            model.eval()(images)
        with Roofline() as training:
            F.cross_entropy(model.train()(images).float(), torch.empty(batch, dtype=torch.long, device="meta")).backward()
        return training.spent / batch, inference.spent / batch

    def _augmentation(self, profile):
        batch, size = profile.batch_size, profile.image_size
        images = torch.empty(batch, 3, size, size, dtype=torch.uint8, device="meta")
        with Roofline() as augmentation:
            kd.normalise(kd.crop_and_resize(images, torch.ones(batch, 4), torch.ones(batch, dtype=torch.bool)))
        return augmentation.spent / batch


PARTS = {1: Bench.input_path, 2: Bench.overhead, 3: Bench.epoch, 4: Bench.cohort, 5: Bench.precision_and_layout, 6: Bench.growth,
         7: Bench.limit, 8: Bench.accuracy, 9: Bench.estimate}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--size", type=int, default=160 if torch.cuda.is_available() else 64, help="pixels a side")
    parser.add_argument("--batch-size", type=int, default=128 if torch.cuda.is_available() else 64)
    parser.add_argument("--images", type=int, default=10**6 if torch.cuda.is_available() else 1024, help="an epoch's images, at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="*", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    bench = Bench(arguments.device, arguments.size, arguments.batch_size, arguments.images, arguments.repeats)
    for part in arguments.only:
        PARTS[part](bench)
    os._exit(0)  # the loaders' workers need not be waited for
