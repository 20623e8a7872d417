"""Stages: steps, checkpoints, what they notice, and the results that they leave."""

import copy
import io
import itertools
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ANSWERS,
    SURE,
    VAL,
    compare,
    distilled,
    finish,
    label_loss,
    make_split,
    make_stage,
    make_study,
    read_results,
    same,
    tiny,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.models import resnet18

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
            loss(logits, before(images), targets, None).backward()
            optimizer.step()
            schedule.step()
        found = student.network.state_dict()
        for name, value in network.state_dict().items():
            assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-5), name


def test_students_learn_in_their_epochs_only_and_are_scored(exact, settings, train):
    def loss(*given, recipe):
        losses.append(label_loss(*given, recipe))
        return losses[-1]

    split, val, losses = make_split(60), make_split(24, seed=1), []
    split.targets[::20] = (split.targets[::20] + 1) % 3  # 3 wrong of 6 scored
    val.targets[::4] = (val.targets[::4] + 1) % 3  # 6 of 24
    settings = replace(settings, epochs=8, seeds=(1,))
    stage = make_stage(settings, {"alone": loss}, splits=(split, val))
    [student] = stage.students
    with pytest.raises(RuntimeError, match="seed 1 is not in training"):
        student.forward(val.images_at(slice(None)).float())
    train(stage)
    trained = copy.deepcopy(student.network)
    with pytest.raises(RuntimeError, match="seed 1 is not in training"):
        student.forward(val.images_at(slice(None)).float())
    assert same(student.network, trained)
    assert torch.equal(student.logits, kd.predict(trained, val))
    means = torch.stack(losses[1:]).view(8, 3).mean(1)  # the first: a try
    assert student.history["loss"] == pytest.approx(means.tolist())
    for name, images in (("train", split.subset(slice(0, None, 10))), ("val", val)):
        hits = kd.predict(trained, images).argmax(1) == images.targets
        scores = student.history[f"{name}_accuracy"]
        assert len(scores) == 8 and 0 < scores[7] < 1
        assert scores[7] == pytest.approx(hits.float().mean().item())


# ── What does not fit is named before the first step ──────────────────────
SCALE = 1.0


def helper(x):
    return SCALE * x


class Own(nn.Module):
    """As in tutorials: a flat view, attributes, a global and a helper function."""

    def __init__(self, num_classes, p=0.1, act=torch.relu, change="abs", momentum=0.1):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 5, 4), nn.BatchNorm2d(4, 1e-5, momentum)
        self.fc = nn.Linear(4 * 7 * 7, num_classes)
        nn.init.zeros_(self.fc.weight)  # as in torchvision's ViT: it hides all else
        self.p, self.act, self.change = p, act, change

    def forward(self, x):
        x = self.norm(self.conv(getattr(x, self.change)())).view(-1, 4 * 7 * 7)
        return helper(self.fc(F.dropout(self.act(x), self.p, self.training)))


def test_own_networks_learn_as_they_are(settings, train):
    by_name = partial(kd.build_classifier, name="resnet18")
    networks = {"view": Own, "by name": by_name, "torchvision's": resnet18}
    stage = make_stage(replace(settings, epochs=1, seeds=(0,)), networks=networks)
    train(stage)
    assert stage.students[2].network.fc.out_features == 3


def test_what_does_not_fit_is_named(settings, teacher):
    def changing(student_logits, teacher_logits, targets, recipe):
        return distilled(student_logits, teacher_logits.div_(2.0), targets, recipe)

    def assert_named(told, network=tiny, error=ValueError, **changes):
        with pytest.raises(error, match=told):
            make_stage(settings, **{"networks": {"odd": network}, **changes})

    changed, many = partial(Own, change="abs_"), lambda **_: Own(1000)
    broken, val, taught = tiny(3), make_split(24), make_stage(settings).students[0]
    broken[-1].bias.data[0] = math.nan
    val = replace(val, classes=("green", "red", "blue"))
    assert_named("odd changes the images", changed)
    assert_named("the teacher changes the images", teacher=changed(3))
    assert_named("odd, x.*loss changes", losses={"x": changing}, teacher=teacher)
    assert_named("recipe", error=TypeError, losses={"x": lambda s, t, y: s.sum()})
    assert_named(r"odd: .*\(4, 3\).*\(4, 1000\)", many)
    assert_named(r"odd: .*\(12,\)", lambda **_: nn.Sequential(tiny(3), nn.Flatten(0)))
    assert_named("odd: .*tuple", lambda **_: nn.Sequential(tiny(3), nn.LSTM(3, 3)))
    assert_named(r"the teacher: .*\(4, 1000\)", teacher=many())
    assert_named("the teacher: .* no nan or inf", teacher=broken)
    assert_named("'w/o labels'", name="w/o labels")
    assert_named("shares weights", lambda num_classes: taught.network)
    backbone = list(teacher)[:6]
    built = lambda num_classes: nn.Sequential(*backbone, nn.Linear(8, 3))  # noqa: E731
    assert_named("odd, alone, seed 0 shares weights", built, teacher=teacher)
    for splits in ((make_split(), val), (val, val)):  # the latter unlike the teacher's
        told = r"differ: in their order, \('(green|red)', '(red|green)', 'blue'\)"
        assert_named(told, splits=splits, teacher=taught.network)


