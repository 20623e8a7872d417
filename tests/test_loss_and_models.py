"""The distillation loss against an independent calculation, and the networks."""

import math
from hashlib import sha256

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kd_utils as kd


def by_the_definition(student, teacher, targets, temperature, alpha):
    """The loss in plain Python floats, straight from the formula."""
    total = 0.0
    for s, t, target in zip(student.tolist(), teacher.tolist(), targets.tolist()):
        def softmax(logits, scale):
            powers = [math.exp(logit / scale) for logit in logits]
            return [power / sum(powers) for power in powers]

        p, q = softmax(t, temperature), softmax(s, temperature)
        kl = sum(a * math.log(a / b) for a, b in zip(p, q))
        total += alpha * temperature**2 * kl - (1 - alpha) * math.log(softmax(s, 1)[target])
    return total / len(targets)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 5, 10, generator=generator)
    return student, teacher, torch.randint(0, 10, (5,), generator=generator)


CASES = [(1.0, 0.5), (2.0, 0.5), (4.0, 0.9), (8.0, 1.0), (2.0, 0.0)]


@pytest.mark.parametrize("temperature, alpha", CASES)
def test_loss_is_the_definition(logits, temperature, alpha):
    found = kd.distillation_loss(*logits, temperature, alpha)
    assert found.item() == pytest.approx(by_the_definition(*logits, temperature, alpha), rel=1e-5)


@pytest.mark.parametrize("temperature, alpha", CASES)
def test_gradient_is_that_of_the_definition(logits, temperature, alpha):
    student, teacher, targets = logits
    student.requires_grad_()
    kd.distillation_loss(student, teacher, targets, temperature, alpha).backward()
    # By hand: alpha · T · (q − p) + (1 − alpha) · (softmax − one-hot), divided by the batch's size.
    q, p = (values.detach().div(temperature).softmax(1) for values in (student, teacher))
    hard = student.detach().softmax(1) - F.one_hot(targets, 10)
    expected = (alpha * temperature * (q - p) + (1 - alpha) * hard) / len(targets)
    assert torch.allclose(student.grad, expected, atol=1e-6)


def test_loss_takes_logits_of_any_type_and_computes_in_float32(logits):
    student, teacher, targets = logits
    exact = kd.distillation_loss(student.half().float(), teacher.half().float(), targets, 2.0, 0.5)
    found = kd.distillation_loss(student.half(), teacher.half(), targets, 2.0, 0.5)
    assert found.dtype is torch.float32 and torch.equal(found, exact)


def test_loss_is_zero_where_both_agree_and_sends_the_teacher_nothing(logits):
    student, teacher, targets = logits
    teacher.requires_grad_()
    assert kd.distillation_loss(teacher.detach() + 5, teacher, targets, 3.0, 1.0).item() == pytest.approx(0, abs=1e-5)
    kd.distillation_loss(student.requires_grad_(), teacher, targets, 3.0, 1.0).backward()
    assert teacher.grad is None


def test_class_mean_as_target_has_the_mean_gradient(logits):
    """Why the control is fair: the mean answer pulls a student as the single answers do on average."""
    student, teacher, targets = logits
    p = (teacher / 2).softmax(1)
    student = student[:1].expand(5, 10).clone().requires_grad_()
    means = 2 * p.mean(0, keepdim=True).log().expand(5, 10)
    gradients = [torch.autograd.grad(kd.distillation_loss(student, given, targets, 2.0, 1.0), student)[0]
                 for given in (teacher, means)]  # fmt: skip
    assert torch.allclose(gradients[0].sum(0), gradients[1].sum(0), atol=1e-6)


@pytest.mark.parametrize("temperature, alpha", [(0.0, 0.5), (-1.0, 0.5), (2.0, 1.1), (2.0, -0.1), (math.nan, 0.5)])
def test_bad_temperature_and_alpha_are_named(logits, temperature, alpha):
    with pytest.raises(ValueError, match=f"temperature > 0 and 0 ≤ alpha ≤ 1, got {temperature} and {alpha}"):
        kd.distillation_loss(*logits, temperature, alpha)


def test_shapes_that_do_not_fit_are_named(logits):
    student, teacher, targets = logits
    for wrong in ((student, teacher[:, :5], targets), (student, None, targets), (student, teacher, targets[:3])):
        with pytest.raises(ValueError, match=r"\[B, C\]"):
            kd.distillation_loss(*wrong, 2.0, 0.5)


