"""What the tests share: small splits, a quick network, and the notebook's own loop."""

import hashlib
import http.server
import io
import math
import multiprocessing
import os
import sys
import tarfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for variable in ("PROFILE", "DATA_DIR", "RUNS_DIR", "TEACHER_WEIGHTS"):
    os.environ.pop(f"KD_{variable}", None)
torch.set_num_threads(1)  # the networks here are small

import kd_utils as kd  # noqa: E402 - found through the path above


def code_cells(name="Imagewoof_KD.ipynb"):
    cells = nbformat.read(ROOT / name, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def notebook_train():
    """`train` as the reader runs it: the notebook's own cell."""
    [cell] = [cell for cell in code_cells() if cell.startswith("def train(stage)")]
    names = {"kd": kd, "torch": torch}
    exec(cell, names)
    return names["train"]


def label_loss(student_logits, teacher_logits, targets):
    return F.cross_entropy(student_logits.float(), targets)


def distilled(student_logits, teacher_logits, targets):
    return kd.distillation_loss(student_logits, teacher_logits, targets, 2.0, 0.5)


def make_split(count=48, seed=0, size=32):
    """Three classes that differ in colour; a quarter of the images is never seen."""
    generator, number = torch.Generator().manual_seed(seed), torch.arange(count)
    shape = (count, 3, size, size)
    images = torch.randint(0, 120, shape, dtype=torch.uint8, generator=generator)
    images[number, number % 3] += 120
    columns = [values.to(kd.DEVICE) for values in (images, number % 3, number % 4 == 0)]
    return kd.Split(columns[0], columns[1], ("red", "green", "blue"), columns[2])


def tiny(num_classes, activation=nn.ReLU):
    """Quick, with what a resume must restore: batch statistics, and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4, bias=False),
        nn.BatchNorm2d(8),
        activation(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def tiny_resnet():
    network = tiny(9)
    network.fc = nn.Linear(4, 9)
    return network


def make_teacher():
    with kd.seeded(7):
        return tiny(3).to(kd.DEVICE).eval().requires_grad_(False)


def make_stage(settings, losses=None, teacher=None, **changes):
    networks = changes.get("networks", {"tiny": tiny})
    splits = changes.get("splits") or (make_split(), make_split(24, seed=1))
    name = changes.get("name", "Experiment 1")
    losses = losses or {"alone": label_loss}
    return kd.Stage(name, losses, settings, splits, networks, teacher)


def finish(stage, logits=None):
    """Writes the file of a finished stage without its training."""
    for student in stage.students:
        answers = logits[student.arm, student.seed] if logits else torch.zeros(24, 3)
        student.logits = answers
        student.history = {
            key: [0.25] * stage.settings.epochs for key in student.history
        }
    stage.seconds = [60.0 * (epoch + 1) for epoch in range(stage.settings.epochs)]
    stage.path.parent.mkdir(parents=True, exist_ok=True)
    stage.save()


def same(first, second):
    """Whether two networks have the same weights and buffers, bit for bit."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class Pair(nn.Flatten):
    def forward(self, x):
        return x, x


def ending_with(layer):
    return lambda num_classes: nn.Sequential(nn.Conv2d(3, 3, 1), layer)


NO_LOGITS = {
    r"\[49152\]": ending_with(nn.Flatten(0)),
    r"\[16, 3, 32, 32\]": ending_with(nn.Identity()),
    "tuple": ending_with(Pair()),
}


def odd(num_classes):
    """A network with an attribute `classes`, a buffer of −inf and one of no element."""
    network = tiny(num_classes)
    network.classes = 1000
    network.register_buffer("mask", torch.full((3,), -torch.inf))
    network.register_buffer("nothing", torch.empty(0))
    return network


def breaking(at):
    """A loss that is NaN at these calls."""
    calls = iter(range(10_000))

    def loss(student_logits, teacher_logits, targets):
        factor = math.nan if next(calls) in at else 1
        return label_loss(student_logits, None, targets) * factor

    return loss


def assert_same(students, others):
    for first, second in zip(students, others, strict=True):
        assert same(first.network, second.network)
        assert torch.equal(first.logits, second.logits)
        assert first.history == second.history


class Relu:
    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x.mean((2, 3)).relu())


class Tanh:
    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x.mean((2, 3)).tanh())


def smoothed(amount):
    return {"a": lambda s, t, y: F.cross_entropy(s, y, label_smoothing=amount)}


def soft(temperature):
    return {"a": partial(kd.distillation_loss, temperature=temperature, alpha=0.5)}


