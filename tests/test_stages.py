"""Stages: steps, checkpoints, what they notice, and the results that they leave."""

import copy
import itertools
import math
import os
import random
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import compare, distilled, label_loss, make_split, make_stage, same, tiny
from study import ANSWERS, RIGHT, VAL, finish, make_study
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import OneCycleLR

import kd_utils as kd


# ── Steps ─────────────────────────────────────────────────────────────────
def test_steps_are_a_plain_loops_and_the_teacher_stays(exact, settings, teacher, train):
    settings = replace(settings, seeds=(3, 4), weight_decay=1.0)
    losses = {"a": label_loss, "b": distilled}
    before = copy.deepcopy(teacher)
    stage = make_stage(settings, losses, teacher=teacher.train())
    train(stage)
    assert same(teacher, before) and not any(m.training for m in teacher.modules())
    assert not any(w.requires_grad or w.grad is not None for w in teacher.parameters())

    epochs = [kd.augmented_batches(make_split(), settings, epoch) for epoch in (0, 1)]
    batches = list(itertools.chain(*epochs))
    pairs = itertools.product(losses.values(), (3, 4))
    for student, (loss, seed) in zip(stage.students, pairs, strict=True):
        torch.manual_seed(1_000_003 * seed)
        network = tiny(3)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1.0)
        schedule = OneCycleLR(optimizer, 0.004, 6, cycle_momentum=False)
        for step, (images, targets) in enumerate(batches):
            torch.manual_seed(1_000_003 * seed + step)
            logits = network.train()(images)  # dropout follows from seed and step
            optimizer.zero_grad()
            loss(logits, before(images), targets).backward()
            optimizer.step()
            schedule.step()
        found = student.network.state_dict()
        for name, value in network.state_dict().items():
            assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-5), name


def test_students_learn_in_their_epochs_only_and_are_scored(exact, settings, train):
    split, val = make_split(60), make_split(24, seed=1)
    split.targets[::20] = (split.targets[::20] + 1) % 3  # 3 wrong of 6 scored
    val.targets[::4] = (val.targets[::4] + 1) % 3  # 6 of 24
    stage = make_stage(replace(settings, epochs=8), splits=(split, val))
    student = stage.students[1]
    with pytest.raises(RuntimeError, match="seed 1 is not in training"):
        student.forward(val.images.float())
    train(stage)
    trained = copy.deepcopy(student.network)
    with pytest.raises(RuntimeError, match="seed 1 is not in training"):
        student.forward(val.images.float())
    assert same(student.network, trained)
    assert torch.equal(student.logits, kd.predict(trained, val))
    for name, images in (("train", split.subset(slice(0, None, 10))), ("val", val)):
        hits = kd.predict(trained, images).argmax(1) == images.targets
        scores = student.history[f"{name}_accuracy"]
        assert len(scores) == 8 and 0 < scores[7] < 1
        assert scores[7] == pytest.approx(hits.float().mean().item())


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
    factors = (math.inf if number in calls else 1 for number in itertools.count())
    return lambda s, t, y: label_loss(s, t, y) * next(factors)


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
def test_training_resumes_bit_for_bit(exact, settings, train, monkeypatch, capsys):
    exact(torch.float16)
    numbers = {"seeds": tuple(np.arange(2)), "learning_rate": np.float32(0.004)}
    settings, calls = replace(settings, **numbers), itertools.count()
    arm = "an arm of a name so long that a line might cut it off"

    def loss(student_logits, teacher_logits, targets):
        # 0 … 11 are those of the whole stage; the next two are cut in their epoch 2
        if next(calls) in (20, 29):
            raise KeyboardInterrupt
        assert student_logits.dtype is torch.float16
        return label_loss(student_logits, teacher_logits, targets)

    def make(name, seconds):
        monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", seconds)
        stage = make_stage(settings, {arm: loss}, name)
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
    saved = kd.read_checkpoint(unsaved.path)
    torch.save({**saved, "seconds": [3600.0]}, unsaved.path)
    resumed = make("cut", 300)
    train(resumed)
    assert resumed.seconds[1] > 3600
    assert resumed.students[0].scaler.get_scale() < 2.0**20
    assert resumed.students[0].logits.dtype is torch.float32
    printed = capsys.readouterr().out.replace("\r", "\n").splitlines()
    again = make("cut", 300)
    again.students[0].step = None  # no step is taken
    train(again)
    told = capsys.readouterr().out.splitlines()
    for stage in (resumed, again):
        compare(whole.students, stage.students)
    assert told[0] == f"From {again.path}:" and "  1 |  60.0 min | " in told[1]
    assert set(told) <= set(printed)
    mean = 50 * sum(student.history["val_accuracy"][-1] for student in whole.students)
    assert " ".join(told[-1].split()).endswith(f"| tiny {arm} {mean:.1f}")


