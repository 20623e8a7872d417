"""The loss against plain NumPy, and the properties that distillation rests on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kd_utils as kd


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def numpy_loss(student, teacher, targets, temperature, alpha):
    """The definition and its gradient with respect to the student's logits, in float64."""
    rows, batch = np.arange(len(targets)), len(targets)
    p, q, answer = softmax(teacher / temperature), softmax(student / temperature), softmax(student)
    divergence = (p * np.log(p / q)).sum() / batch
    cross_entropy = -np.log(answer[rows, targets]).mean()
    gradient_ce = answer.copy()
    gradient_ce[rows, targets] -= 1
    gradient = alpha * temperature * (q - p) / batch + (1 - alpha) * gradient_ce / batch
    return alpha * temperature**2 * divergence + (1 - alpha) * cross_entropy, gradient


def numpy_cross_entropy(student, wanted):
    """Cross-entropy with target probabilities [B, C], and its gradient, in float64."""
    answer = softmax(student)
    return -(wanted * np.log(answer)).sum() / len(wanted), (answer - wanted) / len(wanted)


def random_logits(seed=0, batch=7, classes=10, scale=3.0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, scale, (batch, classes)), rng.normal(0, scale, (batch, classes)), rng.integers(0, classes, batch)


def gradient_of(student, teacher, targets, *settings, loss=kd.distillation_loss):
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    loss = loss(logits, torch.tensor(teacher, dtype=torch.float32), torch.tensor(targets), *settings)
    loss.backward()
    return loss.item(), logits.grad.numpy()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_value_and_gradient_match_numpy(temperature, alpha):
    for seed in range(5):
        student, teacher, targets = random_logits(seed)
        expected, expected_gradient = numpy_loss(student, teacher, targets, temperature, alpha)
        value, gradient = gradient_of(student, teacher, targets, temperature, alpha)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


def test_t_squared_keeps_the_scale_of_the_gradient():
    student, teacher, targets = random_logits(scale=1.0)
    norms = [np.linalg.norm(gradient_of(student, teacher, targets, temperature, 1.0)[1]) for temperature in (10, 20, 40, 80)]
    np.testing.assert_allclose(norms, norms[-1], rtol=0.15)  # without T² each would be a quarter of the one before


def test_student_equal_to_teacher_has_no_divergence():
    student, _, targets = random_logits()
    value, gradient = gradient_of(student, student, targets, 4.0, 1.0)
    assert value == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_divergence_is_averaged_over_the_batch_and_not_over_the_classes():
    student, teacher, targets = (torch.tensor(value) for value in random_logits(batch=4))
    once = kd.distillation_loss(student, teacher, targets, 2.0, 1.0)
    twice = kd.distillation_loss(student.repeat(2, 1), teacher.repeat(2, 1), targets.repeat(2), 2.0, 1.0)
    torch.testing.assert_close(once, twice)
    p, q = (F.softmax(logits / 2, dim=1) for logits in (teacher, student))
    assert once.item() == pytest.approx(4 * (p * (p / q).log()).sum().item() / 4, rel=1e-5)  # T² · sum / B


