"""Stages: their steps, their teacher, their checkpoints, and what they notice."""

import copy
import itertools
import math
import multiprocessing
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    distilled,
    finish,
    label_loss,
    make_split,
    make_stage,
    make_teacher,
    run_cells,
    same,
    tiny,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import OneCycleLR

import kd_utils as kd


# ── Steps ─────────────────────────────────────────────────────────────────
def test_steps_are_those_of_a_plain_loop_and_the_teacher_stays(exact, settings, train):
    settings = replace(settings, seeds=(3, 4), weight_decay=1.0)
    teacher, losses = make_teacher().train(), {"a": label_loss, "b": distilled}
    before, callers = copy.deepcopy(teacher), torch.get_rng_state()
    stage = make_stage(settings, losses, teacher=teacher)
    train(stage)
    assert torch.equal(torch.get_rng_state(), callers)
    assert same(teacher, before) and not any(m.training for m in teacher.modules())
    assert not any(w.requires_grad or w.grad is not None for w in teacher.parameters())

    before.eval()
    pairs = itertools.product(losses.values(), (3, 4))
    for student, (loss, seed) in zip(stage.students, pairs, strict=True):
        torch.manual_seed(1_000_003 * seed)
        network = tiny(3)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1.0)
        schedule = OneCycleLR(optimizer, 0.004, 6, cycle_momentum=False)
        for step in range(6):
            if step % 3 == 0:
                batches = kd.augmented_batches(make_split(), settings, step // 3)
            images, targets = next(batches)
            torch.manual_seed(1_000_003 * seed + step)
            logits = network.train()(images)  # dropout follows from seed and step
            optimizer.zero_grad()
            loss(logits, before(images), targets).backward()
            optimizer.step()
            schedule.step()
        found = student.network.state_dict()
        for name, value in network.state_dict().items():
            assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-5), name


def test_students_learn_in_their_epochs_only_and_are_scored(settings, train):
    val = make_split(24, seed=1)
    val.targets = (val.targets + 1) % 3  # so that what is learned is wrong here
    stage = make_stage(replace(settings, epochs=6), splits=(make_split(), val))
    student = stage.students[1]
    for run in (train, lambda stage: None):
        untouched = copy.deepcopy(student.network)
        with pytest.raises(RuntimeError, match="seed 1 is not in training"):
            student.forward(val.images.float())
        assert same(student.network, untouched)
        run(stage)
    assert student.history["loss"][-1] < student.history["loss"][0]
    assert torch.equal(student.logits, kd.predict(student.network, val).cpu())
    for name, split, every in (("train", stage.train, 10), ("val", val, 1)):
        hits = kd.predict(student.network, split).argmax(1) == split.targets
        scores = student.history[f"{name}_accuracy"]
        assert scores[5] == pytest.approx(hits[::every].float().mean().item())
        assert len(scores) == 6 and (scores[5] > 0.6) == (name == "train")


def test_students_and_teachers_that_do_not_fit_are_named(settings, train):
    for last, told in ((nn.Flatten(0), r"\[48\]"), (nn.LSTM(3, 3), "tuple")):
        networks = {"odd": lambda _, last=last: nn.Sequential(tiny(3), last)}
        with pytest.raises(ValueError, match=rf"odd, alone, seed 0.*\[B, C\].*{told}"):
            train(make_stage(settings, networks=networks))
    teacher, val = make_stage(settings).students[0].network, make_split(24)
    val.classes = ("green", "red", "blue")
    for splits in ((make_split(), val), (val, val)):  # the latter unlike the teacher's
        with pytest.raises(ValueError, match=r"\('green', 'red', 'blue'\)"):
            make_stage(settings, splits=splits, teacher=teacher)


# ── Numbers that are not finite ───────────────────────────────────────────
def infinite_at(calls):
    """A loss that is infinite at these calls."""
    counter = itertools.count()
    return lambda s, t, y: label_loss(s, t, y) / (next(counter) not in calls)


def test_nan_is_named_and_never_saved(exact, settings, train, monkeypatch):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)
    # Two students, three steps an epoch: the eighth call is the second student's
    stage = make_stage(settings, {"alone": infinite_at({7})})
    with pytest.raises(FloatingPointError, match=r"alone, seed 1 .*learning rate"):
        train(stage)
    saved = kd.read_checkpoint(stage.path)
    assert len(saved["seconds"]) == 1
    assert all(s["logits"].isfinite().all() for s in saved["students"].values())
    network = stage.students[0].network  # whose losses are good
    for values in (network[-1].bias.data, network[1].running_mean):
        values[0] = math.nan
        with pytest.raises(FloatingPointError, match="alone, seed 0 is not finite"):
            stage.check_finite(stage.val)
        values[0] = 0
    stage.teacher = network
    network[-1].bias.data[1] = math.nan
    with pytest.raises(FloatingPointError, match="teacher's logits are not finite"):
        stage.check_finite(stage.val)