def network(build):
    return {"networks": {"n": build}}


def other_images(split):
    split.images[5, 0, 3, 3] ^= 1
    return split


def other_targets(split):
    split.targets[:2] = split.targets[:2].flip(0)
    return split


def other_teacher():
    teacher = make_teacher()
    teacher[1].running_mean[0] += 1e-3  # a buffer shapes its answers, too
    return teacher


HARD = {"a": lambda s, t, y: F.cross_entropy(s, y, label_smoothing=0.1)}
HARDER = {"a": lambda s, t, y: F.cross_entropy(s, y, label_smoothing=0.2)}
TRAIN, VAL = make_split, partial(make_split, 24, 1)
RECORDS = [
    ("content of train", {}, {"splits": (other_images(TRAIN()), VAL())}),
    ("content of train", {}, {"splits": (other_targets(TRAIN()), VAL())}),
    ("content of val", {}, {"splits": (TRAIN(), other_images(VAL()))}),
    ("content of val", {}, {"splits": (TRAIN(), other_targets(VAL()))}),
    ("layers", network(tiny), network(partial(tiny, activation=nn.SiLU))),
    ("source", network(partial(Relu.Net, 3)), network(partial(Tanh.Net, 3))),
    ("losses, a, source", {"losses": HARD}, {"losses": HARDER}),
    (
        "amount was 0.1 and is 0.2",
        {"losses": smoothed(0.1)},
        {"losses": smoothed(0.2)},
    ),
    (
        "temperature was 2.0 and is 4.0",
        {"losses": soft(2.0)},
        {"losses": soft(4.0)},
    ),
    ("teacher", {"teacher": make_teacher()}, {"teacher": other_teacher()}),
    ("batch size was 16 and is 24", {}, {"batch_size": 24}),
    ("epochs was 2 and is 3", {}, {"epochs": 3}),
    ("smallest crop was 0.35 and is 0.5", {}, {"min_crop": 0.5}),
    ("seed of the stream was 0 and is 1", {}, {"stream_seed": 1}),
    ("peak learning rate was 0.004 and is 0.1", {}, {"learning_rate": 0.1}),
    ("weight decay was 0.05 and is 0.1", {}, {"weight_decay": 0.1}),
    ("seeds was (0, 1) and is (0, 5)", {}, {"seeds": (0, 5)}),
    ("precision was float32 and is bfloat16", {}, {"precision": torch.bfloat16}),
]


