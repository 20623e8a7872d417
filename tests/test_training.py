"""Stages: their steps, their teacher, their checkpoints, and what they notice."""

import copy
import math
import multiprocessing
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

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

import kd_utils as kd


# ── Steps ─────────────────────────────────────────────────────────────────
def test_steps_are_adamw_with_one_cycle(exact, settings, train):
    numbers = {"learning_rate": 0.02, "weight_decay": 1.0, "epochs": 4, "seeds": (3,)}
    settings = replace(settings, **numbers)
    stage = make_stage(settings)
    train(stage)

    with kd.seeded(3):
        network = tiny(3)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1.0)
    for step in range(12):
        if step % 3 == 0:
            batches = kd.augmented_batches(make_split(), settings, step // 3)
        images, targets = next(batches)
        # From a 25th of the peak up to it, then down to (almost) 0, along a cosine
        top = 0.3 * 12 - 1
        share = 0.52 - 0.48 * math.cos(math.pi * step / top)
        if step > top:
            share = 0.5 + 0.5 * math.cos(math.pi * (step - top) / (11 - top))
        optimizer.param_groups[0]["lr"] = 0.02 * share
        with kd.seeded(3, step):
            loss = F.cross_entropy(network.train()(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = stage.students[0].network.state_dict()
    for name, value in network.state_dict().items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=2e-4), name


def test_pairs_start_alike_and_read_what_the_teacher_reads(exact, settings, train):
    seen, read = {"alone": [], "distilled": []}, []

    def record(student_logits, teacher_logits, targets, arm):
        seen[arm].append((student_logits.detach().clone(), targets, teacher_logits))
        return 0 * student_logits.sum()  # no gradient, so that they stay alike

    losses = {arm: partial(record, arm=arm) for arm in seen}
    settings = replace(settings, weight_decay=0.0)
    stage = make_stage(settings, losses, teacher=make_teacher())
    for network in (stage.teacher, *(student.network for student in stage.students)):
        network.register_forward_pre_hook(lambda module, x: read.append((module, x[0])))
    train(stage)

    in_steps = [(module, images) for module, images in read if len(images) == 16]
    assert len(in_steps) == 2 * 3 * 5 and len(seen["alone"]) == 2 * 3 * 2
    for first in range(0, len(in_steps), 5):  # the teacher, then four students
        teacher, views = in_steps[first]
        assert teacher is stage.teacher
        assert all(images is views for _, images in in_steps[first : first + 5])
    for first, second in zip(seen["alone"], seen["distilled"], strict=True):
        assert all(map(torch.equal, first, second))  # dropout, too
    assert not torch.equal(seen["alone"][0][0], seen["alone"][1][0])  # another seed


def test_dropout_is_new_at_each_step_and_for_each_seed(settings):
    build = lambda _: nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))  # noqa: E731
    torch.manual_seed(1)
    callers = torch.get_rng_state()
    first, other = make_stage(settings, networks={"drop": build}).students
    first.is_open = other.is_open = True
    ones = torch.ones(8, 64, device=kd.DEVICE)
    masks = [student.forward(ones) == 0 for student in (first, other, first)]
    first.steps = 1
    masks.append(first.forward(ones) == 0)
    assert torch.equal(masks[0], masks[2]) and 150 < masks[0].sum() < 362
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[3])
    assert torch.equal(torch.get_rng_state(), callers)


def test_students_learn_and_are_scored_on_train_and_val(settings, train):
    val = make_split(24, seed=1)
    val.targets = (val.targets + 1) % 3  # so that what is learned is wrong here
    stage = make_stage(replace(settings, epochs=6), splits=(make_split(), val))
    train(stage)
    for student in stage.students:
        assert [len(values) for values in student.history.values()] == [6, 6, 6]
        assert student.history["loss"][-1] < student.history["loss"][0]
        assert torch.equal(student.logits, kd.predict(student.network, val).cpu())
        for name, split, every in (("train", stage.train, 10), ("val", val, 1)):
            hits = kd.predict(student.network, split).argmax(1) == split.targets
            score = student.history[f"{name}_accuracy"][-1]
            assert score == pytest.approx(hits[::every].float().mean().item())
            assert score > 0.6 if name == "train" else score < 0.4


def test_student_outside_of_its_training_says_so(settings, train):
    stage = make_stage(settings)
    student, images = stage.students[0], torch.zeros(2, 3, 32, 32, device=kd.DEVICE)
    for prepare in (lambda stage: None, train):
        prepare(stage)
        before = copy.deepcopy(student.network)
        with pytest.raises(RuntimeError, match="seed 0 is not in training"):
            student.forward(images)
        assert same(student.network, before)


