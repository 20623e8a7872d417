"""Loss and networks against independent calculations; settings and the teacher."""

import copy
import math
from hashlib import sha256

import conftest as kit
import pytest
import torch
import torch.nn.functional as F
from conftest import make_split, make_stage, same, tiny
from torchvision.models import resnet18

import kd_utils as kd

# ── Loss ──────────────────────────────────────────────────────────────────
CASES = [(1.0, 0.5), (2.0, 0.5), (4.0, 0.9), (8.0, 1.0), (2.0, 0.0)]


@pytest.mark.parametrize("temperature, alpha", CASES)
def test_loss_and_gradient_are_those_of_the_definition(logits, temperature, alpha):
    student, teacher, targets = logits
    student.requires_grad_()
    teacher.requires_grad_()
    found = kd.distillation_loss(student, teacher, targets, temperature, alpha)
    expected = kit.by_the_definition(*logits, temperature, alpha)
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
def test_networks_are_their_functional_recomputations_with_the_papers_sizes():
    with kd.seeded(1):
        lenet, custom = kd.LeNet5(10), kit.shaken(kd.CustomCNN(10))
        small, odd = 3 * torch.randn(2, 3, 32, 32), torch.randn(2, 3, 97, 97)
    assert torch.allclose(lenet(small), kit.lenet_by_functions(lenet, small), atol=1e-5)
    expected = kit.custom_by_functions(custom, odd)
    assert torch.allclose(custom(odd), expected, rtol=1e-3, atol=1e-4)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (lenet, custom)]
    c1, c3, c5 = 6 * (3 * 25 + 1), 16 * (6 * 25 + 1), 120 * (16 * 25 + 1)
    assert sizes[0] == c1 + c3 + c5 + 84 * (120 + 1) + 10 * (84 + 1)
    assert 3.5e6 < sizes[1] < 3.6e6


def test_custom_cnn_drops_a_fifth_of_its_features_in_training_only():
    network, seen = kit.shaken(kd.CustomCNN()), []
    network[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(8, 3, 64, 64)
    network(images)
    network[-2].train()
    network(images)
    dropped = (seen[1] == 0)[seen[0] != 0]
    assert len(dropped) > 3000 and 0.17 < dropped.float().mean() < 0.23


def test_prediction_is_repeatable_and_changes_nothing(exact):
    network, split = kit.shaken(tiny(3)), make_split(300)
    before = copy.deepcopy(network)
    found = kd.predict(network.train(), split)
    assert torch.equal(found, kd.predict(network.train(), split))
    assert same(network, before) and not found.requires_grad
    expected = before.eval()(kd.normalise(split.images))
    assert found.shape == (300, 3) and torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_networks_have_the_precision(exact, settings, monkeypatch, precision):
    monkeypatch.setattr(kd, "choose_precision", lambda: precision)
    student = make_stage(settings).students[0]
    student.is_open = True
    assert student.forward(torch.zeros(2, 3, 32, 32)).dtype is precision
    assert student.scaler.is_enabled() == (precision is torch.float16)
    assert kd.predict(student.network, make_split(5)).dtype is torch.float32


def test_precision_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(kd, "DEVICE", torch.device("cuda"))
    # An A100, and a T4, which says yes if emulation counts
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        answers = {True: True, False: native}
        answer = lambda including_emulation=True, of=answers: of[including_emulation]  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
        assert kd.choose_precision.__wrapped__() is expected


# ── Teacher and settings ──────────────────────────────────────────────────
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
    monkeypatch.setenv("KD_TEACHER_WEIGHTS", "no/such/file.pth")
    with pytest.raises(FileNotFoundError, match=r"no/such/file\.pth"):
        kd.choose_settings("imagewoof2-160", "small")  # at the start, not an hour later


def test_profiles_and_folders_are_chosen_by_name(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("KD_PROFILE", "demo")
    monkeypatch.setenv("KD_RUNS_DIR", "~/kd")
    chosen = kd.choose_settings("imagenette2-160")
    assert (chosen.dataset, chosen.epochs, chosen.seeds) == ("demo", 3, (0, 1))
    assert "~" not in str(chosen.runs_dir) and chosen.teacher_weights is None
    own = kd.choose_settings(str(tmp_path / "demo"))
    assert own.dataset == str(tmp_path / "demo") and own.runs_dir.name == "demo-demo"
    small, full = (kd.choose_settings("a", profile) for profile in ("small", "full"))
    assert (small.image_size, len(small.seeds), small.epochs) == (96, 3, 16)
    assert (full.image_size, len(full.seeds), full.epochs) == (128, 5, 20)
    assert ("No GPU" in capsys.readouterr().out) == (kd.DEVICE.type == "cpu")
    with pytest.raises(ValueError, match="'tpu' is none of full, small, demo"):
        kd.choose_settings("imagenette2-160", "tpu")
