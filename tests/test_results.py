"""Statistics against independent numbers; results from hand-made logits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import distilled, finish, make_split, make_stage, tiny

import kd_utils as kd


# ── Statistics ────────────────────────────────────────────────────────────
def student_quantile(freedom):
    """The 97.5 % quantile of Student's t, by adding up its density."""
    x = np.arange(0, 20, 1e-4) + 5e-5
    gammas = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    density *= math.exp(gammas) / math.sqrt(math.pi * freedom)
    return x[np.searchsorted(np.cumsum(density) * 1e-4, 0.475)]


def test_table_holds_students_quantiles():
    table = dict(zip(range(1, 10), kd.T_UNITS, strict=True))
    table |= dict(zip(range(10, 101, 10), kd.T_TENS, strict=True))
    for freedom, quantile in table.items():
        assert quantile == pytest.approx(student_quantile(freedom), abs=1e-3)


@pytest.mark.parametrize("count, quantile", [(2, 12.706), (3, 4.303), (5, 2.776)])
def test_interval_of_seeds_alone_is_students(count, quantile):
    by_seed = np.arange(count) / 100  # each image gains the same
    spread = quantile * by_seed.std(ddof=1) / math.sqrt(count)
    mean, low, high = kd.interval(np.repeat(by_seed[:, None], 400, axis=1))
    expected = (by_seed.mean(), by_seed.mean() - spread, by_seed.mean() + spread)
    assert (mean, low, high) == pytest.approx(expected)


@pytest.mark.parametrize("count, freedom", [(4, 3), (11, 10), (46, 40), (900, 100)])
def test_interval_of_images_alone_is_students(count, freedom):
    by_image = np.arange(count) % 3 - 0.5  # each seed gains the same
    spread = student_quantile(freedom) * by_image.std(ddof=1) / math.sqrt(count)
    _, low, high = kd.interval(np.repeat(by_image[None], 3, axis=0))
    expected = (by_image.mean() - spread, by_image.mean() + spread)
    assert (low, high) == pytest.approx(expected, rel=1e-3)


def test_interval_of_both_adds_their_variances():
    gains = np.array([[1.0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, -1]])
    seeds, images = np.array([0.5, 0.25, 0.5]), np.array([2, 1, 3, -1]) / 3
    first = ((seeds - 5 / 12) ** 2).sum() / 2 / 3
    second = ((images - 5 / 12) ** 2).sum() / 3 / 4
    freedom = (first + second) ** 2 / (first**2 / 2 + second**2 / 3)
    assert 3 < freedom < 4  # and so 3
    spread = student_quantile(3) * math.sqrt(first + second)
    expected = (5 / 12, 5 / 12 - spread, 5 / 12 + spread)
    assert kd.interval(gains) == pytest.approx(expected, rel=1e-3)


def test_interval_needs_two_seeds_and_two_images():
    for shape in ((1, 50), (50, 1), (1, 1)):
        mean, low, high = kd.interval(np.full(shape, 0.5))
        assert mean == 0.5 and math.isnan(low) and math.isnan(high)
        assert kd.verdict(np.full(shape, 0.5)) == "inconclusive"
    assert np.isnan(kd.interval(np.zeros((3, 0)))).all()


def test_verdict_follows_the_interval():
    gains = np.zeros((5, 134))
    assert kd.verdict(gains) == "inconclusive"
    gains[:, :3] = 1  # the seeds agree, but three images may be luck
    assert kd.interval(gains)[0] == pytest.approx(3 / 134)
    assert kd.verdict(gains) == kd.verdict(-gains) == "inconclusive"
    gains[:, :12] = 1
    assert kd.verdict(gains) == "helps" and kd.verdict(-gains) == "hurts"
    gains[0], gains[1] = 1, -1  # the images agree, but the seeds do not
    assert kd.verdict(gains) == "inconclusive"


# ── Results ───────────────────────────────────────────────────────────────
VAL = make_split(24, seed=1)
TARGETS = VAL.targets.cpu()
ARMS = ("alone", "class mean", "distilled")
# Whose answers are right: by arm and seed, and all of them different
CHANCE = torch.Generator().manual_seed(0)
RIGHT = {
    (arm, seed): torch.rand(24, generator=CHANCE) < 0.3 + 0.2 * index + 0.1 * seed
    for index, arm in enumerate(ARMS)
    for seed in (0, 1)
}
LOGITS = {  # a right answer is the label, a wrong one the next class
    key: torch.eye(3)[(TARGETS + ~right) % 3] * 4.0 for key, right in RIGHT.items()
}