def test_float16_skips_a_step_but_not_an_epoch(exact, settings, train):
    exact(torch.float16)
    stage = make_stage(replace(settings, seeds=(0,)), {"alone": infinite_at({1, 4})})
    train(stage)
    assert all(map(math.isfinite, stage.students[0].history["loss"]))
    stage = make_stage(settings, {"alone": infinite_at(range(6, 99))}, name="other")
    with pytest.raises(FloatingPointError, match="seed 0 is not finite"):
        train(stage)


# ── Checkpoints ───────────────────────────────────────────────────────────
def assert_same(students, others):
    for first, second in zip(students, others, strict=True):
        assert same(first.network, second.network) and first.key == second.key
        assert torch.equal(first.logits, second.logits)
        assert first.history == second.history


def test_training_resumes_bit_for_bit_and_tells_its_story(
    exact, settings, train, monkeypatch, capsys
):
    exact(torch.float16)
    numbers = {"seeds": tuple(np.arange(2)), "learning_rate": np.float32(0.004)}
    settings, calls = replace(settings, **numbers), itertools.count()

    def loss(student_logits, teacher_logits, targets):
        if next(calls) in (20, 29):  # in the second epoch of the stages that are cut
            raise KeyboardInterrupt
        return label_loss(student_logits, teacher_logits, targets)

    def make(name, seconds):
        monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", seconds)
        stage = make_stage(settings, {"class mean": loss}, name)
        for student in stage.students:  # so large a scale that steps are skipped
            student.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        return stage

    whole = make("whole", 300)
    train(whole)
    unsaved = make("cut", 300)
    for error in (KeyboardInterrupt, RuntimeError):  # it must be made anew
        with pytest.raises(error):
            train(unsaved)
    with pytest.raises(KeyboardInterrupt):
        train(make("cut", 0))
    resumed = make("cut", 300)
    train(resumed)
    printed = capsys.readouterr().out.replace("\r", "\n").splitlines()
    again = make("cut", 300)
    again.students[0].step = None  # no step is taken
    train(again)
    told = capsys.readouterr().out.splitlines()
    for stage in (resumed, again):
        assert_same(whole.students, stage.students)
    assert told[0] == f"From {again.path}:" and told[1].startswith("epoch  1 |")
    assert set(told) <= set(printed)
    mean = 50 * sum(student.history["val_accuracy"][-1] for student in whole.students)
    assert told[-1].split()[-4:] == ["tiny", "class", "mean", f"{mean:.1f}"]


# ── Records ───────────────────────────────────────────────────────────────
def smoothed(amount, settings):
    def loss(student_logits, teacher_logits, targets):
        smooth = amount / settings.temperature
        return F.cross_entropy(student_logits, targets, label_smoothing=smooth)

    return loss


def test_losses_and_networks_are_described_by_source_and_numbers(settings):
    warm, soft = replace(settings, temperature=4), kd.distillation_loss
    changes = {
        "amount was 0.1 and is 0.2": [smoothed(a, settings) for a in (0.1, 0.2)],
        "settings.temperature was 3.0 and is 4": [
            smoothed(0.1, numbers) for numbers in (settings, warm)
        ],
        "alpha was 0.5 and is 0.9": [partial(soft, alpha=a) for a in (0.5, 0.9)],
        "source has changed": (distilled, label_loss),
    }
    for told, losses in changes.items():
        assert kd.differences(*map(kd.describe_loss, losses)) == [told]
    sources = kd.describe_network(kd.ConvBlock(3, 4))["source"]
    assert any("x + self.refine(x)" in source for source in sources)


def test_stage_of_other_data_parts_or_settings_is_another(exact, settings):
    old, val = make_stage(settings).record, make_split(24, seed=1)

    def told(settings=settings, **changes):
        return kd.differences(old, make_stage(settings, **changes).record)

    assert told() == []
    for name in ("images", "targets"):
        part = make_split()
        setattr(part, name, getattr(part, name).roll(1, 0))
        assert told(splits=(part, val)) == ["content of train has changed"]
        assert told(splits=(make_split(), part)) == ["content of val has changed"]
    assert told(teacher=make_teacher()) == ["teacher has changed"]
    assert told(losses={"alone": distilled}) == ["losses, alone, source has changed"]
    networks = {"layers": partial(tiny, activation=nn.SiLU)}
    networks["initial weights"] = lambda num_classes: make_teacher()
    for key, network in networks.items():
        found = told(networks={"tiny": network})
        assert found == [f"networks, tiny, {key} has changed"]
    numbers = {"batch_size": 24, "epochs": 3, "min_crop": 0.5, "stream_seed": 9}
    numbers |= {"learning_rate": 0.1, "weight_decay": 0.2, "seeds": (0,)}
    for name, number in numbers.items():
        assert told(replace(settings, **{name: number}))[0].endswith(f"is {number}")
    exact(torch.bfloat16)
    assert told() == ["precision was float32 and is bfloat16"]