def test_settings_are_plain_numbers_or_refused(settings):
    given = {"epochs": np.int64(3), "seeds": np.arange(2), "min_crop": np.float32(0.5)}
    found = replace(settings, **given, batch_size=16.0, runs_dir="~/runs")
    kinds = [type(found.epochs), type(found.min_crop), *map(type, found.seeds)]
    assert kinds == [int, float, int, int] and found.batch_size == 16
    assert found.runs_dir == Path.home() / "runs"
    wrong = {"epochs": 0, "teacher_epochs": 2.5, "min_crop": 1.5, "image_size": "96"}
    wrong |= {"weight_decay": math.nan, "batch_size": None, "stream_seed": -1}
    wrong |= {"alpha": 1.1, "temperature": 0, "learning_rate": "big"}
    for name, value in wrong.items():
        one = settings.recipe if hasattr(settings.recipe, name) else settings
        with pytest.raises(ValueError, match=f"{name}: .* needed, not {value!r}"):
            replace(one, **{name: value})
    for seeds in (3, (), (1, 1), (0.5,)):
        with pytest.raises(ValueError, match="seeds: such as"):
            replace(settings, seeds=seeds)


def test_each_network_has_its_own_recipe_in_all_arms(settings):
    def loss(*given, recipe):
        recipes.append(recipe)
        return label_loss(*given, recipe)

    own, recipes = kd.Recipe(learning_rate=0.1, temperature=7.0, alpha=0.25), []
    settings = replace(settings, seeds=(0,), recipes={"b": own})
    networks = {"a": tiny, "b": tiny}
    stage = make_stage(settings, {"x": loss, "y": loss}, networks=networks)
    assert recipes == [settings.recipe, own] * 2
    rates = [s.optimizer.param_groups[0]["max_lr"] for s in stage.students]
    assert rates == [0.004, 0.1, 0.004, 0.1]


# ── Numbers that are not finite ───────────────────────────────────────────
def infinite_at(calls):
    """A loss that is infinite at these calls."""
    factors = (math.inf if number in calls else 1 for number in itertools.count())
    return lambda s, t, y, recipe: label_loss(s, t, y, recipe) * next(factors)


def test_nan_is_named_and_never_saved(exact, settings, train, monkeypatch):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)
    # Two calls to try it; two students, three steps an epoch: this one is seed 1's
    stage = make_stage(settings, {"alone": infinite_at({9})})
    with pytest.raises(FloatingPointError, match=r"alone, seed 1 .*learning rate"):
        train(stage)
    saved = kd.read_checkpoint(stage.path)
    assert len(saved["seconds"]) == 1
    assert all(s["logits"].isfinite().all() for s in saved["students"].values())
    student = stage.students[0]  # whose losses are good
    for values in (student.network[-1].bias.data, student.network[1].running_mean):
        values[0] = math.nan
        with pytest.raises(FloatingPointError, match="alone, seed 0 is not finite"):
            student.end_epoch(make_split(), make_split(24))
        values[0] = 0


def test_float16_skips_a_step_but_not_an_epoch(exact, settings, train):
    exact(torch.float16)
    one = replace(settings, seeds=(0,))
    stage = make_stage(one, {"alone": infinite_at({2, 5})})
    train(stage)
    assert all(map(math.isfinite, stage.students[0].history["loss"]))
    stage = make_stage(one, {"alone": infinite_at({2, 3})}, name="other")
    with pytest.raises(FloatingPointError, match="seed 0 is not finite"):
        train(stage)  # two steps of three in an epoch


def test_a_loop_inside_of_mixed_precision_learns(exact, settings, train):
    exact(torch.bfloat16)
    usual, inside = (make_stage(settings, name=name) for name in ("usual", "inside"))
    train(usual)
    with kd.mixed_precision():
        train(inside)
    losses = [stage.students[0].history["loss"] for stage in (usual, inside)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_an_epoch_ends_with_few_waits_for_the_device(settings, monkeypatch):
    stage, read = make_stage(settings, networks=kd.STUDENTS), Mock(wraps=torch.clone)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: read(tensor))
    for number, student in enumerate(stage.students, start=1):
        student.losses = 50 * [torch.tensor(1.0)]
        student.end_epoch(make_split(), make_split(24))
        assert read.call_count <= 4 * number  # not one for each step or weight


