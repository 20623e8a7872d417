"""One stream for all students, steps as by hand, checkpoints that survive anything."""

import copy
import math
import multiprocessing
import random
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest
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
    notebook_train,
    put_on,
    same,
    tiny,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kd_utils as kd


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


# ── Steps ─────────────────────────────────────────────────────────────────
def test_steps_are_adamw_and_one_cycle_by_hand(exact, settings, train):
    numbers = {"learning_rate": 0.02, "weight_decay": 1.0}
    settings = replace(settings, seeds=(3,), epochs=4, **numbers)
    stage = make_stage(settings)
    train(stage)

    with kd.seeded(3):
        network = tiny(3)
    weights = list(network.parameters())
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(12):
        if step % 3 == 0:
            batches = kd.augmented_batches(make_split(), settings, step // 3)
        images, targets = next(batches)
        with kd.seeded(3, step):
            loss = F.cross_entropy(network.train()(images), targets)
        gradients = torch.autograd.grad(loss, weights)
        top = 0.3 * 12 - 1  # the step at the peak: from a 25th up to it, then down to 0
        rate = 0.0104 - 0.0096 * math.cos(math.pi * step / top)
        if step > top:
            rate = 0.01 + 0.01 * math.cos(math.pi * (step - top) / (11 - top))
        for w, g, m, v in zip(weights, gradients, first, second, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            size = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            w.data.mul_(1 - rate).sub_(rate * m / (1 - 0.9 ** (step + 1)) / size)
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
    for start in range(0, len(in_steps), 5):  # the teacher, then four students
        teacher, views = in_steps[start]
        assert teacher is stage.teacher
        assert all(images is views for _, images in in_steps[start : start + 5])
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


def test_result_does_not_depend_on_the_rest_of_the_cohort(exact, settings, train):
    losses = {"alone": label_loss, "distilled": distilled}
    together = make_stage(settings, losses, make_teacher(), name="together")
    apart = make_stage(settings, {"distilled": distilled}, make_teacher(), name="apart")
    train(together)
    train(apart)
    assert_same(together.students[2:], apart.students)


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
        with pytest.raises(
            RuntimeError, match="tiny, alone, seed 0 is not in training"
        ):
            student.forward(images)
        assert same(student.network, before)


class Pair(nn.Flatten):
    def forward(self, x):
        return x, x


ODD_OUTPUTS = {
    r"\[49152\]": nn.Flatten(0),
    r"\[16, 3, 3": nn.Identity(),
    "tuple": Pair(),
}


@pytest.mark.parametrize("told, layer", ODD_OUTPUTS.items())
def test_output_that_is_no_logits_is_named(settings, train, told, layer):
    networks = {"odd": lambda _: nn.Sequential(nn.Conv2d(3, 3, 1), layer)}
    with pytest.raises(ValueError, match=r"odd, alone, seed 0: .*\[B, C\].*" + told):
        train(make_stage(settings, networks=networks))


# ── The teacher ───────────────────────────────────────────────────────────
def odd(num_classes):
    """A network with an attribute `classes`, a buffer of −inf and one of no element."""
    network = tiny(num_classes)
    network.classes = 1000
    network.register_buffer("mask", torch.full((3,), -torch.inf))
    network.register_buffer("nothing", torch.empty(0))
    return network


def test_teacher_is_bit_identical_after_training(settings, train):
    teacher = odd(3).to(kd.DEVICE).eval().requires_grad_(False)
    before = copy.deepcopy(teacher)
    train(make_stage(settings, {"d": distilled}, teacher, networks={"odd": odd}))
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
    monkeypatch.setattr(kd, "resnet50", lambda: conftest.tiny_resnet())
    networks = {"ResNet": partial(kd.build_teacher, weights=None)}
    made = [make_stage(settings, networks=networks).students for _ in range(2)]
    layers = [student.network.fc for students in made for student in students]
    assert same(layers[0], layers[2]) and not same(layers[0], layers[1])


# ── Numbers that are not finite ───────────────────────────────────────────
def breaking(at):
    """A loss that is NaN at these calls."""
    calls = iter(range(10_000))

    def loss(student_logits, teacher_logits, targets):
        factor = math.nan if next(calls) in at else 1
        return label_loss(student_logits, None, targets) * factor

    return loss


def test_weights_that_are_not_finite_are_named_and_never_saved(
    exact, settings, train, monkeypatch
):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)
    # Two students, three steps an epoch: the eighth call is the second student's
    stage = make_stage(settings, {"alone": breaking({7})})
    with pytest.raises(FloatingPointError, match="alone, seed 1 .*learning rate"):
        train(stage)
    saved = kd.read_checkpoint(stage.path)
    assert len(saved["seconds"]) == 1
    for student in saved["students"]:
        assert all(value.isfinite().all() for value in student["network"].values())


def test_teacher_whose_answers_are_not_finite_is_named(settings, train):
    teacher = make_teacher()
    teacher[-1].bias[1] = torch.nan
    with pytest.raises(FloatingPointError, match="teacher's logits are not finite"):
        train(make_stage(settings, {"distilled": distilled}, teacher))


def test_float16_skips_a_step_but_not_an_epoch(float16, settings, train):
    stage = make_stage(replace(settings, seeds=(0,)), {"alone": breaking({1, 4})})
    train(stage)
    assert all(map(math.isfinite, stage.students[0].history["loss"]))
    stage = make_stage(settings, {"alone": breaking(range(6, 99))}, name="other")
    with pytest.raises(FloatingPointError, match="seed 0 is not finite"):
        train(stage)


# ── Checkpoints ───────────────────────────────────────────────────────────
def assert_same(students, others):
    for first, second in zip(students, others, strict=True):
        assert same(first.network, second.network)
        assert torch.equal(first.logits, second.logits)
        assert first.history == second.history


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_interrupted_training_goes_on_bit_for_bit(
    exact, settings, train, monkeypatch, precision, steps
):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(kd, "choose_precision", lambda: precision)

    def make(name):
        changed = replace(settings, epochs=3)
        stage = make_stage(changed, {"distilled": distilled}, make_teacher(), name=name)
        for student in stage.students:
            if student.scaler.is_enabled():  # so large that it skips the first steps
                student.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        return stage

    whole, broken, resumed = make("whole"), make("broken"), make("broken")
    start = copy.deepcopy(whole.students[0].network)
    train(whole)
    stop_after(steps, broken)
    with pytest.raises(StopTraining):
        train(broken)
    train(resumed)
    assert_same(whole.students, resumed.students)
    assert not torch.equal(start[0].weight, whole.students[0].network[0].weight)
    assert (whole.students[0].scaler.get_scale() == 1) == (precision is torch.float32)


def test_stage_left_before_it_was_saved_must_be_made_anew(settings, train):
    for steps in (1, 4):  # in the first epoch, and in the second
        stage = make_stage(settings)
        stop_after(steps, stage)
        for error in (StopTraining, RuntimeError):
            with pytest.raises(error):
                train(stage)


def test_finished_stage_is_loaded_and_tells_its_story(settings, train, capsys):
    losses = dict.fromkeys(("alone", "class mean", "distilled"), label_loss)
    networks = {"a long name": tiny, "another name": tiny}
    stages = [make_stage(settings, losses, networks=networks) for _ in range(2)]
    train(stages[0])
    printed = capsys.readouterr().out.replace("\r", "\n").splitlines()
    stop_after(0, stages[1])  # it must take no step
    train(stages[1])
    told = capsys.readouterr().out.splitlines()
    assert str(stages[0].path) in told[0] and max(map(len, told)) <= 100
    assert set(told[1:]) <= set(printed) and told[1].startswith("epoch  1 |")
    story = " ".join(" ".join(told[1:]).split())  # no network is cut off
    for name, arm in ((name, arm) for name in networks for arm in losses):
        pair = [s for s in stages[1].students if (s.name, s.arm) == (name, arm)]
        mean = sum(50 * student.history["val_accuracy"][1] for student in pair)
        assert f"{name} {arm} {mean:.1f}" in story
    assert_same(stages[0].students, stages[1].students)


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
    ("amount was 0.1 and is 0.2", {"losses": smoothed(0.1)}, {"losses": smoothed(0.2)}),
    ("temperature was 2.0 and is 4.0", {"losses": soft(2.0)}, {"losses": soft(4.0)}),
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


@pytest.mark.parametrize("told, before, after", RECORDS)
def test_stage_with_another_record_is_trained_anew(
    exact, settings, capsys, monkeypatch, told, before, after
):
    finish(make_stage(settings, **before))
    assert list(make_stage(settings, **before).epochs_left()) == []
    numbers = {key: after[key] for key in after if hasattr(settings, key)}
    others = {key: after[key] for key in after if key not in numbers}
    precision = others.pop("precision", torch.float32)
    monkeypatch.setattr(kd, "choose_precision", lambda: precision)
    capsys.readouterr()
    assert next(make_stage(replace(settings, **numbers), **others).epochs_left()) == 0
    said = capsys.readouterr().out
    assert told in said and "Experiment 1.pt.1" in said and "; " not in said


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5000]),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(b"foreign" * 99),
    "other": lambda path: torch.save({"state_dict": {}}, path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_set_aside(settings, capsys, damage):
    stage = make_stage(settings)
    finish(stage)
    damage(stage.path)
    damaged = stage.path.read_bytes()
    assert next(make_stage(settings).epochs_left()) == 0
    assert f"{stage.path} is no readable checkpoint" in capsys.readouterr().out
    assert stage.path.with_name("Experiment 1.pt.1").read_bytes() == damaged


def test_set_aside_overwrites_nothing(tmp_path):
    for content in "abc":
        (tmp_path / "x.pt").write_text(content)
        kd.set_aside(tmp_path / "x.pt", "is old")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"x.pt.1": "a", "x.pt.2": "b", "x.pt.3": "c"}


