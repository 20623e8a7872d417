"""One stream for all students, checkpoints that survive anything, mixed precision, and the report."""

import copy
import multiprocessing
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (distilled, label_loss, make_settings, make_split, make_students, make_teacher,
                      notebook_loop, same_weights, tiny)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kd_utils as kd


class Stop(Exception):
    """What interrupts a training in these tests."""


def stop_after(steps, students):
    """Makes the last student raise Stop in place of its step number `steps` + 1."""
    student, step, left = students[-1], students[-1].step, [steps]

    def limited(loss):
        if not left[0]:
            raise Stop
        left[0] -= 1
        step(loss)

    student.step = limited


def test_paired_students_start_alike_and_see_the_same_views(train, settings):
    seen = {"alone": [], "distilled": []}

    def record(student_logits, teacher_logits, targets, arm):
        seen[arm].append((student_logits.detach().clone(), targets, teacher_logits))
        return 0 * student_logits.sum()  # no gradient, so that they stay alike

    still = replace(settings, weight_decay=0.0)
    losses = {arm: partial(record, arm=arm) for arm in seen}
    train(make_students(still, losses, {"tiny": tiny}), "both", 2, make_teacher())
    assert len(seen["alone"]) == 2 * 2 * 3  # seeds × epochs × steps
    for one, two in zip(seen["alone"], seen["distilled"]):
        assert all(torch.equal(a, b) for a, b in zip(one, two))  # dropout, too
    assert not torch.equal(seen["alone"][0][0], seen["alone"][1][0])  # another seed


def test_result_does_not_depend_on_the_rest_of_the_cohort(train, settings):
    together = make_students(settings, {"alone": label_loss, "distilled": distilled})
    train(together, "together", 2, make_teacher())
    apart = make_students(settings, {"distilled": distilled})
    train(apart, "apart", 2, make_teacher())
    assert all(same_weights(a.network, b.network) for a, b in zip(together[2:], apart))
    assert together[2].history == apart[0].history


def test_teacher_is_bit_identical_after_training(train, settings):
    teacher = make_teacher()
    before = copy.deepcopy(teacher)
    train(make_students(settings, {"distilled": distilled}), "experiment", 2, teacher)
    assert same_weights(teacher, before)  # parameters and buffers
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("thaw", [nn.Module.train, nn.Module.requires_grad_])
def test_teacher_that_could_change_is_refused(train, settings, thaw):
    with pytest.raises(ValueError, match="the teacher could change"):
        train(make_students(settings), "experiment", 1, thaw(make_teacher()))


def test_classes_in_another_order_are_named(train, settings):
    teacher = make_teacher()
    teacher.classes = ["green", "red", "blue"]
    with pytest.raises(ValueError, match=r"the teacher has the classes \['green', 'red', 'blue'\]"):
        train(make_students(settings), "experiment", 1, teacher)
    val = make_split(24)
    val.classes = ["blue", "green", "red"]
    with pytest.raises(ValueError, match="val has the classes"):
        train(make_students(settings), "experiment", 1, splits=(make_split(), val))


def test_students_learn_and_their_history_is_complete(train, settings):
    students = make_students(settings)
    train(students, "experiment", 6)
    for student in students:
        assert [len(values) for values in student.history.values()] == [6, 6, 6]
        assert student.history["loss"][-1] < student.history["loss"][0]
        assert student.logits.shape == (24, 3) and student.history["val_accuracy"][-1] > 0.6


def test_schedule_rises_to_the_peak_and_falls_to_nothing(train, settings):
    [student, _], rates = (students := make_students(settings)), []
    step = student.step
    student.step = lambda loss: (rates.append(student.optimizer.param_groups[0]["lr"]), step(loss))
    train(students, "experiment", 10)
    rates = np.array(rates) / settings.learning_rate
    assert max(rates) == pytest.approx(1, rel=0.02) and rates[0] == pytest.approx(1 / 25)
    assert rates[-1] < 0.01 and 7 <= int(np.argmax(rates)) <= 9


def test_trained_students_are_not_trained_again(train, settings):
    students = make_students(settings)
    train(students, "experiment", 1)
    with pytest.raises(ValueError, match="make the students anew"):
        train(students, "experiment", 1)


def test_log_lines_fit_the_page(train, settings, capsys):
    arms = {"alone": label_loss, "class mean": label_loss, "distilled": label_loss}
    train(make_students(settings, arms, {"LeNet-5": kd.LeNet5, "Custom CNN": kd.LeNet5}), "x", 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if " | " in line]
    assert lines and all(len(line.split("\r")[-1]) <= 100 for line in lines)
    assert "LeNet-5: alone " in lines[0] and ", distilled " in lines[0]


