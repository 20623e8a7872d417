"""What the tests share: small splits, a quick network, and the notebook's own loop."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from torch import nn
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
        if is_moved or str(function).split(".")[1] in (
            "_local_scalar_dense",
            "nonzero",
        ):
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


@pytest.fixture
def settings(tmp_path):
    demo = kd.choose_settings("imagewoof2-160", "demo")
    return replace(demo, runs_dir=tmp_path / "runs", batch_size=16, epochs=2)


@pytest.fixture
def train():
    return notebook_train()


@pytest.fixture
def exact(monkeypatch):
    """On the CPU in float32, where the same numbers come out each time."""
    monkeypatch.setattr(kd, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float32)


@pytest.fixture
def float16(monkeypatch):
    """float16 with the gradient scaler, as on a T4, on the CPU."""
    monkeypatch.setattr(kd, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float16)