def test_rename_is_tried_again(settings, monkeypatch):
    tried, waited, replace_file = [], [], Path.replace

    def busy(path, new):
        tried.append(path.name)
        if len(tried) < 3:
            raise PermissionError("Drive is busy")
        return replace_file(path, new)

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(kd.time, "sleep", waited.append)
    stage = make_stage(settings)
    finish(stage)
    assert stage.path.exists() and len(waited) == 2
    assert str(kd.os.getpid()) in tried[0]  # a name that no other process writes


def test_folder_that_cannot_be_written_is_noticed_at_once(tmp_path, settings):
    (tmp_path / "file").touch()
    stage = make_stage(replace(settings, runs_dir=tmp_path / "file" / "runs"))
    with pytest.raises(OSError):
        next(stage.epochs_left())


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


# ── On a GPU, and what it will do, without one ────────────────────────────
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


def test_steps_on_a_gpu_that_is_not_there_wait_for_nothing(settings, monkeypatch):
    monkeypatch.setattr(
        torch.cuda.amp.common, "amp_definitely_not_available", lambda: 0
    )
    with FakeTensorMode(allow_non_fake_inputs=False):  # they claim to be on a GPU
        cuda, transfers = torch.device("cuda"), conftest.Transfers()
        try:
            torch.zeros(1).to(cuda)
        except RuntimeError:
            pytest.skip("this torch needs a driver even for tensors that are not there")
        monkeypatch.setattr(kd, "choose_precision", lambda: torch.float16)
        monkeypatch.setattr(kd, "DEVICE", cuda)
        teacher, networks = put_on(tiny(3), cuda).eval(), []

        def build(kind):
            networks.append(put_on(kind(3), cuda))
            return networks[-1]

        def backward(loss):  # autograd needs a driver
            for weight in (w for network in networks for w in network.parameters()):
                weight.grad = torch.zeros_like(weight)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        loss = train_watched(settings, teacher, build, transfers)
        assert transfers.found == [] and loss.dtype is torch.float32
        assert kd.predict(teacher, make_split()).device == loss.device


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_wait_for_nothing(settings):
    train_watched(settings, make_teacher(), lambda build: build(3), no_waiting())
