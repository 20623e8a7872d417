"""Models, cohorts, metrics and statistics."""

import copy
from functools import partial

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

matplotlib.use("agg")

import kd_utils as kd

TRAINING = dict(epochs=2, batch_size=16, lr=2e-3, weight_decay=0.05)


@pytest.fixture(scope="module")
def train():
    """48 images of three classes that differ in colour."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(48) % 3
    images = torch.randint(0, 120, (48, 3, 64, 64), dtype=torch.uint8, generator=generator)
    images[torch.arange(48), targets] += 120
    files = [f"{'ILSVRC2012_val_' if i < 12 else 'n0_'}{i}.JPEG" for i in range(48)]
    return kd.Split(images, targets, ["red", "green", "blue"], files)


def tiny_teacher(classes=3):
    torch.manual_seed(7)
    body = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
    return kd.freeze(body)


def cohort(arm="alone", loss=kd.label_loss, seeds=(0,), architectures=None):
    return kd.make_students(3, seeds, arm, loss, architectures or {"LeNet-5": kd.LeNet5})


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.parametrize("size", [64, 96, 160])
@pytest.mark.parametrize("build", kd.STUDENTS.values(), ids=kd.STUDENTS)
def test_students_take_any_size_from_64(build, size):
    assert build(num_classes=7)(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_parameter_counts():
    assert kd.count_parameters(kd.CustomCNN(10)) <= 4_000_000
    # C1 + C3 + C5 + F6 + output, weights and biases
    assert kd.count_parameters(kd.LeNet5(10)) == (75 * 6 + 6) + (150 * 16 + 16) + (400 * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10)


def test_custom_cnn_has_five_blocks_of_the_stated_widths():
    assert [block.reduce[0].out_channels for block in kd.CustomCNN().blocks] == [32, 64, 128, 256, 512]


def test_teacher_is_resnet50_with_a_new_head():
    teacher = kd.build_teacher(10, None).eval()
    assert teacher.fc.out_features == 10 and teacher(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert kd.count_parameters(teacher) == 25_557_032 - 2048 * 990 - 990  # torchvision's count less the classes that are gone
    assert same_weights(teacher, kd.build_teacher(10, None))  # the head is seeded


def test_teacher_from_a_half_precision_file(tmp_path):
    source = kd.build_teacher(1000, None)
    torch.save({key: value.half() if value.is_floating_point() else value for key, value in source.state_dict().items()}, tmp_path / "weights.pth")
    teacher = kd.build_teacher(10, tmp_path / "weights.pth")
    assert torch.equal(teacher.layer4[0].conv1.weight, source.layer4[0].conv1.weight.half().float())
    assert kd.describe_weights(tmp_path / "weights.pth")["SHA-256 of the teacher weights"] == kd.file_digest(tmp_path / "weights.pth")


def test_missing_teacher_weights_are_named(monkeypatch):
    with pytest.raises(FileNotFoundError, match="'no/such/file.pth'.*IMAGENET1K_V1"):
        kd.build_teacher(10, "no/such/file.pth")
    monkeypatch.setenv("KD_TEACHER_WEIGHTS", "no/such/file.pth")
    with pytest.raises(FileNotFoundError, match="'no/such/file.pth'"):
        kd.Run("imagewoof2-160", "cpu")  # at the start of a notebook, not after Experiment 1


def test_teacher_is_bit_identical_after_training(train):
    teacher = tiny_teacher()
    before = copy.deepcopy(teacher)
    loss = partial(kd.distillation_loss, temperature=2.0, alpha=0.9)
    kd.fit(cohort("distilled", loss), train, train, teacher=teacher, **TRAINING)
    assert same_weights(teacher, before)  # parameters and buffers
    assert not teacher.training and all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("thaw", [lambda teacher: teacher.train(), lambda teacher: teacher.requires_grad_(True)])
def test_teacher_that_could_change_is_refused(train, thaw):
    with pytest.raises(ValueError, match="freeze"):
        kd.fit(cohort(), train, train, teacher=thaw(tiny_teacher()), **TRAINING)


def test_class_counts_that_differ_are_named(train):
    loss = partial(kd.distillation_loss, temperature=2.0, alpha=0.9)
    with pytest.raises(ValueError, match="same num_classes"):
        kd.fit(cohort("distilled", loss), train, train, teacher=tiny_teacher(classes=5), **TRAINING)


def test_labels_out_of_range_are_refused_before_training(train):
    wrong = kd.Split(train.images, train.targets + 1, train.classes, train.files)
    with pytest.raises(ValueError, match="labels must lie in 0 … 2, got 1 … 3"):
        kd.fit(cohort(), wrong, train, **TRAINING)


def test_paired_students_start_identical_and_see_identical_batches(train):
    seen = {"alone": [], "distilled": []}

    def record(student_logits, teacher_logits, targets, arm):
        seen[arm].append((student_logits.detach().clone(), targets))
        return 0 * student_logits.sum()  # no gradient: the weights differ in nothing but decay

    for arm, teacher in (("alone", None), ("distilled", tiny_teacher())):
        students = cohort(arm, partial(record, arm=arm), architectures=kd.STUDENTS)
        kd.fit(students, train, train, teacher=teacher, **TRAINING)
    assert len(seen["alone"]) == 2 * 2 * 3  # students × epochs × steps
    for (logits, targets), (other_logits, other_targets) in zip(seen["alone"], seen["distilled"], strict=True):
        assert torch.equal(logits, other_logits) and torch.equal(targets, other_targets)  # dropout included


def test_alpha_zero_trains_the_same_student_as_experiment_1(train):
    loss = partial(kd.distillation_loss, temperature=4.0, alpha=0.0)
    alone = kd.fit(cohort(), train, train, **TRAINING)[0]
    distilled = kd.fit(cohort("distilled", loss), train, train, teacher=tiny_teacher(), **TRAINING)[0]
    assert same_weights(alone.model, distilled.model) and alone.history == distilled.history


def test_a_student_does_not_depend_on_its_cohort(train):
    alone = kd.fit(cohort(architectures={"Custom CNN": kd.CustomCNN}), train, train, **TRAINING)[0]
    among = kd.fit(cohort(seeds=(3, 0), architectures=dict(reversed(kd.STUDENTS.items()))), train, train, **TRAINING)
    assert same_weights(alone.model, next(s.model for s in among if s.name == "Custom CNN" and s.seed == 0))


def test_outputs_that_do_not_fit_the_classes_are_named(train):
    students = kd.make_students(2, (0,), architectures={"LeNet-5": kd.LeNet5})
    with pytest.raises(ValueError, match="LeNet-5 has 2 outputs for 3 classes"):
        kd.fit(students, train, train, **TRAINING)


def test_distillation_without_a_teacher_is_named(train):
    with pytest.raises(ValueError, match="give `fit` a teacher"):
        kd.fit(cohort("distilled", partial(kd.distillation_loss, temperature=2.0, alpha=0.5)), train, train, **TRAINING)


def test_fine_tuning_a_network_without_fc_is_named(train):
    with pytest.raises(ValueError, match="no layer called fc"):
        kd.fine_tune(kd.LeNet5(3), train, train, epochs=1, batch_size=16)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_and_leaves_the_teacher_alone(train, precision, monkeypatch):
    if precision is torch.float16 and not torch.cuda.is_available():
        pytest.skip("float16 with a gradient scaler is for GPUs, and there is none")
    monkeypatch.setattr(kd, "choose_precision", lambda device: precision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = kd.Split(train.images.to(device), train.targets.to(device), train.classes, train.files)
    teacher, seen = tiny_teacher(), []
    before = copy.deepcopy(teacher)

    def loss(student_logits, teacher_logits, targets):
        seen.append({student_logits.dtype, teacher_logits.dtype})
        return kd.distillation_loss(student_logits, teacher_logits, targets, 2.0, 0.5)

    student = kd.fit(cohort("distilled", loss), data, data, teacher=teacher, **TRAINING)[0]
    assert all(dtypes == {precision} for dtypes in seen) and np.isfinite(student.history.train_loss).all()
    assert same_weights(teacher.cpu(), before) and next(student.model.parameters()).dtype == torch.float32


def test_control_arms_only_where_the_profile_has_them():
    losses = {"alone": kd.label_loss, "smoothed": kd.smoothed_loss, "mine": kd.label_loss}
    for profile, arms in (("demo", ["alone", "mine"]), ("study", ["alone", "smoothed", "mine"])):
        students = kd.make_cohort(3, kd.PROFILES[profile], losses)
        pairs = len(kd.STUDENTS) * len(kd.PROFILES[profile].seeds)
        assert [s.arm for s in students] == [arm for arm in arms for _ in range(pairs)]
        assert all(s.loss is losses[s.arm] for s in students)
        first = {s.arm: s.model for s in students if (s.name, s.seed) == ("LeNet-5", 1)}
        assert all(same_weights(first["alone"], model) for model in first.values())  # paired by seed


def test_a_student_may_have_a_learning_rate_of_its_own(train):
    slow, fast = cohort(), cohort()
    fast[0].lr = 2 * TRAINING["lr"]
    kd.fit(slow + fast, train, train, **TRAINING)
    alike = kd.fit(cohort(), train, train, **{**TRAINING, "lr": 2 * TRAINING["lr"]})
    assert same_weights(fast[0].model, alike[0].model) and not same_weights(fast[0].model, slow[0].model)


def test_views_hold_at_least_the_smallest_crop(train):
    for min_crop in (0.1, 0.8):
        generator = torch.Generator().manual_seed(0)
        box = kd.sample_crops(1000, 64, generator, (min_crop, 1.0))
        area = (box[:, 2] * box[:, 3]).float() / 64**2
        assert area.min() > min_crop - 0.03 and (min_crop == 0.8 or area.min() < 0.2)
    wide, narrow = (next(iter(kd.BatchStream(train, 16, 0, crop).epoch(0)))[0] for crop in (0.1, 0.9))
    assert not torch.equal(wide, narrow)


def test_seeds_differ():
    first, second = cohort(seeds=(0, 1))
    assert not same_weights(first.model, second.model) and same_weights(first.model, cohort(seeds=(0,))[0].model)


def test_training_leaves_the_global_generator_alone(train):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    kd.fit(cohort(), train, train, **TRAINING)
    assert torch.equal(torch.rand(1), expected)


def test_training_learns_and_records_every_epoch(train):
    student = kd.fit(cohort(architectures={"Custom CNN": kd.CustomCNN}), train, train, **{**TRAINING, "epochs": 4})[0]
    assert [len(values) for values in vars(student.history).values()] == [4] * 4
    assert student.history.train_loss[-1] < student.history.train_loss[0] and student.history.val_accuracy[-1] > 0.6


def test_fine_tuning_moves_the_head_faster_and_freezes(train):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(self.body(x.mean((2, 3))))

    teacher = Network()
    before = copy.deepcopy(teacher)
    student = kd.fine_tune(teacher, train, train, epochs=1, batch_size=48, lr=1e-2)
    moved = {name: (new - old).abs().mean() for (name, new), old in zip(teacher.named_parameters(), before.parameters())}
    assert moved["fc.weight"] > 5 * moved["body.weight"] > 0
    assert not teacher.training and student.arm == "teacher" and not any(p.requires_grad for p in teacher.parameters())


def test_one_cycle_matches_torch():
    model, total = nn.Linear(1, 1), 100
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=total, pct_start=0.3, cycle_momentum=False)
    for step in range(total):
        # torch reaches its peak one step earlier: the curves differ by no more than one step's change
        assert kd.one_cycle(step, total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=0.06)
        optimizer.step(), schedule.step()
    assert kd.one_cycle(0, total) == 1 / 25 and kd.one_cycle(30, total) == 1 and kd.one_cycle(total, total) == 0


def test_metrics_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.5]])
    targets = torch.tensor([0, 1, 1, 0])
    probability = torch.sigmoid(torch.tensor([2.0, 1.0, -3.0, -0.5])).double()  # of the right class
    scores = kd.metrics(logits, targets)
    assert scores["accuracy"] == 0.5 and scores["nll"] == pytest.approx(-probability.log().mean().item())
    confidence = [0.8808, 0.7311, 0.9526, 0.6225]  # four different bins, so ECE is the mean of |right − confidence|
    assert scores["ece"] == pytest.approx(np.mean([1 - confidence[0], 1 - confidence[1], confidence[2], confidence[3]]), abs=1e-4)
    assert kd.confusion_matrix(logits, targets).tolist() == [[1, 1], [1, 1]]
    assert kd.agreement(logits, -logits) == 0 and kd.agreement(logits, 2 * logits) == 1


def test_reliability_counts_every_answer_once():
    logits, targets = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 5
    count, right, confidence = kd.reliability(logits, targets, bins=10).unbind(1)
    assert count.sum() == 200 and right.sum() == (logits.argmax(1) == targets).sum()
    inside = count > 0
    mean = (confidence / count)[inside]
    upper = torch.arange(1, 11)[inside] / 10
    assert ((upper - 0.1 < mean) & (mean <= upper)).all()


def test_fitted_temperature_undoes_a_scaling():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5000, 10, generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)  # perfectly calibrated
    assert kd.fit_temperature(logits, targets) == pytest.approx(1, abs=0.05)
    assert kd.fit_temperature(3 * logits, targets) == pytest.approx(3, rel=0.05)
    assert kd.expected_calibration_error(3 * logits, targets) > 0.1 > 0.03 > kd.expected_calibration_error(logits, targets)


def test_overconfidence_and_underconfidence_in_one_bin_cancel():
    logits = torch.tensor([[0.0, 4.0]] * 10)
    confidence = torch.sigmoid(torch.tensor(4.0)).item()
    assert kd.expected_calibration_error(logits, torch.tensor([1] * 9 + [0])) == pytest.approx(confidence - 0.9, abs=1e-6)


@pytest.mark.parametrize("degrees, expected", [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_t_quantile_matches_the_tables(degrees, expected):
    assert kd.t_quantile(degrees) == pytest.approx(expected, abs=6e-4)


def test_interval_by_hand():
    values = kd.interval([0.01, 0.02, 0.03])  # mean 0.02, sd 0.01, half width 4.303 · 0.01 / √3
    assert (values.mean, values.sd, values.n) == (pytest.approx(0.02), pytest.approx(0.01), 3)
    assert values.low == pytest.approx(0.02 - 0.02484, abs=1e-5) and values.high == pytest.approx(0.02 + 0.02484, abs=1e-5)


@pytest.mark.parametrize(
    "gains, expected",
    [([0.02, 0.021, 0.022], "helps"), ([-0.02, -0.021, -0.022], "hurts"), ([0.05, -0.03, 0.01], "inconclusive"), ([0.05], "inconclusive"), ([0.02, 0.02], "inconclusive")],
)
def test_verdicts(gains, expected):
    assert kd.verdict(kd.interval(gains)) == expected


def test_never_seen_accuracy_counts_only_those_images(train):
    logits = torch.nn.functional.one_hot(train.targets, 3).float()
    logits[:6] = logits[:6].roll(1, dims=1)  # six of the twelve never-seen images wrong
    scores = kd.score(logits, train)
    assert (scores["never_seen_accuracy"], scores["never_seen_images"], scores["accuracy"]) == (0.5, 12, 42 / 48)


def test_costs_are_counted():
    costs = kd.cost(kd.LeNet5(10), 64, torch.device("cpu"))
    # C1 on 60², C3 on 26², C5 on 9², F6, output
    assert costs["multiply_adds"] == 75 * 6 * 60**2 + 150 * 16 * 26**2 + 400 * 120 * 9**2 + 120 * 84 + 84 * 10
    assert "latency_ms" not in kd.cost(kd.LeNet5(10), 64, torch.device("cpu"), timed=False)
    assert costs["parameters"] == 62_006 and 4 * 62_006 < costs["bytes"] < 4 * 62_006 + 10_000 and costs["latency_ms"] > 0


def test_profiles(monkeypatch):
    assert set(kd.PROFILES) == {"full", "gpu", "cpu", "study", "demo"} and len(kd.PROFILES["full"].seeds) >= 5
    monkeypatch.setenv("KD_PROFILE", "demo")
    assert kd.choose_profile().name == "demo" and kd.choose_profile("cpu").name == "cpu"
    with pytest.raises(ValueError, match="unknown profile 'fast'.*full, gpu, cpu, study, demo"):
        kd.choose_profile("fast")
    with pytest.raises(ValueError, match="unknown dataset 'imagewoof'"):
        kd.Run("imagewoof")