def train_by_hand(network, settings):
    """AdamW and one cycle, as their papers have it, for 12 steps and seed 3."""
    weights = list(network.parameters())
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(12):
        if step % 3 == 0:
            batches = kd.augmented_batches(make_split(), settings, step // 3)
        images, targets = next(batches)
        with kd.seeded(3, step):
            loss = F.cross_entropy(network.train()(images), targets)
        gradients = torch.autograd.grad(loss, weights)

        # From a 25th of the peak up to it, then down to (almost) 0
        top, peak = 0.3 * 12 - 1, settings.learning_rate
        rate = peak * (0.52 - 0.48 * math.cos(math.pi * step / top))
        if step > top:
            rate = peak * (0.5 + 0.5 * math.cos(math.pi * (step - top) / (11 - top)))
        for w, g, m, v in zip(weights, gradients, first, second, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            size = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            w.data.mul_(1 - rate * settings.weight_decay)
            w.data.sub_(rate * m / (1 - 0.9 ** (step + 1)) / size)


CHANCE = torch.Generator().manual_seed(0)
# Gains [seeds, images], and their degrees of freedom
BOTH = np.array([[1.0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, -1]])
SEEDS = [(np.outer(np.arange(n), np.ones(200)), n - 1) for n in (2, 3, 5)]
IMAGES = [
    (np.outer(np.ones(3), np.arange(n) % 3), freedom)
    for n, freedom in ((4, 3), (11, 10), (46, 40), (900, 100))
]
GAINS = [(BOTH, 3), *SEEDS, *IMAGES]

RIGHT = {  # whose answers are right, by arm and seed: all different
    (arm, seed): torch.rand(24, generator=CHANCE) < 0.3 + 0.2 * index + 0.1 * seed
    for index, arm in enumerate(("alone", "class mean", "distilled"))
    for seed in (0, 1)
}
LOGITS = {  # a right answer is the label, a wrong one the next class
    key: torch.eye(3)[(torch.arange(24) + ~right) % 3] * 4.0
    for key, right in RIGHT.items()
}


def make_study(settings, second=None, shift=0.0):
    """The files of a study; `shift` makes another teacher, which it does not report."""
    one = make_stage(settings)
    finish(one, LOGITS)
    learner = make_stage(replace(settings, seeds=(9,)), name="teacher")
    finish(learner, {("alone", 9): LOGITS["distilled", 1]})
    teacher = learner.students[0].network.eval().requires_grad_(False)
    teacher[-1].bias += shift
    losses = {"class mean": distilled, "distilled": distilled}
    two = make_stage(second or settings, losses, teacher, name="Experiment 2")
    finish(two, LOGITS)
    return one, two


# ── Independent calculations ──────────────────────────────────────────────
def softmax(logits, temperature):
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def by_the_definition(student, teacher, targets, temperature, alpha):
    """The loss in plain Python floats, straight from the formula."""
    total = 0.0
    rows = zip(student.tolist(), teacher.tolist(), targets.tolist(), strict=True)
    for s, t, target in rows:
        p, q = softmax(t, temperature), softmax(s, temperature)
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += alpha * temperature**2 * kl
        total -= (1 - alpha) * math.log(softmax(s, 1)[target])
    return total / len(targets)


def shaken(network):
    """The network in evaluation mode, with batch statistics that are not 0 and 1."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    with kd.seeded(0):
        for norm in norms:
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.data.uniform_(0.5, 1.5)
    return network.eval()


def custom_by_functions(network, x):
    values = iter(network.state_dict().values())

    def layer(x, stride, groups):
        weight, scale, shift, average, variance, _ = (next(values) for _ in range(6))
        x = F.conv2d(x, weight, None, stride, 1, groups=groups)
        return F.relu(F.batch_norm(x, average, variance, scale, shift))

    for width, groups in ((32, 1), (64, 1), (128, 1), (256, 1), (512, 2)):
        x = layer(x, 2, 1)
        x = x + layer(x, 1, groups)
        assert x.shape[1] == width
    return F.linear(x.mean((2, 3)), next(values), next(values))


def lenet_by_functions(network, x):
    values = iter(network.parameters())
    for size in (14, 5, 1):
        x = F.conv2d(x, next(values), next(values)).relu()
        x = F.adaptive_max_pool2d(x, size)
    x = F.linear(x.flatten(1), next(values), next(values)).relu()
    return F.linear(x, next(values), next(values))


def student_quantile(freedom):
    """The 97.5 % quantile of Student's t, by adding up its density."""
    x = np.arange(0, 20, 1e-4) + 5e-5
    gammas = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    density *= math.exp(gammas) / math.sqrt(math.pi * freedom)
    return x[np.searchsorted(np.cumsum(density) * 1e-4, 0.475)]


# ── Interruptions, other processes, GPUs ──────────────────────────────────
class Transfers(TorchDispatchMode):
    """Notes every operation that makes the host wait for the device, or copies."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = [value for value in args if isinstance(value, torch.Tensor)]
        is_moved = isinstance(result, torch.Tensor) and any(
            value.device != result.device and value.dim() for value in inputs
        )
        waits = ("_local_scalar_dense", "nonzero")
        if is_moved or str(function).split(".")[1] in waits:
            self.found.append(str(function))
        return result


def put_on(network, device):
    """`network.to(device)` for fake tensors, which the network itself cannot do."""
    for module in network.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None:
                    new = torch.empty(value.shape, dtype=value.dtype, device=device)
                    is_weight = isinstance(value, nn.Parameter)
                    values[name] = nn.Parameter(new) if is_weight else new
    network.to = lambda *_, **__: network
    return network


@contextmanager
def fake_gpu(monkeypatch):
    """Inside, tensors claim to be on a GPU; networks are made by what this yields."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        cuda, networks = torch.device("cuda"), []
        try:
            torch.zeros(1).to(cuda)
        except RuntimeError:
            pytest.skip("this torch needs a driver even for tensors that are not there")

        def build(network):
            networks.append(put_on(network(3), cuda))
            return networks[-1]

        def backward(loss):  # the true one needs a driver
            for weight in (w for network in networks for w in network.parameters()):
                weight.grad = torch.zeros_like(weight)

        common = torch.cuda.amp.common
        monkeypatch.setattr(common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.Tensor, "backward", backward)
        monkeypatch.setattr(kd, "choose_precision", lambda: torch.float16)
        monkeypatch.setattr(kd, "DEVICE", torch.device("cuda:0"))
        yield build, Transfers()


class StopTraining(Exception):
    """What interrupts a training in these tests."""


def stop_after(steps, stage):
    """Makes the last student raise in place of its step number `steps` + 1."""
    step, left = stage.students[-1].step, iter(range(steps))

    def limited(loss):
        if next(left, None) is None:
            raise StopTraining
        step(loss)

    stage.students[-1].step = limited


def train_in_another_process(settings, connection):
    torch.set_num_threads(1)
    kd.DEVICE, kd.CHECKPOINT_SECONDS = torch.device("cpu"), 0
    kd.choose_precision = lambda: torch.float32
    train = notebook_train()
    connection.send("ready")
    stage = make_stage(settings, {"distilled": distilled}, make_teacher())
    train(stage)
    weights = [kd.fingerprint(s.network.state_dict().values()) for s in stage.students]
    connection.send((weights, [student.history for student in stage.students]))


def start(settings):
    context = multiprocessing.get_context("forkserver")  # imports torch once for all
    context.set_forkserver_preload(
        ["torch._subclasses", "torchvision", "nbformat", "pytest"]
    )
    receiving, sending = context.Pipe(duplex=False)
    target = train_in_another_process
    process = context.Process(target=target, args=(settings, sending))
    process.start()
    assert receiving.recv() == "ready"
    return process, receiving


def train_watched(settings, teacher, build, watch):
    """Three steps of a student of each network and arm, the last two in `watch`."""
    means, split = torch.zeros(3, 3, device=kd.DEVICE), make_split()

    def class_mean(student_logits, teacher_logits, targets):
        return distilled(student_logits, means[targets], targets)

    losses = {"alone": label_loss, "class mean": class_mean, "distilled": distilled}
    students = []
    for name, arm in ((name, arm) for name in kd.STUDENTS for arm in losses):
        network = build(kd.STUDENTS[name])
        student = kd.Student(network, name, arm, 0, losses[arm], settings, 100)
        student.is_open = True
        students.append(student)

    def batches(epoch):
        stream = kd.augmented_batches(split, settings, epoch)
        yield next(stream)  # the epoch's random choices are sent, states are made
        with watch:
            yield from stream

    names = {"students": students, "teacher": teacher, "batches": batches}
    notebook_train()(SimpleNamespace(epochs_left=lambda: [0], **names))
    assert [student.steps for student in students] == [3] * 6
    return students[0].losses[0]


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def settings(tmp_path):
    demo = kd.choose_settings("imagewoof2-160", "demo")
    return replace(demo, runs_dir=tmp_path / "runs", batch_size=16, epochs=2)


@pytest.fixture
def train():
    return notebook_train()


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 5, 10, generator=generator)
    return student, teacher, torch.randint(0, 10, (5,), generator=generator)


@pytest.fixture
def exact(monkeypatch):
    """On the CPU in float32, where the same numbers come out each time."""
    monkeypatch.setattr(kd, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float32)
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", kd.CHECKPOINT_SECONDS)  # put back


@pytest.fixture
def float16(monkeypatch):
    """float16 with the gradient scaler, as on a T4, on the CPU."""
    monkeypatch.setattr(kd, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float16)


# ── Archives and a server ─────────────────────────────────────────────────
def photograph(mode="RGB", size=(40, 50)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def archive_of(members):
    """A .tgz from {name: bytes or TarInfo}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            is_info = isinstance(content, tarfile.TarInfo)
            info = content if is_info else tarfile.TarInfo(name)
            body = b"" if is_info else content
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


PLACES = ("train/a", "train/b", "val/a", "val/b")
IMAGES = {f"tiny/{place}/x.JPEG": photograph() for place in PLACES}
GOOD = archive_of(IMAGES)
MD5 = hashlib.md5(GOOD).hexdigest()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """A dataset `tiny`, two images in train and in val, whose archive is GOOD."""
    monkeypatch.setitem(kd.DATASETS, "tiny", (MD5, (2, 2)))


SILENCE = object()


@contextmanager
def serving(*answers):
    """A loopback server that gives these bodies in turn, the last one for ever."""
    asked, done = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = answers[min(len(asked), len(answers) - 1)]
            asked.append(self.path)
            if body is SILENCE:
                done.wait(30)
                return
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        done.set()
        server.shutdown()
        server.server_close()


def own_folder(root, **classes):
    """`root` with train and val, each with these classes of one image."""
    for split in ("train", "val"):
        for name, content in classes.items():
            path = root / split / name / "one.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
    return root


def image_of(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return kd.read_image(tmp_path / name, 32)