# ── Records ───────────────────────────────────────────────────────────────
AMOUNT = 0.1


def smoothed(settings, power=1):
    def loss(student_logits, teacher_logits, targets):
        smooth = AMOUNT / settings.temperature**power
        return F.cross_entropy(student_logits, targets, label_smoothing=smooth)

    return loss


def test_losses_and_networks_are_described_by_source_and_numbers(settings, monkeypatch):
    warm, soft = replace(settings, temperature=4), kd.distillation_loss
    changes = {
        "power was 1 and is 2": (smoothed(settings), smoothed(settings, power=2)),
        "settings.temperature was 3.0 and is 4": (smoothed(settings), smoothed(warm)),
        "alpha was 0.5 and is 0.9": [partial(soft, alpha=a) for a in (0.5, 0.9)],
        "source has changed": (distilled, label_loss),
    }
    for told, losses in changes.items():
        assert kd.differences(*map(kd.describe_loss, losses)) == [told]
    before = kd.describe_loss(smoothed(settings))
    monkeypatch.setitem(globals(), "AMOUNT", 0.2)
    after = kd.describe_loss(smoothed(settings))
    assert kd.differences(before, after) == ["AMOUNT was 0.1 and is 0.2"]
    sources = kd.describe_network(kd.ConvBlock(3, 4))["source"]
    assert any("x + self.refine(x)" in source for source in sources)


def test_stage_of_other_data_parts_or_settings_is_another(exact, settings, teacher):
    old, val = make_stage(settings).record, make_split(24, seed=1)

    def told(settings=settings, **changes):
        return kd.differences(old, make_stage(settings, **changes).record)

    assert told() == []
    for name in ("images", "targets"):
        part = make_split()
        setattr(part, name, getattr(part, name).roll(1, 0))
        assert told(splits=(part, val)) == ["content of train has changed"]
        assert told(splits=(make_split(), part)) == ["content of val has changed"]
    assert told(teacher=teacher) == ["teacher has changed"]
    assert told(losses={"alone": distilled}) == ["losses, alone, source has changed"]
    networks = {"layers": partial(tiny, activation=nn.SiLU)}
    networks["initial weights"] = lambda num_classes: teacher
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
def test_what_cannot_be_used_or_written_is_told(settings, monkeypatch, capsys):
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
    monkeypatch.setattr(kd.tempfile, "TemporaryFile", Mock(side_effect=PermissionError))
    with pytest.raises(PermissionError):  # it is noticed before the first step
        next(make_stage(settings).epochs_left())


def test_rename_is_tried_again(settings, monkeypatch):
    replace_file = Mock(side_effect=[PermissionError, PermissionError, None])
    monkeypatch.setattr(Path, "replace", replace_file)
    monkeypatch.setattr(kd.time, "sleep", Mock())
    finish(make_stage(settings))
    assert replace_file.mock_calls == [call(settings.runs_dir / "Experiment 1.pt")] * 3
    [aside] = settings.runs_dir.iterdir()
    assert str(os.getpid()) in aside.name  # a name that no other process writes


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, none can fork")
def test_kills_at_random_moments_change_nothing(exact, settings, train, monkeypatch):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)
    settings, moments = replace(settings, epochs=30), random.Random(0)
    whole, resumed = (make_stage(settings, name=name) for name in ("whole", "cut"))
    train(whole)
    for _ in range(5):
        child = os.fork()
        if not child:
            try:
                kd.tqdm.set_lock(threading.RLock())  # dies with the child
                train(make_stage(settings, name="cut"))
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0.02, 0.3))  # the moment, not a wait for something
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert resumed.path.exists()
    train(resumed)
    compare(whole.students, resumed.students)
    assert not list(settings.runs_dir.glob("*.pt.*"))  # never damaged