# ── Checkpoints ───────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("steps", [1, 4, 6, 8])
def test_interrupted_training_continues_bit_for_bit(settings, split, monkeypatch, steps):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)  # after every step
    train, teacher = notebook_loop(settings, split, make_split(24)), make_teacher()
    whole, broken, resumed = (make_students(settings, {"distilled": distilled}, {"tiny": tiny})
                              for _ in range(3))  # fmt: skip
    train(whole, "whole", 3, teacher)
    stop_after(steps, broken)
    with pytest.raises(Stop):
        train(broken, "broken", 3, teacher)
    train(resumed, "broken", 3, teacher)
    for one, two in zip(whole, resumed):
        assert same_weights(one.network, two.network) and one.history == two.history


def test_finished_stage_is_loaded(train, settings, capsys):
    first, second = make_students(settings), make_students(settings)
    train(first, "experiment", 2)
    capsys.readouterr()
    stop_after(0, second)  # it must take no step
    train(second, "experiment", 2)
    assert capsys.readouterr().out == f"{settings.runs_dir / 'experiment.pt'}: finished before\n"
    assert same_weights(first[0].network, second[0].network) and first[0].history == second[0].history


@pytest.mark.parametrize("change, told", [
    (dict(learning_rate=0.1), "peak learning rate was 0.004 and is 0.1"),
    (dict(seeds=(0, 5)), "student 2 was LeNet-5, alone, seed 1"),
])  # fmt: skip
def test_checkpoint_of_other_settings_is_renamed(train, settings, capsys, change, told):
    train(make_students(settings), "experiment", 1)
    train(make_students(replace(settings, **change)), "experiment", 1)
    assert told in capsys.readouterr().out and len(list(settings.runs_dir.glob("*.pt"))) == 2


def test_other_temperature_and_other_teacher_are_other_settings(train, settings, capsys):
    for temperature, teacher in ((2.0, make_teacher()), (4.0, make_teacher())):
        loss = partial(kd.distillation_loss, temperature=temperature, alpha=0.5)
        train(make_students(settings, {"distilled": loss}), "experiment", 1, teacher)
    assert "temperature 4.0" in capsys.readouterr().out
    with torch.no_grad():
        teacher[-1].bias += 1
    train(make_students(settings, {"distilled": loss}), "experiment", 1, teacher)
    assert "SHA-256 of the trained teacher was" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"foreign" * 99])
def test_damaged_checkpoint_is_renamed(train, settings, capsys, damage):
    train(make_students(settings), "experiment", 1)
    path = settings.runs_dir / "experiment.pt"
    path.write_bytes(damage(path.read_bytes()))
    again = make_students(settings)
    train(again, "experiment", 1)
    assert "is no readable checkpoint" in capsys.readouterr().out
    assert len(again[0].history["loss"]) == 1 and len(list(settings.runs_dir.glob("*.pt"))) == 2


def test_loss_that_is_not_finite_is_named_and_the_checkpoint_is_good(train, settings, monkeypatch):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)  # after every step
    calls = []

    def breaking(student_logits, teacher_logits, targets):
        calls.append(None)  # two students, three steps an epoch: the eighth call is step 4 of seed 1
        return label_loss(student_logits, None, targets) * (torch.nan if len(calls) == 8 else 1)

    with pytest.raises(FloatingPointError, match="LeNet-5, alone, seed 1: .* step 4. Lower the learning rate"):
        train(make_students(settings, {"alone": breaking}), "experiment", 3)
    good = make_students(settings)
    train(good, "experiment", 3)  # goes on from the third step
    assert [len(student.history["loss"]) for student in good] == [3, 3]


def test_weights_that_are_not_finite_are_never_saved(train, settings):
    train(students := make_students(settings), "experiment", 1)
    before = (path := settings.runs_dir / "experiment.pt").read_bytes()
    next(students[0].network.parameters()).data.fill_(torch.nan)  # as after a gradient that is not finite
    with pytest.raises(FloatingPointError, match="seed 0"):
        kd.save_checkpoint(path, {}, students, 3, 0.0, False)
    assert path.read_bytes() == before