class Pair(nn.Flatten):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize("last", [nn.Flatten(0), nn.Identity(), Pair()])
def test_output_that_is_no_logits_is_named(settings, train, last):
    networks = {"odd": lambda _: nn.Sequential(nn.Conv2d(3, 3, 1), last)}
    told = {nn.Flatten: r"\[49152\]", Pair: "tuple"}.get(type(last), "16, 3, 32, 32")
    with pytest.raises(ValueError, match=r"odd, alone, seed 0.*\[B, C\].*" + told):
        train(make_stage(settings, networks=networks))


# ── The teacher ───────────────────────────────────────────────────────────
def odd(num_classes):
    """A network with an attribute `classes`, a buffer of −inf and one of no element."""
    network = tiny(num_classes)
    network.classes = 1000
    network.register_buffer("mask", torch.full((3,), -torch.inf))
    network.register_buffer("nothing", torch.empty(0))
    return network


def test_teacher_is_frozen_and_bit_identical_after_training(settings, train):
    teacher = odd(3).to(kd.DEVICE).train()
    before = copy.deepcopy(teacher)
    train(make_stage(settings, {"d": distilled}, teacher=teacher, networks={"o": odd}))
    assert same(teacher, before) and not any(m.training for m in teacher.modules())
    weights = list(teacher.parameters())
    assert not any(w.requires_grad for w in weights) and weights[0].grad is None


def test_teacher_of_other_classes_is_refused(settings):
    teacher, val = make_teacher(), make_split(24)
    teacher.trained_on = val.classes = ("green", "red", "blue")
    for changes in ({"teacher": teacher}, {"splits": (make_split(), val)}):
        with pytest.raises(ValueError, match=r"\('green', 'red', 'blue'\)"):
            make_stage(settings, **changes)
    learner = make_stage(settings).students[0].network
    assert learner.trained_on == ("red", "green", "blue")


# ── Numbers that are not finite ───────────────────────────────────────────
def breaking(at):
    """A loss that is NaN at these calls."""
    calls = iter(range(10_000))

    def loss(student_logits, teacher_logits, targets):
        factor = math.nan if next(calls) in at else 1
        return label_loss(student_logits, None, targets) * factor

    return loss


def test_nan_is_named_and_never_saved(exact, settings, train, monkeypatch):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)
    # Two students, three steps an epoch: the eighth call is the second student's
    stage = make_stage(settings, {"alone": breaking({7})})
    with pytest.raises(FloatingPointError, match=r"alone, seed 1 .*learning rate"):
        train(stage)
    saved = kd.read_checkpoint(stage.path)
    networks = [student["network"].values() for student in saved["students"].values()]
    assert len(saved["seconds"]) == 1
    assert all(value.isfinite().all() for values in networks for value in values)
    network = stage.students[0].network  # whose losses are good
    for values in (network[-1].bias.data, network[1].running_mean):
        values[0] = math.nan
        with pytest.raises(FloatingPointError, match="alone, seed 0 is not finite"):
            stage.check_finite(stage.val)
        values[0] = 0


def test_teacher_whose_answers_are_not_finite_is_named(settings, train):
    teacher = make_teacher()
    teacher[-1].bias.data[1] = torch.nan
    with pytest.raises(FloatingPointError, match="teacher's logits are not finite"):
        train(make_stage(settings, {"distilled": distilled}, teacher=teacher))


def test_float16_skips_a_step_but_not_an_epoch(exact, settings, train):
    exact(torch.float16)
    stage = make_stage(replace(settings, seeds=(0,)), {"alone": breaking({1, 4})})
    train(stage)
    assert all(map(math.isfinite, stage.students[0].history["loss"]))
    stage = make_stage(settings, {"alone": breaking(range(6, 99))}, name="other")
    with pytest.raises(FloatingPointError, match="seed 0 is not finite"):
        train(stage)


# ── Checkpoints ───────────────────────────────────────────────────────────
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


