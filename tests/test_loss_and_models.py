"""Loss and networks against independent calculations; settings and the teacher."""

import copy
import math
from hashlib import sha256

import pytest
import torch
import torch.nn.functional as F
from conftest import make_split, same, tiny
from torch import nn
from torchvision.models import resnet18

import kd_utils as kd


# ── Loss ──────────────────────────────────────────────────────────────────
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


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 5, 10, generator=generator)
    return student, teacher, torch.randint(0, 10, (5,), generator=generator)


CASES = [(1.0, 0.5), (2.0, 0.5), (4.0, 0.9), (8.0, 1.0), (2.0, 0.0)]


@pytest.mark.parametrize("temperature, alpha", CASES)
def test_loss_and_gradient_are_those_of_the_definition(logits, temperature, alpha):
    student, teacher, targets = logits
    student.requires_grad_()
    found = kd.distillation_loss(student, teacher, targets, temperature, alpha)
    expected = by_the_definition(*logits, temperature, alpha)
    assert found.item() == pytest.approx(expected, rel=1e-5)

    # By hand: (alpha · T · (q − p) + (1 − alpha) · (softmax − one-hot)) / B
    found.backward()
    q, p = ((x.detach() / temperature).softmax(1) for x in (student, teacher))
    hard = student.detach().softmax(1) - F.one_hot(targets, 10)
    expected = (alpha * temperature * (q - p) + (1 - alpha) * hard) / len(targets)
    assert torch.allclose(student.grad, expected, atol=1e-6)


def test_loss_takes_logits_of_any_type_and_computes_in_float32(logits):
    student, teacher, targets = logits[0].half(), logits[1].bfloat16(), logits[2]
    plain = kd.distillation_loss(student.float(), teacher.float(), targets, 2.0, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = kd.distillation_loss(student, teacher, targets, 2.0, 0.5)
    assert found.dtype is torch.float32 and torch.equal(found, plain)


def test_loss_is_zero_where_both_agree_and_sends_the_teacher_nothing(logits):
    student, teacher, targets = logits
    teacher.requires_grad_()
    agreed = kd.distillation_loss(teacher.detach() + 5, teacher, targets, 3.0, 1.0)
    assert agreed.item() == pytest.approx(0, abs=1e-5)
    student.requires_grad_()
    kd.distillation_loss(student, teacher, targets, 3.0, 1.0).backward()
    assert teacher.grad is None


WRONG = [(0.0, 0.5), (-1.0, 0.5), (2.0, 1.1), (2.0, -0.1), (math.nan, 0.5)]


@pytest.mark.parametrize("temperature, alpha", WRONG)
def test_bad_temperature_and_alpha_are_named(logits, temperature, alpha):
    with pytest.raises(ValueError, match=f"got {temperature} and {alpha}"):
        kd.distillation_loss(*logits, temperature, alpha)


def test_shapes_that_do_not_fit_are_named(logits):
    student, teacher, targets = logits
    wrong = [(student, teacher[:, :5], targets), (student, None, targets)]
    wrong += [(student, teacher, targets[:3]), (student[0], teacher[0], targets[:1])]
    for given in wrong:
        with pytest.raises(ValueError, match=r"need logits \[B, C\] twice"):
            kd.distillation_loss(*given, 2.0, 0.5)


# ── Networks ──────────────────────────────────────────────────────────────
def shaken(network):
    """The network in evaluation mode, with batch statistics that are not 0 and 1."""
    with kd.seeded(0):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (*module.parameters(), *module.buffers()):
                    if tensor.is_floating_point():
                        tensor.data.uniform_(0.5, 1.5)
    return network.eval()


def test_custom_cnn_is_its_functional_recomputation():
    def layer(x, stride, groups):
        weight, scale, shift, mean, variance, _ = (next(values) for _ in range(6))
        x = F.conv2d(x, weight, None, stride, 1, groups=groups)
        return F.relu(F.batch_norm(x, mean, variance, scale, shift))

    with kd.seeded(1):
        network, x = shaken(kd.CustomCNN(7)), torch.randn(2, 3, 64, 64)
    values = iter(network.state_dict().values())
    found = network(x)
    for groups in (1, 1, 1, 1, 2):
        x = layer(x, 2, 1)
        x = x + layer(x, 1, groups)
    expected = F.linear(x.mean((2, 3)), next(values), next(values))
    assert expected.std() > 0.05 and torch.allclose(
        found, expected, rtol=1e-3, atol=1e-4
    )
    widths = [block.refine[0].out_channels for block in list(network)[:5]]
    assert widths == [32, 64, 128, 256, 512]
    assert 3.5e6 < sum(p.numel() for p in kd.CustomCNN(10).parameters()) < 3.6e6


def test_lenet_is_its_functional_recomputation_and_has_the_papers_sizes():
    with kd.seeded(1):
        network, x = kd.LeNet5(10), 3 * torch.randn(2, 3, 128, 128)
    values, found = list(network.parameters()), network(x)
    for weight, bias, size in zip(
        values[0:6:2], values[1:6:2], (14, 5, 1), strict=True
    ):
        x = F.adaptive_max_pool2d(F.conv2d(x, weight, bias).relu(), size)
        assert x.shape[2:] == (size, size)
    x = F.linear(x.flatten(1), values[6], values[7]).relu()
    assert torch.allclose(found, F.linear(x, values[8], values[9]), atol=1e-5)

    c1, c3, c5 = 6 * (3 * 25 + 1), 16 * (6 * 25 + 1), 120 * (16 * 25 + 1)
    f6, output = 84 * (120 + 1), 10 * (84 + 1)
    assert sum(value.numel() for value in values) == c1 + c3 + c5 + f6 + output


@pytest.mark.parametrize("size", [32, 97])
@pytest.mark.parametrize("build", kd.STUDENTS.values(), ids=kd.STUDENTS)
def test_students_take_images_of_any_size_from_32(build, size):
    assert build(num_classes=7).eval()(torch.zeros(2, 3, size, size)).shape == (2, 7)


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
    network, split = tiny(3), make_split(300)
    split.images = split.images[:, :, ::2]
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, 32, 32))  # statistics that are not 0 and 1
    before = copy.deepcopy(network)
    found = kd.predict(network.train(), split)
    assert torch.equal(found, kd.predict(network.train(), split))
    assert same(network, before) and not found.requires_grad
    expected = before.eval()(kd.normalise(split.images))
    assert found.shape == (300, 3) and torch.allclose(found, expected, atol=1e-5)