def train_in_another_process(runs_dir, connection):
    torch.set_num_threads(1)
    kd.CHECKPOINT_SECONDS = 0
    settings = make_settings(runs_dir)
    train = notebook_loop(settings, make_split(), make_split(24))
    students = make_students(settings, {"distilled": distilled})
    connection.send("ready")
    train(students, "experiment", 30, make_teacher())
    weights = [p.double().sum().item() for s in students for p in s.network.parameters()]
    connection.send((weights, [student.history for student in students]))


def start(runs_dir):
    context = multiprocessing.get_context("forkserver")  # torch is imported once for all of them
    context.set_forkserver_preload(["kd_utils", "nbformat"])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=train_in_another_process, args=(runs_dir, sending))
    process.start()
    assert receiving.recv() == "ready"
    return process, receiving


def test_ten_kills_at_random_moments_change_nothing(tmp_path):
    _, receiving = start(tmp_path / "whole")
    expected, moments, kills = receiving.recv(), random.Random(0), 0
    while kills < 10:
        process, _ = start(tmp_path / "killed")
        process.join(moments.uniform(0.02, 0.2))  # the moment of the kill, not a wait for something
        kills += process.is_alive()
        process.kill()  # SIGKILL
        process.join()
        assert not list(tmp_path.glob("killed/experiment-*.pt"))  # never damaged
    _, receiving = start(tmp_path / "killed")
    assert receiving.recv() == expected


# ── What a GPU will do, without one ───────────────────────────────────────────────────────────────

@pytest.fixture
def float16(monkeypatch):
    """float16 with the gradient scaler, as on a T4, on the CPU."""
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float16)


def test_float16_trains_skips_overflowing_steps_and_resumes(float16, settings, split, monkeypatch):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)
    train, teacher = notebook_loop(settings, split, make_split(24, seed=1)), make_teacher()

    def cohort():
        students = make_students(settings, {"distilled": distilled}, {"tiny": tiny})
        for student in students:
            student.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows at first
        return students

    whole, broken, resumed = cohort(), cohort(), cohort()
    start = [parameter.clone() for parameter in whole[0].network.parameters()]
    train(whole, "whole", 20, teacher)
    assert whole[0].schedule.last_epoch == 60 and len(whole[0].history["loss"]) == 20
    assert whole[0].scaler.get_scale() < 2.0**40 and np.isfinite(whole[0].history["loss"]).all()
    assert not all(torch.equal(a, b) for a, b in zip(start, whole[0].network.parameters()))
    stop_after(7, broken)
    with pytest.raises(Stop):
        train(broken, "broken", 20, teacher)
    assert all(torch.equal(a, b) for a, b in zip(start, broken[0].network.parameters()))  # all skipped
    train(resumed, "broken", 20, teacher)
    assert same_weights(whole[0].network, resumed[0].network) and whole[0].history == resumed[0].history


def test_training_goes_on_in_another_precision(settings, split, train, monkeypatch):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)
    begun = make_students(settings)
    stop_after(4, begun)
    with pytest.raises(Stop):
        train(begun, "experiment", 2)  # in float32, without a scaler
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float16)
    train(students := make_students(settings), "experiment", 2)
    assert len(students[0].history["loss"]) == 2 and students[0].schedule.last_epoch == 6


