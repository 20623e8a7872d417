"""One stream for all students, steps as by hand, checkpoints that survive anything."""

import copy
import math
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import conftest as kit
import pytest
import torch
from conftest import distilled, finish, make_split, make_stage, make_teacher, same, tiny
from torch import nn

import kd_utils as kd


# ── Steps ─────────────────────────────────────────────────────────────────
def test_steps_are_adamw_and_one_cycle_by_hand(exact, settings, train):
    numbers = {"learning_rate": 0.02, "weight_decay": 1.0}
    settings = replace(settings, seeds=(3,), epochs=4, **numbers)
    stage = make_stage(settings)
    train(stage)

    with kd.seeded(3):
        network = tiny(3)
    kit.train_by_hand(network, settings)
    found = stage.students[0].network.state_dict()
    for name, value in network.state_dict().items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=2e-4), name


def test_pairs_start_alike_and_read_what_the_teacher_reads(exact, settings, train):
    seen, read = {"alone": [], "distilled": []}, []

    def record(student_logits, teacher_logits, targets, arm):
        seen[arm].append((student_logits.detach().clone(), targets, teacher_logits))
        return 0 * student_logits.sum()  # no gradient, so that they stay alike

    losses = {arm: partial(record, arm=arm) for arm in seen}
    stage = make_stage(replace(settings, weight_decay=0.0), losses, make_teacher())
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
    def build(_):
        return nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))

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
            answers = kd.predict(student.network, split).argmax(1).tolist()
            pairs = list(zip(answers, split.targets.tolist(), strict=True))[::every]
            score = student.history[f"{name}_accuracy"][-1]
            assert score == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
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


@pytest.mark.parametrize("told, build", kit.NO_LOGITS.items())
def test_output_that_is_no_logits_is_named(settings, train, told, build):
    with pytest.raises(ValueError, match=r"odd, alone, seed 0.*\[B, C\].*" + told):
        train(make_stage(settings, networks={"odd": build}))


# ── The teacher ───────────────────────────────────────────────────────────
def test_teacher_is_bit_identical_after_training(settings, train):
    teacher = kit.odd(3).to(kd.DEVICE).eval().requires_grad_(False)
    before = copy.deepcopy(teacher)
    train(make_stage(settings, {"d": distilled}, teacher, networks={"odd": kit.odd}))
    assert same(teacher, before) and not teacher.training
    assert all(weight.grad is None for weight in teacher.parameters())


def test_teacher_that_could_change_or_has_other_classes_is_refused(settings):
    for thaw in (nn.Module.train, nn.Module.requires_grad_):
        with pytest.raises(ValueError, match="freeze the teacher first"):
            make_stage(settings, teacher=thaw(make_teacher()))
    teacher, val = make_teacher(), make_split(24)
    teacher.trained_on = val.classes = ("green", "red", "blue")
    for changes in ({"teacher": teacher}, {"splits": (make_split(), val)}):
        with pytest.raises(ValueError, match=r"\('green', 'red', 'blue'\)"):
            make_stage(settings, **changes)
    learner = make_stage(settings).students[0].network
    assert learner.trained_on == ("red", "green", "blue")


def test_new_layer_of_the_teacher_follows_the_seed(settings, monkeypatch):
    monkeypatch.setattr(kd, "resnet50", kit.tiny_resnet)
    networks = {"ResNet": partial(kd.build_teacher, weights=None)}
    made = [make_stage(settings, networks=networks).students for _ in range(2)]
    layers = [student.network.fc for students in made for student in students]
    assert same(layers[0], layers[2]) and not same(layers[0], layers[1])


# ── Numbers that are not finite ───────────────────────────────────────────
def test_nan_is_named_and_never_saved(exact, settings, train, monkeypatch):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)
    # Two students, three steps an epoch: the eighth call is the second student's
    stage = make_stage(settings, {"alone": kit.breaking({7})})
    with pytest.raises(FloatingPointError, match=r"alone, seed 1 .*learning rate"):
        train(stage)
    saved = kd.read_checkpoint(stage.path)
    networks = [student["network"].values() for student in saved["students"]]
    assert len(saved["seconds"]) == 1
    assert all(value.isfinite().all() for values in networks for value in values)
    stage.students[0].network[-1].bias.data[0] = math.nan  # though its losses are good
    with pytest.raises(FloatingPointError, match="alone, seed 0 is not finite"):
        stage.check_finite(stage.val)


def test_teacher_whose_answers_are_not_finite_is_named(settings, train):
    teacher = make_teacher()
    teacher[-1].bias[1] = torch.nan
    with pytest.raises(FloatingPointError, match="teacher's logits are not finite"):
        train(make_stage(settings, {"distilled": distilled}, teacher))


def test_float16_skips_a_step_but_not_an_epoch(float16, settings, train):
    stage = make_stage(replace(settings, seeds=(0,)), {"alone": kit.breaking({1, 4})})
    train(stage)
    assert all(map(math.isfinite, stage.students[0].history["loss"]))
    stage = make_stage(settings, {"alone": kit.breaking(range(6, 99))}, name="other")
    with pytest.raises(FloatingPointError, match="seed 0 is not finite"):
        train(stage)