# ── Checkpoints ───────────────────────────────────────────────────────────
def test_training_resumes_bit_for_bit(exact, settings, train, monkeypatch, capsys):
    exact(torch.float16)
    settings = replace(settings, stream_seed=np.int64(1))
    arm, interrupt = np.str_("an arm"), False

    def loss(student_logits, teacher_logits, targets, recipe):
        if interrupt and next(calls) == 9:  # in the second epoch
            raise KeyboardInterrupt
        return label_loss(student_logits, teacher_logits, targets, recipe)

    def make(name, seconds):
        monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", seconds)
        stage = make_stage(settings, {arm: loss}, name)
        for student in stage.students:  # so large a scale that steps are skipped
            student.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        return stage

    whole = make("whole", 300)
    train(whole)
    with pytest.raises(KeyboardInterrupt):  # before the first step, in an epoch
        for _ in (begun := make("cut", 300)).epochs_left():
            begun.students[0].forward(make_split().images_at(slice(None)).float())
            raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="left unsaved"):
        train(begun)
    unsaved, calls, interrupt = make("cut", 300), itertools.count(), True
    for error in (KeyboardInterrupt, RuntimeError):  # it must be made anew
        with pytest.raises(error):
            train(unsaved)
    often, calls = make("cut", 0), itertools.count()
    with pytest.raises(KeyboardInterrupt):
        train(often)
    interrupt = False
    saved = kd.read_checkpoint(unsaved.path)
    torch.save({**saved, "seconds": [3600.0]}, unsaved.path)
    resumed = make("cut", 300)
    resumed.students.reverse()  # they are found by what they are
    train(resumed)
    resumed.students.reverse()
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
    assert told == [f"{again.path}: 2 epochs are loaded"] and len(printed) == 6
    assert printed[4:] == [f"{again.path}: 1 epochs are loaded", printed[-1]]
    assert printed[-1].startswith("cut: epoch 2, 60.")


def test_a_finished_file_holds_weights_and_answers_or_answers_only(settings, train):
    for keep, size in ((True, 15e6), (False, 1e5)):  # 3.6 M float32 weights
        once = {"epochs": 1, "seeds": (0,), "runs_dir": settings.runs_dir / f"{keep}"}
        one = replace(settings, keep_weights=keep, **once)
        first, second = (make_stage(one, networks=kd.STUDENTS) for _ in "12")
        train(first)
        train(second)
        assert first.path.stat().st_size < size
        for student, loaded in zip(first.students, second.students, strict=True):
            assert torch.equal(student.logits, loaded.logits)
            assert (loaded.network is None) == (not keep)
    next(
        make_stage(replace(one, keep_weights=True), networks=kd.STUDENTS).epochs_left()
    )


# ── Records ───────────────────────────────────────────────────────────────
class Criterion:
    def __init__(self, amount):
        self.amount = amount
        self.criterion = nn.CrossEntropyLoss(label_smoothing=amount)

    def loss(self, student_logits, teacher_logits, targets, recipe):
        return self.criterion(student_logits, targets)

    @torch.autocast("cpu", torch.bfloat16)
    def __call__(self, student_logits, teacher_logits, targets, recipe):
        amount = SCALE * self.amount
        return F.cross_entropy(student_logits, targets, label_smoothing=amount)


def test_a_record_holds_what_networks_and_losses_do(settings, monkeypatch):
    def describe(loss=label_loss, network=Own):
        one = replace(settings, seeds=(0,))
        return make_stage(one, {"x": loss}, networks={"n": network}).record

    def frozen(num_classes):
        network = Own(num_classes)
        network.conv.requires_grad_(False)
        return network

    old = describe()
    assert not kd.differences(old, describe(network=partial(Own, p=0.1)))
    others = [partial(Own, p=0.9), partial(Own, act=F.gelu), partial(Own, momentum=0.5)]
    others.append(partial(Own, act=F.relu6))  # another only where values are large
    for network in (*others, frozen):
        assert kd.differences(old, describe(network=network))
    told = "study: n, seed 0: answers changed"
    assert told in kd.differences(old, describe(network=others[0]))
    for first, second in ((lambda a: Criterion(a).loss, Criterion), (Criterion, None)):
        second = second or first
        assert not kd.differences(describe(first(0.1)), describe(first(0.1)))
        assert kd.differences(describe(first(0.1)), describe(second(0.2)))

    for changed in (
        torch.Tensor.double,
        lambda logits: logits.clamp(max=9),
        lambda logits: logits * math.nan,
    ):
        loss = lambda s, t, y, recipe, c=changed: F.cross_entropy(c(s), y)  # noqa: E731
        found = kd.differences(old, describe(loss))
        assert bool(found) == (changed is not torch.Tensor.double)
    by_global = describe(Criterion(0.1))
    for name, value in {"SCALE": 1.1, "helper": lambda x: x + 0.1}.items():
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], name, value)
            assert kd.differences(old, describe())
            changes = kd.differences(by_global, describe(Criterion(0.1)))
            assert any("loss" in change for change in changes) == (name == "SCALE")