@pytest.mark.parametrize("size", [32, 64, 97])
@pytest.mark.parametrize("build", kd.STUDENTS.values(), ids=kd.STUDENTS)
def test_students_take_images_of_any_size_from_32(build, size):
    assert build(num_classes=7).eval()(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_lenet_has_the_papers_layers():
    c1, c3, c5 = 6 * (3 * 25 + 1), 16 * (6 * 25 + 1), 120 * (16 * 25 + 1)
    f6, output = 84 * (120 + 1), 10 * (84 + 1)
    network, image = kd.LeNet5(10), torch.zeros(1, 3, 128, 128)
    assert sum(p.numel() for p in network.parameters()) == c1 + c3 + c5 + f6 + output
    assert [list(torch.nn.Sequential(*list(network)[:end])(image).shape[1:]) for end in (3, 6, 9)] == [[6, 14, 14], [16, 5, 5], [120]]


def test_custom_cnn_has_the_stated_widths():
    widths = [block.refine[0].out_channels for block in kd.CustomCNN() if isinstance(block, kd.ConvBlock)]
    assert widths == [32, 64, 128, 256, 512]
    assert 3.5e6 < sum(p.numel() for p in kd.CustomCNN(10).parameters()) < 3.6e6


def test_teacher_is_read_from_a_half_precision_file(tmp_path):
    source, path = kd.build_teacher(1000, None), tmp_path / "weights.pth"
    source.bn1.running_var[0] = 1e6  # too large for float16
    torch.save({key: value.half() if value.is_floating_point() else value
                for key, value in source.state_dict().items()}, path)  # fmt: skip
    teacher = kd.build_teacher(10, str(path))
    assert torch.equal(teacher.conv1.weight, source.conv1.weight.half().float()) and teacher.bn1.running_var[0] == 65504
    assert teacher.fc.out_features == 10 and sha256(path.read_bytes()).hexdigest() in teacher.origin
    assert torch.equal(teacher.fc.weight, kd.build_teacher(10, str(path)).fc.weight)  # also the new layer


def test_bad_teacher_weights_are_named(tmp_path, monkeypatch):
    (tmp_path / "foreign.pth").write_bytes(b"no state dict")
    with pytest.raises(ValueError, match="foreign.pth is no state dict of ResNet-50"):
        kd.build_teacher(10, str(tmp_path / "foreign.pth"))
    monkeypatch.setenv("KD_TEACHER_WEIGHTS", "no/such/file.pth")
    with pytest.raises(FileNotFoundError, match="'no/such/file.pth'"):
        kd.choose_settings("imagewoof2-160", "cpu")  # at the start, not after Experiment 1


def test_profiles_and_datasets_are_chosen_by_name(monkeypatch):
    monkeypatch.setenv("KD_PROFILE", "demo")
    assert kd.choose_settings("imagenette2-160").dataset == "demo"
    for wrong in (("imagenette", "cpu"), ("imagenette2-160", "tpu")):
        with pytest.raises(ValueError, match="choose one of"):
            kd.choose_settings(*wrong)


def test_precision_follows_the_hardware(monkeypatch):
    choose = kd.choose_precision.__wrapped__
    monkeypatch.setattr(kd, "DEVICE", torch.device("cuda"))
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):  # an A100, a T4
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        assert choose() is expected


def test_score_is_what_a_plain_calculation_gives():
    generator = torch.Generator().manual_seed(1)
    logits, targets = 2 * torch.randn(200, 4, generator=generator), torch.arange(200) % 4
    split = kd.Split(torch.zeros(200, 3, 1, 1), targets, list("abcd"), torch.arange(200) < 50)
    found = {key: value.numpy() for key, value in kd.score(logits, split).items()}
    soft, right = logits.softmax(1).numpy(), (logits.argmax(1) == targets).numpy()
    assert found["accuracy"] == pytest.approx(right.mean())
    assert found["never_seen"] == pytest.approx(right[:50].mean())
    assert found["nll"] == pytest.approx(-np.log(soft[np.arange(200), targets]).mean(), rel=1e-5)
    assert found["recall"] == pytest.approx([right[label::4].mean() for label in range(4)])
    confidence, error = soft.max(1), 0
    for low in np.arange(15) / 15:
        members = (confidence >= low) & (confidence < low + 1 / 15)
        if members.any():
            error += members.mean() * abs(right[members].mean() - confidence[members].mean())
    assert found["ece"] == pytest.approx(error, rel=1e-4)


def test_confusions_count_answers_by_true_class():
    logits = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    split = kd.Split(torch.zeros(4, 3, 1, 1), torch.tensor([0, 0, 1, 1]), ["a", "b"], torch.ones(4))
    share, over = kd.confusions(logits, split)
    assert share.tolist() == [[100, 0], [50, 50]] and over.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("gains, low, high", [
    ([0.01, 0.03], 0.02 - 12.706 * 0.01, 0.02 + 12.706 * 0.01),
    ([0.01, 0.02, 0.03], 0.02 - 4.303 * 0.01 / 3**0.5, 0.02 + 4.303 * 0.01 / 3**0.5),
])  # fmt: skip
def test_interval_is_students(gains, low, high):
    assert kd.interval(gains) == pytest.approx((0.02, low, high))


def test_verdict_follows_the_interval():
    assert kd.verdict([0.02, 0.021, 0.022]) == "helps" and kd.verdict([-0.02, -0.021, -0.022]) == "hurts"
    for unclear in ([0.02, -0.01, 0.03], [0.02], [0.02, 0.02]):  # one seed, or seeds that do not differ
        assert kd.verdict(unclear) == "inconclusive"
    assert kd.points([0.02]) == "+2.0" and kd.points([0.01, 0.03]) == "+2.0 [-10.7, +14.7]"
    assert kd.points([]) == kd.points([math.nan, math.nan]) == "–"  # no seeds, no never-seen images
