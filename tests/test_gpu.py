"""What steps do on a GPU: nothing that waits. With tensors that claim to be there."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import distilled, label_loss, make_split, make_teacher, run_cells, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kd_utils as kd


def train_watched(settings, teacher, build, watch):
    """Three steps of two students of each network, the last two steps in `watch`."""
    split, students = make_split(), []
    for name, network in kd.STUDENTS.items():
        for arm, loss in {"alone": label_loss, "distilled": distilled}.items():
            made = build(network)
            student = kd.Student(made, name, arm, 0, loss, settings, 100)
            student.is_open = True
            students.append(student)

    def batches(epoch):
        stream = kd.augmented_batches(split, settings, epoch)
        yield next(stream)  # the epoch's random choices are sent, states are made
        with watch:
            yield from stream

    names = {"students": students, "teacher": teacher, "batches": batches}
    train = run_cells("def train(stage)")["train"]
    train(SimpleNamespace(epochs_left=lambda: [0], **names))
    assert [student.steps for student in students] == [3] * 4
    return students[0].losses[0]


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="see the next test")
def test_steps_on_a_gpu_that_is_not_there_wait_for_nothing(settings, monkeypatch):
    def backward(loss):  # the true one needs a driver
        for weight in weights:
            weight.grad = torch.zeros_like(weight)

    def build(network):
        with torch.device("cuda"):
            made = network(3)
        made.to = lambda *_, **__: made  # it is there; fake weights cannot be moved
        weights.extend(made.parameters())
        return made

    common, weights = torch.cuda.amp.common, []
    monkeypatch.setattr(common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float16)
    monkeypatch.setattr(kd, "DEVICE", torch.device("cuda:0"))
    with FakeTensorMode(allow_non_fake_inputs=False):
        try:
            torch.zeros(1).to("cuda")
        except RuntimeError:
            pytest.skip("this torch needs a driver even for tensors that are not there")
        teacher, transfers = build(tiny).eval(), Transfers()
        loss = train_watched(settings, teacher, build, transfers)
        assert transfers.found == [] and loss.dtype is torch.float32
        assert kd.predict(teacher, make_split()).device == loss.device == kd.DEVICE


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_wait_for_nothing(settings):
    build = lambda network: network(3)  # noqa: E731 - the student moves it
    train_watched(settings, make_teacher(), build, no_waiting())