def test_stage_of_other_data_parts_or_settings_is_another(exact, settings, teacher):
    one, val = replace(settings, seeds=(0,)), make_split(24, seed=1)
    old = make_stage(one).record

    def told(settings=one, **changes):
        return "; ".join(kd.differences(old, make_stage(settings, **changes).record))

    photographs = make_split(size=48)
    networks = {"deep": partial(kd.build_classifier, name="resnet50")}
    deep = {"networks": networks, "splits": (photographs, photographs)}
    deep_record = make_stage(one, **deep).record
    torch.set_num_threads(2)  # which round otherwise
    assert told() == ""
    assert not kd.differences(deep_record, make_stage(one, **deep).record)
    torch.set_num_threads(1)
    for name in ("pixels", "targets"):
        part = make_split()
        getattr(part, name).view(-1)[-1] = 1 - getattr(part, name).view(-1)[-1] % 2
        assert told(splits=(part, val)).startswith("study: images of train was")
    names = ("red", "green", "black")
    renamed = [replace(split, classes=names) for split in (make_split(), val)]
    assert told(splits=renamed).startswith("study: images of train was")
    assert told(splits=(make_split(), part)).startswith("study: images of val was")
    part = make_split().subset(torch.arange(47))
    assert told(splits=(part, val)).startswith("learns from was")
    assert "teacher was none and is" in told(teacher=teacher)
    smooth = tiny(3, nn.SiLU).to(kd.DEVICE)  # the same weights do something else
    smooth.load_state_dict(teacher.state_dict())
    pair = [make_stage(one, teacher=network).record for network in (teacher, smooth)]
    assert "taught: answers changed" in kd.differences(*pair)
    half = make_stage(one, teacher=copy.deepcopy(teacher).half()).teacher
    assert half[0].weight.dtype is torch.float32
    numbers = {"batch_size": 24, "epochs": 3, "min_crop": 0.5, "stream_seed": 9}
    numbers |= {"weight_decay": 0.2, "seeds": (1,)}
    for name, number in numbers.items():
        line = f"{name} was {getattr(one, name)} and is {number}"
        assert line in told(replace(one, **{name: number}))
    changes = {"learning_rate": 0.1, "temperature": 4.0, "alpha": 0.9}
    for name, number in changes.items():
        changed = replace(one, recipe=replace(settings.recipe, **{name: number}))
        # Without a teacher, temperature and alpha shape nothing
        assert (f"{name} of tiny was" in told(changed)) == (name == "learning_rate")
        pair = [make_stage(each, teacher=teacher).record for each in (one, changed)]
        assert kd.differences(*pair)[0].startswith(f"study: {name} of tiny was")
    exact(torch.bfloat16)
    assert told() == "study: precision was float32 and is bfloat16"


# ── Files ─────────────────────────────────────────────────────────────────
class Evil:
    def __reduce__(self):  # what unpickling in full would run
        return print, ("unpickled in full",)


def test_what_cannot_be_used_or_written_is_told(settings, monkeypatch, capsys):
    finish(make_stage(settings))
    path = settings.runs_dir / "Experiment 1.pt"
    whole, evil = path.read_bytes(), io.BytesIO()
    torch.save(Evil(), evil)
    contents = {whole[:-5000]: "no checkpoint", b"": "no checkpoint", whole: "is 0.1"}
    contents[evil.getvalue()] = "no checkpoint"
    faster = replace(settings, recipe=replace(settings.recipe, learning_rate=0.1))
    for content, told in contents.items():
        path.write_bytes(content)
        next(make_stage(faster).epochs_left())
        printed = capsys.readouterr().out
        assert told in printed and "unpickled in full" not in printed
    asides = sorted(settings.runs_dir.glob("Experiment 1.pt.*"))
    assert [aside.read_bytes() for aside in asides] == list(contents)