def test_prediction_is_float32_in_any_precision(float16):
    assert kd.predict(tiny(3), make_split(5)).dtype is torch.float32


# ── Teacher ───────────────────────────────────────────────────────────────
@pytest.fixture
def small_teacher(monkeypatch):
    monkeypatch.setattr(kd, "resnet50", resnet18)  # built alike, but quick


def test_teacher_is_torchvisions_resnet50():
    teacher = kd.build_teacher(10, None)
    assert sum(p.numel() for p in teacher.parameters()) == 25_557_032 - 990 * 2049


WRAPPINGS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 9, "state_dict": state},
    "model": lambda state: {"model": state, "best": 0.5},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_teacher_is_read_from_a_half_precision_file(small_teacher, tmp_path, wrap):
    source, path = resnet18(), tmp_path / "weights.pth"
    source.bn1.running_var[0] = 1e6  # too large for float16
    torch.save(wrap(source.half().state_dict()), path)
    teacher = kd.build_teacher(10, str(path))
    assert torch.equal(teacher.conv1.weight, source.conv1.weight.float())
    assert teacher.bn1.running_var[0] == 65504 and teacher.fc.out_features == 10
    assert sha256(path.read_bytes()).hexdigest() in teacher.origin


def test_bad_teacher_weights_are_named(small_teacher, tmp_path, monkeypatch):
    path = tmp_path / "foreign.pth"
    for content in ({"encoder.weight": torch.zeros(1)}, torch.zeros(1)):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"foreign\.pth"):
            kd.build_teacher(10, str(path))
    torch.save({"encoder.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"encoder\.weight"):
        kd.build_teacher(10, str(path))
    monkeypatch.setenv("KD_TEACHER_WEIGHTS", "no/such/file.pth")
    with pytest.raises(FileNotFoundError, match=r"no/such/file\.pth"):
        kd.choose_settings("imagewoof2-160", "small")  # at the start, not an hour later


def test_weights_that_cannot_be_fetched_are_explained(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match="no route to host.*KD_TEACHER_WEIGHTS"):
        kd.build_teacher(10, "IMAGENET1K_V1")
    path = tmp_path / "checkpoints" / "resnet50-0676ba61.pth"
    path.write_bytes(b"PK\3\4 cut")
    with pytest.raises(ValueError, match=f"{path}.* delete it"):
        kd.build_teacher(10, "IMAGENET1K_V1")


# ── Settings ──────────────────────────────────────────────────────────────
def test_profiles_and_folders_are_chosen_by_name(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("KD_PROFILE", "demo")
    monkeypatch.setenv("KD_RUNS_DIR", "~/kd")
    chosen = kd.choose_settings("imagenette2-160")
    assert (chosen.dataset, chosen.epochs, chosen.seeds) == ("demo", 3, (0, 1))
    assert "~" not in str(chosen.runs_dir) and chosen.teacher_weights is None
    own = kd.choose_settings(str(tmp_path / "demo"))
    assert own.dataset == str(tmp_path / "demo") and own.runs_dir.name == "demo-demo"
    small, full = (kd.choose_settings("a", profile) for profile in ("small", "full"))
    sizes = [
        (s.image_size, s.batch_size, len(s.seeds), s.epochs) for s in (small, full)
    ]
    assert sizes == [(96, 64, 3, 16), (128, 64, 5, 20)]
    assert ("No GPU" in capsys.readouterr().out) == (kd.DEVICE.type == "cpu")
    with pytest.raises(ValueError, match="'tpu' is none of full, small, demo"):
        kd.choose_settings("imagenette2-160", "tpu")


def test_precision_follows_the_hardware(monkeypatch):
    choose = kd.choose_precision.__wrapped__
    monkeypatch.setattr(kd, "DEVICE", torch.device("cuda"))
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        # An A100, and a T4, which says yes if emulation counts
        answer = lambda including_emulation=True, n=native: n or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
        assert choose() is expected


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_networks_compute_in_the_chosen_precision(exact, monkeypatch, precision):
    monkeypatch.setattr(kd, "choose_precision", lambda: precision)
    with kd.mixed_precision():
        assert tiny(3)(torch.zeros(2, 3, 32, 32)).dtype is precision