def assert_same(students, others):
    for first, second in zip(students, others, strict=True):
        assert same(first.network, second.network) and first.key == second.key
        assert torch.equal(first.logits, second.logits)
        assert first.history == second.history


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_training_resumes_bit_for_bit(
    exact, settings, train, monkeypatch, precision, steps
):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)
    exact(precision)
    settings, losses = replace(settings, epochs=3), {"distilled": distilled}
    make = partial(make_stage, settings, losses, teacher=make_teacher())
    whole, broken, resumed = (make(name=name) for name in ("whole", "cut", "cut"))
    for student in whole.students + broken.students + resumed.students:
        if student.scaler.is_enabled():  # so large that it skips the first steps
            student.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    begun = copy.deepcopy(whole.students[0].network)
    train(whole)
    stop_after(steps, broken)
    with pytest.raises(StopTraining):
        train(broken)
    train(resumed)
    assert_same(whole.students, resumed.students)
    assert not torch.equal(begun[0].weight, whole.students[0].network[0].weight)
    assert (whole.students[0].scaler.get_scale() == 1) == (precision is torch.float32)


def test_stage_left_before_it_was_saved_must_be_made_anew(settings, train):
    for steps in (1, 4):  # in the first epoch, and in the second
        stage = make_stage(settings)
        stop_after(steps, stage)
        for error in (StopTraining, RuntimeError):
            with pytest.raises(error):
                train(stage)


def test_finished_stage_is_loaded_and_tells_its_story(settings, train, capsys):
    losses = dict.fromkeys(("alone", "class mean"), label_loss)
    networks = {"first": tiny, "second": tiny}
    numbers = {"seeds": tuple(np.arange(2)), "learning_rate": np.float32(0.004)}
    settings = replace(settings, **numbers)  # as NumPy has them
    whole, again = (make_stage(settings, losses, networks=networks) for _ in range(2))
    train(whole)
    printed = capsys.readouterr().out.replace("\r", "\n").splitlines()
    stop_after(0, again)  # it must take no step
    train(again)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"From {whole.path}:" and told[1].startswith("epoch  1 |")
    assert set(told[1:]) <= set(printed) and max(map(len, told[1:])) <= 100
    assert_same(whole.students, again.students)
    told = " ".join(" ".join(told).split())
    for place, name in enumerate(f"{n} {arm}" for arm in losses for n in networks):
        pair = [s.history["val_accuracy"][1] for s in whole.students[2 * place :][:2]]
        assert f"{name} {50 * sum(pair):.1f}" in told  # not cut


def functional():
    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x.mean((2, 3)).relu())

    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x.mean((2, 3)).tanh())

    Other.__name__ = "Net"
    return {"n": partial(Net, 3)}, {"n": partial(Other, 3)}


def brighter(num_classes):
    network = tiny(num_classes)
    network[-1].bias.data += 1
    return network


def smoothed(amount):
    return {"a": lambda s, t, y: F.cross_entropy(s, y, label_smoothing=amount)}


def scaled(factor):
    numbers = SimpleNamespace(factor=factor)
    return {"a": lambda s, t, y: label_loss(s, t, y) * numbers.factor}


def soft(temperature):
    return {"a": partial(kd.distillation_loss, temperature=temperature, alpha=0.5)}


def changed(part, count, seed):
    split = make_split(count, seed)
    getattr(split, part)[:2] = getattr(split, part)[:2].flip(0)
    return split


def other_teacher():
    teacher = make_teacher()
    teacher[1].running_mean[0] += 1e-3  # a buffer shapes its answers, too
    return teacher


TRAIN, VAL = make_split(), make_split(24, seed=1)
NET, OTHER_NET = functional()
HARD = {"a": lambda s, t, y: F.cross_entropy(s, y, label_smoothing=0.1)}
HARDER = {"a": lambda s, t, y: F.cross_entropy(s, y, label_smoothing=0.2)}
RECORDS = [  # what is told, the key that changes, its two values
    ("content of train", "splits", (TRAIN, VAL), (changed("images", 48, 0), VAL)),
    ("content of train", "splits", (TRAIN, VAL), (changed("targets", 48, 0), VAL)),
    ("content of val", "splits", (TRAIN, VAL), (TRAIN, changed("images", 24, 1))),
    ("content of val", "splits", (TRAIN, VAL), (TRAIN, changed("targets", 24, 1))),
    ("layers", "networks", {"n": tiny}, {"n": partial(tiny, activation=nn.SiLU)}),
    ("initial weights", "networks", {"n": tiny}, {"n": brighter}),
    ("source", "networks", NET, OTHER_NET),
    ("a, source", "losses", HARD, HARDER),
    ("amount was 0.1 and is 0.2", "losses", smoothed(0.1), smoothed(0.2)),
    ("numbers.factor was 1 and is 2", "losses", scaled(1), scaled(2)),
    ("temperature was 2.0 and is 4.0", "losses", soft(2.0), soft(4.0)),
    ("teacher", "teacher", make_teacher(), other_teacher()),
    ("batch size was 16 and is 24", "batch_size", 16, 24),
    ("epochs was 2 and is 3", "epochs", 2, 3),
    ("smallest crop was 0.35 and is 0.5", "min_crop", 0.35, 0.5),
    ("seed of the stream was 0 and is 1", "stream_seed", 0, 1),
    ("peak learning rate was 0.004 and is 0.1", "learning_rate", 0.004, 0.1),
    ("weight decay was 0.05 and is 0.1", "weight_decay", 0.05, 0.1),
    ("seeds was (0, 1) and is (0, 5)", "seeds", (0, 1), (0, 5)),
    ("precision was float32 and is bfloat16", "precision", None, torch.bfloat16),
]