def study(settings, first=None, second=None, shift=0.0):
    """The files of a study; `shift` makes another teacher, which it does not report."""
    one = make_stage(first or settings)
    finish(one, LOGITS)
    learner = make_stage(replace(settings, seeds=(9,)), name="teacher")
    finish(learner, {("alone", 9): LOGITS["distilled", 1]})
    teacher = learner.students[0].network.eval().requires_grad_(False)
    teacher[-1].bias += shift
    losses = {"class mean": distilled, "distilled": distilled}
    two = make_stage(second or settings, losses, teacher, name="Experiment 2")
    finish(two, LOGITS)
    return one, two


def test_gains_are_paired_by_seed_and_have_the_right_sign(settings):
    _, two = study(settings)
    two.students.reverse()  # the order in a file must not matter
    two.save()
    results = kd.Results(settings, VAL)
    for arm, other in (("distilled", "alone"), ("alone", "class mean")):
        found = results.gains("tiny", arm, other)
        pairs = [RIGHT[arm, s].float() - RIGHT[other, s].float() for s in (0, 1)]
        assert sorted(found.tolist()) == sorted(pair.tolist() for pair in pairs)
        assert found.any(axis=1).all() and found.shape == (2, 24)
    default = results.gains("tiny")
    assert np.array_equal(default, results.gains("tiny", "distilled", "alone"))
    assert results.missing == [] and torch.equal(
        results.teacher, LOGITS["distilled", 1]
    )
    assert np.array_equal(results.never_seen, np.arange(24) % 4 == 0)


def test_gains_take_the_common_seeds_and_any_metric(settings):
    def certainty(logits, targets):
        return logits.softmax(1)[torch.arange(24), targets]

    study(settings)
    longer = make_stage(replace(settings, seeds=(1,)), name="alone, longer")
    finish(longer, {("alone", 1): 2 * LOGITS["distilled", 1]})
    longer.students[0].arm = "longer"
    longer.save()
    found = kd.Results(settings, VAL).gains("tiny", "longer", "alone", certainty)
    sure, unsure, wrong = (math.exp(x) / (math.exp(x) + 2) for x in (8, 4, 0))
    assert found.shape == (1, 24) and sure > unsure > wrong
    right = RIGHT["distilled", 1] & RIGHT["alone", 1]
    assert found[0][right.numpy()] == pytest.approx(sure - unsure, rel=1e-3)
    with pytest.raises(KeyError):
        kd.Results(settings, VAL).gains("tiny", "taught")


CHANGES = {
    "epochs was 2 and is 3": {"epochs": 3},
    "peak learning rate was 0.004 and is 0.1": {"learning_rate": 0.1},
    r"seeds was \(0, 1\) and is \(0,\)": {"seeds": (0,)},
}


@pytest.mark.parametrize("told, change", CHANGES.items())
def test_experiments_that_do_not_compare_are_refused(settings, told, change):
    study(settings, second=replace(settings, **change))
    with pytest.raises(ValueError, match=f"Experiments 1 and 2 differ: {told}"):
        kd.Results(settings, VAL)


def test_experiments_of_other_precision_teacher_or_images_are_refused(
    settings, monkeypatch
):
    other = make_split(24, seed=5)
    study(settings)
    with pytest.raises(ValueError, match="Experiment 1 was scored on other images"):
        kd.Results(settings, other)
    study(settings, shift=0.5)
    with pytest.raises(ValueError, match="Experiment 2 had another teacher"):
        kd.Results(settings, VAL)
    study(settings)
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float64)
    finish(make_stage(settings), LOGITS)
    with pytest.raises(ValueError, match="precision was float64 and is "):
        kd.Results(settings, VAL)


def test_what_is_missing_unfinished_damaged_or_a_trial_is_left_out(settings, capsys):
    assert kd.Results(settings, VAL).missing == ["Experiment 1", "Experiment 2"]
    one, two = study(settings)
    trial = make_stage(settings, splits=(make_split(), make_split(24)), name="trial")
    finish(trial, LOGITS)
    two.path.write_bytes(b"damaged")
    results = kd.Results(settings, VAL)
    assert results.missing == ["Experiment 2"] and list(results.students) == [
        ("tiny", "alone")
    ]
    assert "is no readable checkpoint" in capsys.readouterr().out
    assert (settings.runs_dir / "Experiment 2.pt.1").read_bytes() == b"damaged"
    one.seconds.pop()
    one.save()
    assert kd.Results(settings, VAL).missing == ["Experiment 1", "Experiment 2"]


def test_portable_network_gives_the_probabilities_of_its_answers(exact):
    network, val = tiny(3).eval(), make_split(24)
    found = kd.Portable(network)(val.images)
    expected = kd.predict(network, val).exp()
    expected /= expected.sum(1, keepdim=True)
    assert found.shape == (24, 3) and torch.allclose(found, expected, atol=1e-5)
