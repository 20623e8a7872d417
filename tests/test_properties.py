"""What must hold for every loss and every crop box, on inputs that hypothesis looks for."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kd_utils as kd

settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=150)
settings.load_profile("deterministic")

temperatures = st.floats(-2, 3).map(lambda exponent: 10.0**exponent)
EPSILON = torch.finfo(torch.float32).eps


@st.composite
def answers(draw):
    """(student_logits, teacher_logits, targets) of any shape, float type and size up to ±1e4."""
    batch, classes, seed = draw(st.integers(1, 8)), draw(st.integers(2, 12)), draw(st.integers(0, 10**6))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    generator, size = torch.Generator().manual_seed(seed), 10 ** draw(st.floats(-3, 4))
    logits = (torch.rand(2, batch, classes, generator=generator) * 2 - 1) * size
    return *logits.to(dtype), torch.randint(0, classes, (batch,), generator=generator)


def rounding(logits, temperature):
    """How far float32 may move T² · KL: an error of some ε in each log-probability, whose size is at most 2 max|z| / T + log C."""
    return 8 * EPSILON * temperature**2 * (2 * float(logits.abs().max()) / temperature + 3)


@given(answers(), temperatures, st.floats(0, 1))
def test_loss_is_finite_and_not_negative(case, temperature, alpha):
    student, teacher, targets = case
    loss = kd.distillation_loss(student, teacher, targets, temperature, alpha)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert loss >= -rounding(torch.stack([student, teacher]), temperature)


@given(answers(), temperatures, st.floats(0, 1))
def test_gradient_sums_to_zero_over_the_classes(case, temperature, alpha):
    student, teacher, targets = case
    student = student.float().requires_grad_()
    kd.distillation_loss(student, teacher, targets, temperature, alpha).backward()
    assert student.grad.isfinite().all()
    assert student.grad.sum(1).abs().max() <= 1e-5 * (temperature + 1)  # each part of the gradient is at most T + 1


@given(answers(), temperatures, st.floats(0, 1), st.integers(-64, 64))
def test_loss_ignores_a_constant_added_to_the_logits(case, temperature, alpha, constant):
    student, teacher, targets = (case[0].double() / 8).round() * 8, (case[1].double() / 8).round() * 8, case[2]  # exact in float32
    loss, moved = (kd.distillation_loss(s, t, targets, temperature, alpha) for s, t in ((student, teacher), (student + constant, teacher - constant)))
    tolerance = rounding(torch.stack([student, teacher]).abs() + 64, temperature) + 1e-5 * float(loss.abs()) + 1e-5
    assert abs(loss - moved) <= tolerance


@given(answers(), temperatures)
def test_divergence_of_equal_answers_is_zero(case, temperature):
    student, _, targets = case
    assert kd.distillation_loss(student, student, targets, temperature, 1.0) == 0


@given(st.integers(8, 256), st.integers(1, 64), st.integers(0, 10**6), st.floats(0.01, 1), st.floats(0.1, 1))
def test_crop_boxes_lie_inside_the_image(size, number, seed, smallest, aspect):
    boxes = kd.sample_crops(number, size, torch.Generator().manual_seed(seed), scale=(smallest, 1.0), ratio=(aspect, 1 / aspect))
    top, left, height, width = boxes.numpy().T
    assert (np.minimum(top, left) >= 0).all() and (np.minimum(height, width) >= 1).all()
    assert (top + height <= size).all() and (left + width <= size).all()


@given(st.integers(0, 10**6), st.booleans())
def test_augmented_pixels_stay_within_the_box(seed, flip):
    generator = torch.Generator().manual_seed(seed)
    boxes = kd.sample_crops(1, 32, generator)
    top, left, height, width = boxes[0].tolist()
    image = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)  # white everywhere but in the box
    image[..., top : top + height, left : left + width] = 10
    assert kd.crop_and_resize(image, boxes, torch.tensor([flip])).max() < 10.01
