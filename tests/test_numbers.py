"""Loss, networks and statistics against independent calculations."""

import copy
import math
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import find_interval, make_split, same, tiny
from torch import nn

import kd_utils as kd

# ── Loss ──────────────────────────────────────────────────────────────────
with kd.seeded(0):
    LOGITS = [3 * torch.randn(5, 10), 3 * torch.randn(5, 10), torch.randint(10, (5,))]


@pytest.mark.parametrize("t, alpha", [(1.0, 0.5), (4.0, 0.9), (8.0, 1.0), (2.0, 0.0)])
def test_loss_and_gradient_are_those_of_the_definition(t, alpha):
    student, teacher = (logits.clone().requires_grad_() for logits in LOGITS[:2])
    found = kd.distillation_loss(student, teacher, LOGITS[2], t, alpha)
    found.backward()
    q, p, hard = (x.double().softmax(1) for x in (student / t, teacher / t, student))
    hot = F.one_hot(LOGITS[2], 10)
    kl, cross_entropy = (p * (p / q).log()).sum() / 5, -(hot * hard.log()).sum() / 5
    expected = alpha * t * t * kl + (1 - alpha) * cross_entropy
    assert found.item() == pytest.approx(expected.item())
    expected = (alpha * t * (q - p) + (1 - alpha) * (hard - hot)) / 5
    assert torch.allclose(student.grad.double(), expected, atol=1e-6)
    assert teacher.grad is None


def test_loss_computes_in_float32_and_names_what_does_not_fit():
    student, teacher, targets = LOGITS
    found = kd.distillation_loss(student.half(), teacher.half(), targets, 2.0, 0.5)
    rounded = student.half().float(), teacher.half().float()
    assert torch.equal(found, kd.distillation_loss(*rounded, targets, 2.0, 0.5))
    for wrong in ((0.0, 0.5), (2.0, 1.1), (2.0, -0.1), (math.nan, 0.5)):
        with pytest.raises(ValueError, match=f"got {wrong[0]} and {wrong[1]}"):
            kd.distillation_loss(*LOGITS, *wrong)
    wrong = [(student, teacher[:, :5], targets), (student, None, targets)]
    wrong += [(student, teacher, targets[:3]), (student[0], teacher[0], targets[:1])]
    for given in wrong:
        with pytest.raises(ValueError, match=r"need logits \[B, C\] twice"):
            kd.distillation_loss(*given, 2.0, 0.5)


# ── Networks ──────────────────────────────────────────────────────────────
def custom_by_functions(network, x):
    values = iter(network.state_dict().values())

    def layer(x, stride, groups):
        weight, scale, shift, average, variance, _batches = islice(values, 6)
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


def test_networks_are_their_functional_recomputations():
    with kd.seeded(1):
        lenet, custom = kd.LeNet5(10), kd.CustomCNN(10).eval()
        small, odd = 3 * torch.randn(2, 3, 32, 32), torch.randn(2, 3, 97, 97)
    assert torch.allclose(lenet(small), lenet_by_functions(lenet, small), atol=1e-5)
    expected = custom_by_functions(custom, odd)
    assert torch.allclose(custom(odd), expected, rtol=1e-3, atol=1e-4)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (lenet, custom)]
    assert sizes[0] == 62_006 and 3.5e6 < sizes[1] < 3.6e6
    assert isinstance(custom[-2], nn.Dropout) and custom[-2].p == 0.2


def test_prediction_is_the_plain_one_and_changes_nothing(exact):
    network, split = tiny(3), make_split(300)
    before = copy.deepcopy(network)
    found = kd.predict(network.train(), split)
    assert torch.equal(found, kd.predict(network.train(), split))
    assert same(network, before) and not found.requires_grad
    expected = before.eval()(kd.normalise(split.images_at(slice(None))))
    assert found.shape == (300, 3) and torch.allclose(found, expected, atol=1e-5)
    exact(torch.bfloat16)
    rounded = kd.predict(network, split)
    assert rounded.dtype is torch.float32 and not torch.equal(rounded, found)
    assert torch.allclose(rounded, found, atol=0.05)


@pytest.mark.parametrize(
    "device, told, expected",
    [
        ("cuda", True, torch.bfloat16),  # an A100
        ("cuda", False, torch.float16),  # a T4
        ("cpu", "flags: avx2 amx_bf16", torch.bfloat16),
        ("cpu", "flags: avx2", torch.float32),
    ],
)
def test_precision_follows_the_hardware(monkeypatch, device, told, expected):
    monkeypatch.setattr(kd, "DEVICE", torch.device(device))
    answer = Mock(side_effect=lambda including_emulation: told or including_emulation)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: told)
    assert kd.choose_precision.__wrapped__() is expected