def test_a_write_that_breaks_off_changes_nothing(settings, monkeypatch):
    stage = make_stage(settings)
    finish(stage)
    whole = stage.path.read_bytes()

    def break_off(content, path):
        path.write_bytes(whole[:99])
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(OSError, match="no space left"):
        kd.save(stage)
    assert stage.path.read_bytes() == whole


# ── On a GPU, or on one that is not there ─────────────────────────────────
@pytest.mark.skipif(torch.cuda.is_available(), reason="see the next test")
def test_steps_on_a_gpu_that_is_not_there_read_nothing(settings, train, monkeypatch):
    def backward(loss):  # the true one needs a driver
        for weight in weights:
            weight.grad = torch.zeros_like(weight)

    def build(network):
        with torch.device("cuda"):
            made = network(3)
        weights.extend(made.parameters())
        return made

    common, weights, students = torch.cuda.amp.common, [], []
    # They are there; fake weights cannot be moved
    monkeypatch.setattr(nn.Module, "to", lambda network, *_, **__: network)
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
            key = (name, "a", 0)
            student = kd.Student(build(network), key, distilled, settings, 100)
            student.in_epoch = True
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
    one, splits = replace(settings, seeds=(1,)), (make_split(), VAL)
    longer = make_stage(one, {"longer": label_loss}, name="x", splits=splits)
    finish(longer, {("longer", 1): 2 * ANSWERS["distilled", 1]})
    gains_of = read_results(settings.runs_dir, VAL)["gains_of"]
    found = gains_of("tiny", "longer", "alone", lambda logits, _: logits.amax(1))
    assert found.tolist() == [SURE.tolist()]  # of the seed that both have
    finish(make_stage(settings, name="once more"), ANSWERS)
    with pytest.raises(ValueError, match=r"once more\.pt repeats alone"):
        read_results(settings.runs_dir, VAL)


def test_stages_that_do_not_belong_together_are_refused(settings, exact):
    def assert_refused(told, val=VAL):
        with pytest.raises(ValueError, match=told):
            read_results(settings.runs_dir, val)

    def add(settings=settings, **changes):
        loss = distilled if "teacher" in changes else label_loss
        parts = {"splits": (make_split(), VAL), **changes}
        stage = make_stage(settings, {"x": loss}, "x", **parts)
        finish(stage, {("x", seed): torch.zeros(24, 3) for seed in settings.seeds})

    _, two = make_study(settings)
    for name, number in {
        "learning_rate": 0.1,
        "temperature": 8.0,
        "alpha": 0.1,
    }.items():
        recipe = replace(settings.recipe, **{name: number})  # before a change
        add(replace(settings, recipe=recipe), teacher=two.teacher)
        assert_refused(f"x .*: {name} of tiny was .* and is {number}. Run it again")
    add(replace(settings, min_crop=0.9))
    assert_refused("x .*: min_crop was 0.35 and is 0.9")
    add(splits=(make_split(seed=3), VAL))
    assert_refused("x .*: images of train was")
    part = make_split().subset(torch.arange(9))
    add(replace(settings, epochs=1), splits=(part, VAL))
    # A part of train, other epochs and no teacher are fine
    read_results(settings.runs_dir, VAL)
    add(networks={"tiny": partial(tiny, activation=nn.SiLU)})
    assert_refused("x .*: tiny, seed 0: answers changed")
    make_study(settings, shift=0.5)
    add()
    assert_refused("2 times as long had another teacher")
    make_study(settings)
    assert_refused("2 times .*: images of val was", make_split(24, seed=5))
    exact(torch.bfloat16)
    add()
    assert_refused("x .*: precision was float32 and is bfloat16")


def test_what_is_unfinished_damaged_or_a_trial_is_left_out_and_alone(settings, capsys):
    one, two = make_study(settings)
    trials = replace(settings, runs_dir=settings.runs_dir / "trials")
    finish(make_stage(trials, splits=(make_split(), make_split(24))), ANSWERS)
    two.path.write_bytes(b"damaged")
    foreign = {"record": 1, "seconds": [], "students": {}}
    torch.save(foreign, settings.runs_dir / "mine.pt")
    one.seconds.pop()
    kd.save(one)
    before = sorted(settings.runs_dir.rglob("*"))
    others = {"2 times as long", "few labels", "few labels, teacher", "teacher"}
    others.add("alone for 3 epochs")
    assert set(read_results(settings.runs_dir, VAL)["STAGES"]) == others
    assert capsys.readouterr().out.count("is no file of a stage: it is left alone") == 2
    assert sorted(settings.runs_dir.rglob("*")) == before