def test_alpha_zero_is_exactly_the_loss_of_experiment_1():
    student, teacher, targets = (torch.tensor(value) for value in random_logits())
    student = student.float().requires_grad_()
    first = kd.label_loss(student, None, targets)
    second = kd.distillation_loss(student, teacher, targets, 4.0, 0.0)
    assert torch.equal(first, second)
    assert torch.equal(torch.autograd.grad(first, student)[0], torch.autograd.grad(second, student)[0])


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10, requires_grad=True)
    kd.distillation_loss(student, teacher, torch.zeros(4, dtype=torch.long), 2.0, 0.5).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_huge_half_precision_logits_stay_finite(dtype):
    student = (2 * torch.rand(8, 10, generator=torch.Generator().manual_seed(0)) - 1).mul(1e4).to(dtype).requires_grad_()
    teacher = -student.detach()
    loss = kd.distillation_loss(student, teacher, torch.arange(8), 1.0, 0.5)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"temperature": -1.0}, "temperature must be greater than 0"),
        ({"temperature": float("nan")}, "temperature must be greater than 0"),
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"teacher_logits": torch.zeros(4, 1000)}, "same num_classes"),
        ({"teacher_logits": torch.zeros(3, 10)}, "both be"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets"),
        ({"targets": torch.full((4,), 10)}, "labels must lie in 0 … 9"),
        ({"targets": torch.full((4,), -1)}, "labels must lie in 0 … 9"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(student_logits=torch.zeros(4, 10), teacher_logits=torch.zeros(4, 10), targets=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        kd.distillation_loss(**{**arguments, "temperature": 4.0, "alpha": 0.5, **change})


def test_smoothed_loss_matches_numpy():
    for seed in range(5):
        student, teacher, targets = random_logits(seed)
        expected, expected_gradient = numpy_cross_entropy(student, 0.9 * np.eye(10)[targets] + 0.01)
        value, gradient = gradient_of(student, teacher, targets, loss=kd.smoothed_loss)
        assert value == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_argmax_loss_matches_numpy(alpha):
    for seed in range(5):
        student, teacher, targets = random_logits(seed)
        wanted = alpha * np.eye(10)[teacher.argmax(1)] + (1 - alpha) * np.eye(10)[targets]
        expected, expected_gradient = numpy_cross_entropy(student, wanted)
        value, gradient = gradient_of(student, teacher, targets, alpha, loss=kd.argmax_loss)
        assert value == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature, alpha", [(1.0, 0.5), (4.0, 0.9)])
def test_shuffled_loss_matches_numpy(temperature, alpha):
    for seed in range(5):
        student, teacher, _ = random_logits(seed, batch=12)
        targets = np.arange(12) % 3
        torch.manual_seed(seed)
        order = kd.shuffle_within_class(torch.tensor(targets)).numpy()
        expected, expected_gradient = numpy_loss(student, teacher[order], targets, temperature, alpha)
        torch.manual_seed(seed)
        value, gradient = gradient_of(student, teacher, targets, temperature, alpha, loss=kd.shuffled_loss)
        assert value == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


def test_shuffled_loss_is_the_distillation_loss_where_a_class_has_one_answer():
    student, teacher, targets = (torch.tensor(value) for value in random_logits(batch=30))
    assert torch.equal(kd.shuffled_loss(student, teacher[targets], targets, 2.0, 0.5), kd.distillation_loss(student, teacher[targets], targets, 2.0, 0.5))


@pytest.mark.parametrize("batch, classes", [(64, 10), (64, 3), (5, 5), (7, 20), (1, 1), (128, 1)])
def test_shuffle_stays_within_the_class_and_moves_everyone_who_can(batch, classes):
    for seed in range(20):
        torch.manual_seed(seed)
        targets = torch.randint(classes, (batch,))
        order = kd.shuffle_within_class(targets)
        assert torch.equal(order.sort().values, torch.arange(batch))  # an exchange: each answer is given once
        assert torch.equal(targets[order], targets)
        alone = targets.bincount()[targets] == 1
        assert torch.equal(order == torch.arange(batch), alone)


def test_shuffle_is_drawn_anew_from_the_generator():
    targets = torch.arange(64) % 4
    torch.manual_seed(0)
    first, second = kd.shuffle_within_class(targets), kd.shuffle_within_class(targets)
    torch.manual_seed(0)
    assert torch.equal(first, kd.shuffle_within_class(targets)) and not torch.equal(first, second)


@pytest.mark.parametrize("loss", [kd.argmax_loss, kd.shuffled_loss])
def test_controls_refuse_what_distillation_refuses(loss):
    settings = {"alpha": 0.5} if loss is kd.argmax_loss else {"alpha": 0.5, "temperature": 2.0}
    with pytest.raises(ValueError, match="give `fit` a teacher"):
        loss(torch.zeros(4, 10), None, torch.zeros(4, dtype=torch.long), **settings)
    with pytest.raises(ValueError, match="alpha"):
        loss(torch.zeros(4, 10), torch.zeros(4, 10), torch.zeros(4, dtype=torch.long), **{**settings, "alpha": 2.0})