# ── On a GPU, or on one that is not there ─────────────────────────────────
@pytest.mark.skipif(torch.cuda.is_available(), reason="see the next test")
def test_steps_on_a_gpu_that_is_not_there_read_nothing(settings, train, monkeypatch):
    def backward(loss):  # the true one needs a driver
        for weight in weights:
            weight.grad = torch.zeros_like(weight)

    def build(network):
        with torch.device("cuda"):
            made = network(3)
        made.to = lambda *_, **__: made  # it is there; fake weights cannot be moved
        weights.extend(made.parameters())
        return made

    common, weights, students = torch.cuda.amp.common, [], []
    monkeypatch.setattr(common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float16)
    monkeypatch.setattr(kd, "DEVICE", torch.device("cuda:0"))
    with FakeTensorMode():  # raises where a number is read, or two devices meet
        try:
            torch.zeros(1).to("cuda")
        except RuntimeError:
            pytest.skip("this torch needs a driver even for tensors that are not there")
        for name, network in kd.STUDENTS.items():
            student = kd.Student(build(network), name, "a", 0, distilled, settings, 100)
            student.is_open = True
            students.append(student)
        stage = SimpleNamespace(students=students, teacher=build(tiny).eval())
        stage.epochs_left = lambda: [0]
        stage.batches = partial(kd.augmented_batches, make_split(), settings)
        train(stage)
    for student in students:
        assert student.steps == 3 and student.losses[0].device == kd.DEVICE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_wait_for_nothing(settings, teacher, train, monkeypatch):
    def watched(split, settings, epoch):
        stream = batches(split, settings, epoch)
        yield next(stream)  # the epoch's random choices are sent, states are made
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from stream
        finally:
            torch.cuda.set_sync_debug_mode("default")

    batches, losses = kd.augmented_batches, {"a": distilled}
    monkeypatch.setattr(kd, "augmented_batches", watched)
    train(make_stage(settings, losses, networks=kd.STUDENTS, teacher=teacher))


# ── Results ───────────────────────────────────────────────────────────────
def test_gains_are_paired_by_seed_and_take_any_metric(settings):
    make_study(settings)
    longer = make_stage(replace(settings, seeds=(1,)), {"longer": distilled}, name="x")
    finish(longer, {("longer", 1): 2 * ANSWERS["distilled", 1]})
    results = kd.Results(settings.runs_dir, VAL)
    for arm, other in (("distilled", "alone"), ("alone", "class mean")):
        pairs = [(RIGHT[arm, seed], RIGHT[other, seed]) for seed in (1, 0)]
        expected = sorted((a.int() - b.int()).tolist() for a, b in pairs)
        assert sorted(results.gains("tiny", arm, other).tolist()) == expected
    found = results.gains("tiny", "longer", "alone", lambda logits, _: logits.amax(1))
    assert found.tolist() == [[4.0] * 24]  # of the seed that both have
    assert np.array_equal(results.never_seen, np.arange(24) % 4 == 0)
    finish(make_stage(settings, name="once more"), ANSWERS)
    with pytest.raises(ValueError, match=r"once more\.pt repeats tiny, alone"):
        kd.Results(settings.runs_dir, VAL)


def test_experiments_that_do_not_belong_together_are_refused(settings, monkeypatch):
    def assert_refused(told, val=VAL):
        with pytest.raises(ValueError, match=told):
            kd.Results(settings.runs_dir, val)

    make_study(settings, replace(settings, learning_rate=0.1))
    assert_refused("1 and 2 differ: peak learning rate was 0.004 and is 0.1")
    make_study(settings, shift=0.5)
    assert_refused("Experiment 2 had another teacher")
    make_study(settings)
    assert_refused(r"1\.pt was scored on other images", make_split(24, seed=5))
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float64)
    finish(make_stage(settings), ANSWERS)
    assert_refused("precision was float64 and is ")


def test_what_is_unfinished_damaged_or_a_trial_is_left_out(settings, capsys):
    one, two = make_study(settings)
    splits = (make_split(), make_split(24))
    finish(make_stage(settings, name="trials/x", splits=splits), ANSWERS)
    two.path.write_bytes(b"damaged")
    torch.save({"foreign": 1}, settings.runs_dir / "mine.pt")
    one.seconds.pop()
    one.save()
    assert set(kd.Results(settings.runs_dir, VAL).stages) == {"teacher"}
    assert "is no readable checkpoint" in capsys.readouterr().out
    assert (settings.runs_dir / "Experiment 2.pt.1").read_bytes() == b"damaged"
