"""Loss and networks against independent calculations; precision, and the teacher."""

import copy
import math
from functools import partial
from hashlib import sha256

import pytest
import torch
import torch.nn.functional as F
from conftest import make_split, make_stage, same, tiny
from torch import nn
from torchvision.models import resnet18

import kd_utils as kd


# ── Loss ──────────────────────────────────────────────────────────────────
@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 5, 10, generator=generator)
    return student, teacher, torch.randint(0, 10, (5,), generator=generator)


def softmax(logits, temperature):
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def by_the_definition(student, teacher, targets, temperature, alpha):
    """The loss in plain Python floats, straight from the formula."""
    total = 0.0
    rows = zip(student.tolist(), teacher.tolist(), targets.tolist(), strict=True)
    for s, t, target in rows:
        p, q = softmax(t, temperature), softmax(s, temperature)
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += alpha * temperature**2 * kl
        total -= (1 - alpha) * math.log(softmax(s, 1)[target])
    return total / len(targets)


CASES = [(1.0, 0.5), (2.0, 0.5), (4.0, 0.9), (8.0, 1.0), (2.0, 0.0)]


@pytest.mark.parametrize("temperature, alpha", CASES)
def test_loss_and_gradient_are_those_of_the_definition(logits, temperature, alpha):
    student, teacher, targets = logits
    student.requires_grad_()
    teacher.requires_grad_()
    found = kd.distillation_loss(student, teacher, targets, temperature, alpha)
    expected = by_the_definition(*logits, temperature, alpha)
    assert found.item() == pytest.approx(expected, rel=1e-5)

    # By hand: (alpha · T · (q − p) + (1 − alpha) · (softmax − one-hot)) / B
    found.backward()
    q, p = ((x.detach() / temperature).softmax(1) for x in (student, teacher))
    hard = student.detach().softmax(1) - F.one_hot(targets, 10)
    expected = (alpha * temperature * (q - p) + (1 - alpha) * hard) / len(targets)
    assert torch.allclose(student.grad, expected, atol=1e-6)
    assert teacher.grad is None


def test_loss_takes_logits_of_any_type_and_computes_in_float32(logits):
    student, teacher, targets = logits[0].half(), logits[1].bfloat16(), logits[2]
    plain = kd.distillation_loss(student.float(), teacher.float(), targets, 2.0, 0.5)
    found = kd.distillation_loss(student, teacher, targets, 2.0, 0.5)
    assert found.dtype is torch.float32 and torch.equal(found, plain)


def test_numbers_and_shapes_that_do_not_fit_are_named(logits):
    for wrong in ((0.0, 0.5), (-1.0, 0.5), (2.0, 1.1), (2.0, -0.1), (math.nan, 0.5)):
        with pytest.raises(ValueError, match=f"got {wrong[0]} and {wrong[1]}"):
            kd.distillation_loss(*logits, *wrong)
    student, teacher, targets = logits
    wrong = [(student, teacher[:, :5], targets), (student, None, targets)]
    wrong += [(student, teacher, targets[:3]), (student[0], teacher[0], targets[:1])]
    for given in wrong:
        with pytest.raises(ValueError, match=r"need logits \[B, C\] twice"):
            kd.distillation_loss(*given, 2.0, 0.5)