# ── Checkpoints ───────────────────────────────────────────────────────────
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_training_resumes_bit_for_bit(exact, settings, train, precision, steps):
    kd.choose_precision, kd.CHECKPOINT_SECONDS = lambda: precision, 0
    settings, losses = replace(settings, epochs=3), {"distilled": distilled}
    make = partial(make_stage, settings, losses, make_teacher())
    whole, broken, resumed = (make(name=name) for name in ("whole", "cut", "cut"))
    for student in whole.students + broken.students + resumed.students:
        if student.scaler.is_enabled():  # so large that it skips the first steps
            student.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    begun = copy.deepcopy(whole.students[0].network)
    train(whole)
    kit.stop_after(steps, broken)
    with pytest.raises(kit.StopTraining):
        train(broken)
    train(resumed)
    kit.assert_same(whole.students, resumed.students)
    assert not torch.equal(begun[0].weight, whole.students[0].network[0].weight)
    assert (whole.students[0].scaler.get_scale() == 1) == (precision is torch.float32)


def test_stage_left_before_it_was_saved_must_be_made_anew(settings, train):
    for steps in (1, 4):  # in the first epoch, and in the second
        stage = make_stage(settings)
        kit.stop_after(steps, stage)
        for error in (kit.StopTraining, RuntimeError):
            with pytest.raises(error):
                train(stage)


def test_finished_stage_is_loaded_and_tells_its_story(settings, train, capsys):
    losses = dict.fromkeys(("alone", "class mean", "distilled"), kit.label_loss)
    networks = {"a long name": tiny, "another name": tiny}
    stages = [make_stage(settings, losses, networks=networks) for _ in range(2)]
    train(stages[0])
    printed = capsys.readouterr().out.replace("\r", "\n").splitlines()
    kit.stop_after(0, stages[1])  # it must take no step
    train(stages[1])
    told = capsys.readouterr().out.splitlines()
    assert str(stages[0].path) in told[0] and max(map(len, told)) <= 100
    assert set(told[1:]) <= set(printed) and told[1].startswith("epoch  1 |")
    lines = [line.replace("\N{NO-BREAK SPACE}", " ") for line in told]
    for name, arm in ((name, arm) for name in networks for arm in losses):
        pair = [s for s in stages[1].students if (s.name, s.arm) == (name, arm)]
        mean = sum(50 * student.history["val_accuracy"][1] for student in pair)
        assert any(f"{name} {arm} {mean:.1f}" in line for line in lines)  # not cut
    kit.assert_same(stages[0].students, stages[1].students)


def test_arms_in_another_order_keep_their_students(settings):
    losses = {"alone": kit.label_loss, "distilled": kit.label_loss}
    finish(make_stage(settings, losses), kit.LOGITS)
    stage = make_stage(settings, dict(reversed(losses.items())))
    next(stage.epochs_left(), None)  # it may load them, or train anew
    for s in stage.students:
        assert s.logits is None or torch.equal(s.logits, kit.LOGITS[s.arm, s.seed])


@pytest.mark.parametrize("told, before, after", kit.RECORDS)
def test_changed_stage_is_trained_anew(exact, settings, capsys, told, before, after):
    finish(make_stage(settings, **before))
    assert list(make_stage(settings, **before).epochs_left()) == []
    numbers = {key: after[key] for key in after if hasattr(settings, key)}
    others = {key: after[key] for key in after if key not in numbers}
    precision = others.pop("precision", torch.float32)
    kd.choose_precision = lambda: precision
    capsys.readouterr()
    assert next(make_stage(replace(settings, **numbers), **others).epochs_left()) == 0
    said = capsys.readouterr().out
    assert told in said and "Experiment 1.pt.1" in said and "; " not in said


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


def test_kills_at_random_moments_change_nothing(settings):
    settings, moments, kills = replace(settings, epochs=30), random.Random(0), 0
    _, receiving = kit.start(replace(settings, runs_dir=settings.runs_dir / "whole"))
    expected = receiving.recv()
    for _ in range(5):
        process, receiving = kit.start(settings)
        process.join(moments.uniform(0.02, 0.3))  # the moment, not a wait for something
        if process.exitcode is not None:
            break  # the training was faster
        process.kill()  # SIGKILL
        process.join()
        kills += 1
        assert not list(settings.runs_dir.glob("*.pt.*"))  # never damaged
    else:
        _, receiving = kit.start(settings)
    assert kills and receiving.recv() == expected


# ── On a GPU, and what it will do, without one ────────────────────────────
@pytest.mark.skipif(torch.cuda.is_available(), reason="see the next test")
def test_steps_on_a_gpu_that_is_not_there_wait_for_nothing(settings, monkeypatch):
    with kit.fake_gpu(monkeypatch) as (build, transfers):
        teacher = build(tiny).eval()
        loss = kit.train_watched(settings, teacher, build, transfers)
        assert transfers.found == [] and loss.dtype is torch.float32
        assert kd.predict(teacher, make_split()).device == loss.device == kd.DEVICE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_wait_for_nothing(settings):
    build, watch = (lambda network: network(3)), kit.no_waiting()
    kit.train_watched(settings, make_teacher(), build, watch)