class Transfers(TorchDispatchMode):
    """Notes every operation that makes the host wait for the device, or copies to it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        moved = isinstance(result, torch.Tensor) and any(
            isinstance(arg, torch.Tensor) and arg.device != result.device for arg in args)
        if "_local_scalar_dense" in name or "nonzero" in name or moved:
            self.found.append(name)
        return result


def put_on(network, device):
    """`network.to(device)` for fake tensors."""
    for module in network.modules():
        for name, value in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(torch.empty(value.shape, device=device))
        for name, value in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
    return network


def test_everything_is_made_on_the_device_and_no_step_waits_for_it(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=False):  # tensors that claim to be on a GPU
        cuda = torch.device("cuda")
        try:
            torch.zeros(1).to(cuda)
        except RuntimeError:
            pytest.skip("this torch needs a GPU's driver even for tensors that only claim to be there")
        for name, value in (("DEVICE", cuda), ("MEAN", torch.ones(1, 3, 1, 1, device=cuda)),
                            ("STD", torch.ones(1, 3, 1, 1, device=cuda)),
                            ("choose_precision", lambda: torch.float16)):  # fmt: skip
            monkeypatch.setattr(kd, name, value)
        split = kd.Split(torch.zeros(48, 3, 64, 64, dtype=torch.uint8, device=cuda),
                         torch.zeros(48, dtype=torch.long, device=cuda), ["a", "b", "c"],
                         torch.zeros(48, dtype=torch.bool, device=cuda))  # fmt: skip
        means = torch.zeros(3, 3, device=cuda)
        arms = {"alone": label_loss, "distilled": distilled,
                "class mean": lambda student, teacher, targets: distilled(student, means[targets], targets)}
        networks = [put_on(build(3), cuda) for build in kd.STUDENTS.values()]
        batches = kd.augmented_batches(split, settings, 0)
        next(batches)  # the epoch's random choices have been copied
        with Transfers() as transfers:
            images, targets = next(batches)
            assert images.device.type == targets.device.type == "cuda"
            for network in networks:
                with kd.mixed_precision():
                    logits = network(images)
                assert logits.dtype is torch.float16
                for loss in arms.values():
                    value = loss(logits, logits.detach(), targets)
                    assert value.device.type == "cuda" and value.dtype is torch.float32
        assert not transfers.found
        logits = kd.predict(networks[0], split)
        values = kd.score(logits, split)
        assert all(value.device.type == "cuda" for value in [logits, *values.values()])
        share, over = kd.confusions(logits, split)  # for a figure, so on the CPU
        assert share.shape == (3, 3) and share.device.type == over.device.type == "cpu"
        subset = split.subset(torch.arange(0, 48, 10, device=cuda))
        assert subset.images.device.type == "cuda" and len(subset) == 5


# ── Report ────────────────────────────────────────────────────────────────────────────────────────

def study(settings, experiments=(1, 2), epochs=2):
    train = notebook_loop(settings, make_split(), make_split(24))
    networks = {"Custom CNN": kd.LeNet5, "LeNet-5": kd.LeNet5}
    if 1 in experiments:
        train(make_students(settings, {"alone": label_loss}, networks), "Experiment 1", epochs)
    if 2 in experiments:
        [learner] = kd.make_students({"teacher": label_loss}, settings, 3, {"T": kd.LeNet5}, [9])
        train([learner], "teacher", 1)
        teacher = learner.network.eval().requires_grad_(False)
        losses = {"class mean": distilled, "distilled": distilled}
        train(make_students(settings, losses, networks), "Experiment 2", 2, teacher)


def test_report_is_computed_from_the_finished_stages(settings):
    study(settings)
    results, val = kd.Results(settings, make_split(24)), make_split(24)
    row = next(row for row in results.rows if (row["name"], row["arm"], row["seed"]) == ("LeNet-5", "distilled", 1))
    other = next(row for row in results.rows if (row["name"], row["arm"], row["seed"]) == ("LeNet-5", "alone", 1))
    assert results.gains("LeNet-5")[1] == pytest.approx(row["accuracy"] - other["accuracy"])
    right = (row["logits"].argmax(1) == val.targets).float().mean().item()
    assert row["accuracy"] == pytest.approx(right) == row["history"]["val_accuracy"][-1]
    assert row["agreement"] == (row["logits"].argmax(1) == results.teacher.argmax(1)).float().mean()
    mean = 100 * np.mean(list(results.values("LeNet-5", "distilled").values()))
    assert f"| {mean:.1f} |" in kd.result_table(results) and "Not run" not in kd.result_table(results)
    hits = {arm: torch.stack([r["logits"].argmax(1) == val.targets for r in results.rows
            if (r["name"], r["arm"]) == ("LeNet-5", arm)]).float().mean(0) for arm in ("alone", "distilled")}  # fmt: skip
    luck = 196 * (hits["distilled"] - hits["alone"]).std(correction=0) / 24**0.5
    _, told = kd.verdict_lines(results, val).splitlines()  # a line per network
    assert told.startswith("- **Distillation into LeNet-5: ") and f"± {luck:.1f} for the choice of images" in told
    assert results.gains("LeNet-5", "recall", other="class mean").tolist() == [[0] * 3] * 2  # the same loss here


@pytest.mark.parametrize("run, missing", [(1, "Experiment 2"), (2, "Experiment 1")])
def test_report_says_what_is_missing(settings, run, missing):
    study(settings, [run])
    results = kd.Results(settings, make_split(24))
    assert f"Not run yet: {missing}" in kd.result_table(results)
    assert kd.verdict_lines(results, make_split(24)).count("no verdict") == 2


def test_experiments_that_do_not_compare_are_refused(settings):
    study(settings, [1], epochs=1)
    study(settings, [2])
    with pytest.raises(ValueError, match="differ in .*'epochs'"):
        kd.Results(settings, make_split(24))