# ── Networks ──────────────────────────────────────────────────────────────
def shaken(network):
    """The network in evaluation mode, with batch statistics that are not 0 and 1."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    with kd.seeded(0):
        for norm in norms:
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.data.uniform_(0.5, 1.5)
    return network.eval()


def custom_by_functions(network, x):
    values = iter(network.state_dict().values())

    def layer(x, stride, groups):
        weight, scale, shift, average, variance, _ = (next(values) for _ in range(6))
        x = F.conv2d(x, weight, None, stride, 1, groups=groups)
        return F.relu(F.batch_norm(x, average, variance, scale, shift))

    for width, groups in ((32, 1), (64, 1), (128, 1), (256, 1), (512, 2)):
        x = layer(x, 2, 1)
        x = x + layer(x, 1, groups)
        assert x.shape[1] == width
    return F.linear(x.mean((2, 3)), next(values), next(values))


def lenet_by_functions(network, x):
    values = iter(network.parameters())
    for size in (14, 5, 1):
        x = F.conv2d(x, next(values), next(values)).relu()
        x = F.adaptive_max_pool2d(x, size)
    x = F.linear(x.flatten(1), next(values), next(values)).relu()
    return F.linear(x, next(values), next(values))


def test_networks_are_their_functional_recomputations_with_the_papers_sizes():
    with kd.seeded(1):
        lenet, custom = kd.LeNet5(10), shaken(kd.CustomCNN(10))
        small, odd = 3 * torch.randn(2, 3, 32, 32), torch.randn(2, 3, 97, 97)
    assert torch.allclose(lenet(small), lenet_by_functions(lenet, small), atol=1e-5)
    expected = custom_by_functions(custom, odd)
    assert torch.allclose(custom(odd), expected, rtol=1e-3, atol=1e-4)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (lenet, custom)]
    assert sizes[0] == 62_006 and 3.5e6 < sizes[1] < 3.6e6


def test_custom_cnn_drops_a_fifth_of_its_features_in_training_only():
    network, seen = shaken(kd.CustomCNN()), []
    network[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(8, 3, 64, 64)
    network(images)
    network[-2].train()
    network(images)
    dropped = (seen[1] == 0)[seen[0] != 0]
    assert len(dropped) > 3000 and 0.17 < dropped.float().mean() < 0.23


def test_prediction_is_repeatable_and_changes_nothing(exact):
    network, split = shaken(tiny(3)), make_split(300)
    before = copy.deepcopy(network)
    found = kd.predict(network.train(), split)
    assert torch.equal(found, kd.predict(network.train(), split))
    assert same(network, before) and not found.requires_grad
    expected = before.eval()(kd.normalise(split.images))
    assert found.shape == (300, 3) and torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_networks_have_the_precision(exact, settings, precision):
    exact(precision)
    student = make_stage(settings).students[0]
    student.is_open = True
    assert student.forward(torch.zeros(2, 3, 32, 32)).dtype is precision
    assert student.scaler.is_enabled() == (precision is torch.float16)
    assert kd.predict(student.network, make_split(5)).dtype is torch.float32


@pytest.mark.parametrize("native", [True, False])  # an A100, and a T4
def test_precision_follows_the_hardware(monkeypatch, native):
    def answer(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(kd, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    expected = torch.bfloat16 if native else torch.float16
    assert kd.choose_precision.__wrapped__() is expected


# ── The teacher ───────────────────────────────────────────────────────────
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_teacher_is_read_from_a_half_precision_file(monkeypatch, tmp_path, key):
    monkeypatch.setattr(kd, "resnet50", resnet18)  # built alike, but quick
    source, path = resnet18(), tmp_path / "weights.pth"
    source.bn1.running_var[0] = 1e6  # too large for float16
    state = source.half().state_dict()
    torch.save({"epoch": 9, key: state} if key else state, path)
    teacher = kd.build_teacher(10, str(path))
    assert torch.equal(teacher.conv1.weight, source.conv1.weight.float())
    assert teacher.bn1.running_var[0] == 65504 and teacher.fc.out_features == 10
    assert sha256(path.read_bytes()).hexdigest() in teacher.origin


def test_weights_that_cannot_be_had_are_explained(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(kd, "resnet50", resnet18)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"no route to host.*KD_TEACHER_WEIGHTS"):
        kd.build_teacher(10, "IMAGENET1K_V1")
    path = tmp_path / "checkpoints" / "resnet50-0676ba61.pth"
    path.write_bytes(b"PK\3\4 cut")
    with pytest.raises(ValueError, match=f"{path}.* delete it"):
        kd.build_teacher(10, "IMAGENET1K_V1")
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"foreign\.pth.*encoder\.weight"):
        kd.build_teacher(10, str(tmp_path / "foreign.pth"))


def test_new_layer_of_the_teacher_follows_the_seed(settings, monkeypatch):
    monkeypatch.setattr(kd, "resnet50", resnet18)
    networks = {"ResNet": partial(kd.build_teacher, weights=None)}
    made = [make_stage(settings, networks=networks).students for _ in range(2)]
    layers = [student.network.fc for students in made for student in students]
    assert same(layers[0], layers[2]) and not same(layers[0], layers[1])