@pytest.mark.parametrize("told, key, old, new", RECORDS)
def test_changed_stage_is_trained_anew(exact, settings, capsys, told, key, old, new):
    def make(value):
        if hasattr(settings, key):
            return make_stage(replace(settings, **{key: value}))
        return make_stage(settings, **({key: value} if key != "precision" else {}))

    finish(make(old))
    assert list(make(old).epochs_left()) == []
    exact(new if key == "precision" else torch.float32)
    capsys.readouterr()
    assert next(make(new).epochs_left()) == 0
    said = capsys.readouterr().out
    assert told in said and "Experiment 1.pt.1" in said
    assert said.count("; ") == (key == "seeds")  # nothing else, but weights of seeds


@pytest.mark.parametrize("left", [slice(-5000), slice(0), slice(999, None)])
def test_damaged_checkpoint_is_set_aside_and_overwrites_nothing(settings, capsys, left):
    stage = make_stage(settings)
    finish(stage)
    damaged, asides = stage.path.read_bytes()[left], []
    for number in (1, 2):
        stage.path.write_bytes(damaged + bytes(number))
        asides.append(stage.path.with_name(f"Experiment 1.pt.{number}"))
        assert next(make_stage(settings).epochs_left()) == 0
        assert f"{stage.path} is no readable checkpoint" in capsys.readouterr().out
    found = [path.read_bytes() for path in asides]
    assert found == [damaged + b"\0", damaged + b"\0\0"]


def test_rename_is_tried_again(settings, monkeypatch):
    tried, replace_file = [], Path.replace

    def busy(path, new):
        tried.append(path.name)
        if len(tried) < 3:
            raise PermissionError("Drive is busy")
        return replace_file(path, new)

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(kd.time, "sleep", lambda _: None)
    finish(make_stage(settings))
    assert (settings.runs_dir / "Experiment 1.pt").exists() and len(tried) == 3
    assert str(os.getpid()) in tried[0]  # a name that no other process writes


def test_folder_that_cannot_be_written_is_noticed_at_once(tmp_path, settings):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "runs", Path("/proc/self")):
        stage = make_stage(replace(settings, runs_dir=folder))
        with pytest.raises(OSError):
            next(stage.epochs_left())


def train_in_another_process(settings, connection):
    torch.set_num_threads(1)
    kd.DEVICE, kd.CHECKPOINT_SECONDS = torch.device("cpu"), 0
    kd.choose_precision = lambda: torch.float32
    train = run_cells("def train(stage)")["train"]
    connection.send("ready")
    stage = make_stage(settings, {"distilled": distilled}, teacher=make_teacher())
    train(stage)
    weights = [kd.fingerprint(s.network.state_dict().values()) for s in stage.students]
    connection.send((weights, [student.history for student in stage.students]))


def start(settings):
    context = multiprocessing.get_context("forkserver")  # imports torch once for all
    context.set_forkserver_preload(["torch._subclasses", "torchvision", "nbformat"])
    receiving, sending = context.Pipe(duplex=False)
    arguments = (settings, sending)
    process = context.Process(target=train_in_another_process, args=arguments)
    process.start()
    assert receiving.recv() == "ready"
    return process, receiving


def test_kills_at_random_moments_change_nothing(settings):
    settings, moments, kills = replace(settings, epochs=30), random.Random(0), 0
    _, receiving = start(replace(settings, runs_dir=settings.runs_dir / "whole"))
    expected = receiving.recv()
    for _ in range(5):
        process, receiving = start(settings)
        process.join(moments.uniform(0.02, 0.3))  # the moment, not a wait for something
        if process.exitcode is not None:
            break  # the training was faster
        process.kill()  # SIGKILL
        process.join()
        kills += 1
        assert not list(settings.runs_dir.glob("*.pt.*"))  # never damaged
    else:
        _, receiving = start(settings)
    assert kills and receiving.recv() == expected