def test_chance_is_torchs_own_and_is_given_back():
    torch.manual_seed(3 * 1_000_003 + 2)
    expected = torch.randn(5)
    torch.manual_seed(8)
    after = torch.randn(2)
    torch.manual_seed(8)
    with pytest.raises(KeyError), kd.seeded(3, 2):
        assert torch.equal(torch.randn(5), expected)
        raise KeyError
    assert torch.equal(torch.randn(2), after)


# ── Classifiers by name ───────────────────────────────────────────────────
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_weights_are_read_from_a_half_precision_file(tmp_path, key):
    source, path = kd.build_classifier(9, "resnet18"), tmp_path / "weights"
    source.bn1.running_var[:2] = torch.tensor([1e6, torch.nan])  # the first: inf there
    state = source.half().state_dict()
    torch.save({"epoch": 9, key: state} if key else state, path)
    found = kd.build_classifier(10, "resnet18", str(path))
    assert torch.equal(found.conv1.weight, source.conv1.weight.float())
    assert found.bn1.running_var[0] == 65504 and found.bn1.running_var[1].isnan()
    assert found.fc.out_features == 10
    assert found.initial_weights == f"weights, SHA-256 {kd.fingerprint(state.values())}"


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_0", "vit_b_16"])
def test_any_classifier_keeps_all_but_its_last_layer(tmp_path, name):
    path = tmp_path / "weights.pth"
    torch.save(kd.build_classifier(5, name).state_dict(), path)
    before, found = torch.load(path), kd.build_classifier(4, name, path).state_dict()
    changed = [key for key in found if not found[key].equal(before[key])]
    assert changed == list(found)[-2:] and [len(found[key]) for key in changed] == [
        4,
        4,
    ]


def test_networks_and_weights_that_cannot_be_had_are_explained(monkeypatch, tmp_path):
    def assert_explained(told, name="resnet18", weights="IMAGENET1K_V1"):
        with pytest.raises(ValueError, match=told):
            kd.build_classifier(10, name, weights)

    assert_explained("Unknown model resnet19", "resnet19")
    for wrong in ("IMAGENET1K_V3", "imagenet1k_v1", "no/such/file"):
        assert_explained(f"{wrong!r}: no file, nor one of IMAGENET1K_V1", weights=wrong)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    offline = Mock(side_effect=OSError("no route to host"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert_explained("no resnet18 from IMAGENET1K_V1: no route to host")
    cut, foreign = tmp_path / "cut.pth", tmp_path / "foreign.pth"
    cut.write_bytes(b"PK\3\4 cut")
    torch.save({"encoder.weight": torch.zeros(1)}, foreign)
    assert_explained("no resnet18 from .*cut.pth", weights=cut)
    assert_explained(r"foreign\.pth.*\n.*conv1", weights=foreign)


# ── Statistics ────────────────────────────────────────────────────────────
def student_quantile(freedom):
    """The 97.5 % quantile of Student's t, by adding up its density."""
    x = np.arange(0, 20, 1e-4) + 5e-5
    gammas = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    density *= math.exp(gammas) / math.sqrt(math.pi * freedom)
    return x[np.searchsorted(np.cumsum(density) * 1e-4, 0.475)]


@pytest.mark.parametrize("freedom", [*range(1, 10), *range(10, 101, 10), 46, 900])
def test_interval_of_seeds_or_images_is_students(freedom):
    number = np.arange(freedom + 1.0)
    number /= math.sqrt(number.var(ddof=1) / len(number))  # so its standard error is 1
    in_table = freedom if freedom < 10 else min(freedom // 10 * 10, 100)
    expected = number.mean() + student_quantile(in_table) * np.array([0, -1, 1])
    gains = np.outer(number, np.ones(5))
    for found in (find_interval(gains), find_interval(gains.T)):
        assert found == pytest.approx(expected, abs=1e-3)


def test_interval_adds_up():
    # Squared errors: 9 / 3 of the seeds and 12 / 4 of the images. Degrees of freedom:
    # (3 + 3)² / (3² / 2 + 3² / 3) = 4.8, rounded down
    gains = np.add.outer([0, 3, 6], [-3, -3, 3, 3])
    half = student_quantile(4) * math.sqrt(3 + 3)
    assert find_interval(gains) == pytest.approx((3, 3 - half, 3 + half), abs=5e-3)

    gains = np.zeros((5, 134))
    assert find_interval(gains) == (0, 0, 0)
    gains[:, :3] = 1  # the seeds agree, but three images may be luck
    _, low, high = find_interval(gains)
    assert low < 0 < high
    gains[:, :12] = 1
    assert find_interval(gains)[1] > 0 > find_interval(-gains)[2]
    assert np.isnan(find_interval(gains[:1])[1:]).all()  # one seed
    assert np.isnan(find_interval(gains[:, :0])).all()  # nothing is never seen