# ── Files ─────────────────────────────────────────────────────────────────
def test_what_cannot_be_used_is_set_aside_and_nothing_is_overwritten(settings, capsys):
    finish(make_stage(settings))
    path = settings.runs_dir / "Experiment 1.pt"
    whole = path.read_bytes()
    contents = {whole[:-5000]: "is no readable", b"": "is no readable", whole: "is 0.1"}
    for content, told in contents.items():
        path.write_bytes(content)
        next(make_stage(replace(settings, learning_rate=0.1)).epochs_left())
        assert told in capsys.readouterr().out
    asides = sorted(settings.runs_dir.glob("Experiment 1.pt.*"))
    assert [aside.read_bytes() for aside in asides] == list(contents)
    with pytest.raises(OSError):  # where nothing can be written, it is noticed at once
        next(make_stage(replace(settings, runs_dir=Path("/proc/self"))).epochs_left())


def test_rename_is_tried_again(settings, monkeypatch):
    replace_file = Mock(side_effect=[PermissionError, PermissionError, None])
    monkeypatch.setattr(Path, "replace", replace_file)
    monkeypatch.setattr(kd.time, "sleep", Mock())
    finish(make_stage(settings))
    assert replace_file.mock_calls == [call(settings.runs_dir / "Experiment 1.pt")] * 3
    [aside] = settings.runs_dir.iterdir()
    assert str(os.getpid()) in aside.name  # a name that no other process writes


def train_in_a_child(settings, ready):
    kd.DEVICE, kd.CHECKPOINT_SECONDS = torch.device("cpu"), 0
    kd.choose_precision = lambda: torch.float32
    train = run_cells("def train(stage)")["train"]
    ready.set()
    train(make_stage(settings, name="cut"))


def test_kills_at_random_moments_change_nothing(exact, settings, train):
    settings, moments, kills = replace(settings, epochs=30), random.Random(0), 0
    whole, resumed = (make_stage(settings, name=name) for name in ("whole", "cut"))
    train(whole)
    context = multiprocessing.get_context("forkserver")  # imports torch once for all
    context.set_forkserver_preload(["torch._subclasses", "torchvision", "nbformat"])
    for _ in range(5):
        ready = context.Event()
        process = context.Process(target=train_in_a_child, args=(settings, ready))
        process.start()
        assert ready.wait(60)
        process.join(moments.uniform(0.02, 0.3))  # the moment, not a wait for something
        kills += process.is_alive()  # else the training was faster
        process.kill()  # SIGKILL
        process.join()
    train(resumed)
    assert_same(whole.students, resumed.students)
    assert kills and not list(settings.runs_dir.glob("*.pt.*"))  # never damaged


# ── On a GPU, or on one that is not there ────────────────────────────────────
def train_watched(settings, build, watch=lambda: None):
    """Three steps of both networks with a teacher, the last two after `watch`."""
    split, students = make_split(), []
    for name, network in kd.STUDENTS.items():
        student = kd.Student(build(network), name, "a", 0, distilled, settings, 100)
        student.is_open = True
        students.append(student)

    def batches(epoch):
        stream = kd.augmented_batches(split, settings, epoch)
        yield next(stream)  # the epoch's random choices are sent, states are made
        watch()
        yield from stream

    stage = SimpleNamespace(epochs_left=lambda: [0], batches=batches)
    stage.students, stage.teacher = students, build(tiny).to(kd.DEVICE).eval()
    run_cells("def train(stage)")["train"](stage)
    assert [student.steps for student in students] == [3, 3]
    return students[0].losses[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="see the next test")
def test_steps_on_a_gpu_that_is_not_there_read_nothing_back(settings, monkeypatch):
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
    with FakeTensorMode():  # raises where a number is read, or two devices meet
        try:
            torch.zeros(1).to("cuda")
        except RuntimeError:
            pytest.skip("this torch needs a driver even for tensors that are not there")
        loss = train_watched(settings, build)
    assert loss.dtype is torch.float32 and loss.device == kd.DEVICE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_wait_for_nothing(settings):
    set_mode = torch.cuda.set_sync_debug_mode
    try:
        train_watched(settings, lambda make: make(3), lambda: set_mode("error"))
    finally:
        set_mode("default")
