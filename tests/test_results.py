"""Statistics against independent numbers; results from hand-made logits."""

import math
from dataclasses import replace
from statistics import mean, variance

import numpy as np
import pytest
import torch
from conftest import distilled, finish, label_loss, make_split, make_stage, tiny

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


# Gains [seeds, images], and their degrees of freedom
BOTH = np.array([[1.0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, -1]])
SEEDS = [(np.outer(np.arange(n), np.ones(200)), n - 1) for n in (2, 3, 5)]
FREEDOM = {4: 3, 11: 10, 46: 40, 900: 100}
IMAGES = [(np.outer(np.ones(3), np.arange(n) % 3), FREEDOM[n]) for n in FREEDOM]


@pytest.mark.parametrize("gains, freedom", [(BOTH, 3), *SEEDS, *IMAGES])
def test_interval_covers_the_luck_of_seeds_and_of_images(gains, freedom):
    seeds, images = ([mean(row) for row in rows.tolist()] for rows in (gains, gains.T))
    error = variance(seeds) / len(seeds) + variance(images) / len(images)
    half = student_quantile(freedom) * math.sqrt(error)
    expected = (mean(seeds), mean(seeds) - half, mean(seeds) + half)
    assert kd.interval(gains) == pytest.approx(expected, abs=1e-3 * half)


def test_verdict_follows_the_interval():
    gains = np.zeros((5, 134))
    assert kd.verdict(gains) == "inconclusive" and kd.interval(gains) == (0, 0, 0)
    gains[:, :3] = 1  # the seeds agree, but three images may be luck
    assert kd.verdict(gains) == kd.verdict(-gains) == "inconclusive"
    gains[:, :12] = 1
    assert kd.verdict(gains) == "helps" and kd.verdict(-gains) == "hurts"
    assert kd.verdict(gains[:1]) == kd.verdict(gains[:, :1]) == "inconclusive"
    assert np.isnan(kd.interval(gains[:, :0])).all()  # nothing is never seen
    gains[0], gains[1] = 1, -1  # the images agree, but the seeds do not
    assert kd.verdict(gains) == "inconclusive"


# ── Results ───────────────────────────────────────────────────────────────
VAL = make_split(24, seed=1)
RIGHT = {  # whose answers are right, by arm and seed: all different
    ("alone", 0): torch.arange(24) % 3 == 0,
    ("alone", 1): torch.arange(24) % 4 == 0,
    ("class mean", 0): torch.arange(24) % 2 == 0,
    ("class mean", 1): torch.arange(24) < 15,
    ("distilled", 0): torch.arange(24) > 6,
    ("distilled", 1): torch.arange(24) % 5 > 0,
}
LOGITS = {  # a right answer is the label, a wrong one the next class
    key: torch.eye(3)[(torch.arange(24) + ~right) % 3] * 4.0
    for key, right in RIGHT.items()
}


def make_study(settings, second=None, shift=0.0):
    """The files of a study; `shift` makes another teacher, which it does not report."""
    one = make_stage(settings)
    finish(one, LOGITS)
    build, once = {"ResNet-50": tiny}, replace(settings, seeds=(0,))
    learner = make_stage(once, {"teacher": label_loss}, "teacher", networks=build)
    finish(learner, {("teacher", 0): LOGITS["distilled", 1]})
    teacher = learner.students[0].network
    teacher[-1].bias.data += shift
    losses = {"class mean": distilled, "distilled": distilled}
    two = make_stage(second or settings, losses, "Experiment 2", teacher=teacher)
    finish(two, LOGITS)
    return one, two


def test_gains_are_paired_by_seed_and_have_the_right_sign(settings):
    _, two = make_study(settings)
    two.students.reverse()  # the order in a file must not matter
    two.save()
    results = kd.Results(settings.runs_dir, VAL)
    for arm, other in (("distilled", "alone"), ("alone", "class mean")):
        found = sorted(results.gains("tiny", arm, other).tolist())
        pairs = [(RIGHT[arm, seed], RIGHT[other, seed]) for seed in (0, 1)]
        assert found == sorted((a.int() - b.int()).tolist() for a, b in pairs)
    default, full = results.gains("tiny"), results.gains("tiny", "distilled", "alone")
    assert np.array_equal(default, full)
    assert np.array_equal(results.never_seen, np.arange(24) % 4 == 0)


def test_gains_take_the_common_seeds_and_any_metric(settings):
    make_study(settings)
    longer = make_stage(replace(settings, seeds=(1,)), {"longer": distilled}, name="x")
    finish(longer, {("longer", 1): 2 * LOGITS["distilled", 1]})
    results = kd.Results(settings.runs_dir, VAL)
    found = results.gains("tiny", "longer", "alone", lambda logits, _: logits.amax(1))
    assert found.tolist() == [[4.0] * 24]
    with pytest.raises(KeyError):
        results.gains("tiny", "taught")
    finish(make_stage(settings, name="once more"), LOGITS)
    with pytest.raises(ValueError, match=r"once more\.pt repeats tiny, alone"):
        kd.Results(settings.runs_dir, VAL)


def test_experiments_that_do_not_belong_together_are_refused(settings, monkeypatch):
    changes = {
        r"epochs was 2 and is 3": {"epochs": 3},
        r"peak learning rate was 0.004 and is 0.1": {"learning_rate": 0.1},
        r"seeds was \(0, 1\) and is \(0,\)": {"seeds": (0,)},
    }
    for told, change in changes.items():
        make_study(settings, replace(settings, **change))
        with pytest.raises(ValueError, match=f"Experiments 1 and 2 differ: {told}"):
            kd.Results(settings.runs_dir, VAL)
    make_study(settings, shift=0.5)
    with pytest.raises(ValueError, match="Experiment 2 had another teacher"):
        kd.Results(settings.runs_dir, VAL)
    make_study(settings)
    with pytest.raises(
        ValueError, match=r"Experiment 1\.pt was scored on other images"
    ):
        kd.Results(settings.runs_dir, make_split(24, seed=5))
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float64)
    finish(make_stage(settings), LOGITS)
    with pytest.raises(ValueError, match="precision was float64 and is "):
        kd.Results(settings.runs_dir, VAL)


def test_what_is_unfinished_damaged_or_a_trial_is_left_out(settings, capsys):
    one, two = make_study(settings)
    splits = (make_split(), make_split(24))
    finish(make_stage(settings, name="trials/x", splits=splits), LOGITS)
    two.path.write_bytes(b"damaged")
    torch.save({"foreign": 1}, settings.runs_dir / "mine.pt")
    results = kd.Results(settings.runs_dir, VAL)
    assert set(results.stages) == {"Experiment 1", "teacher"}
    assert "is no readable checkpoint" in capsys.readouterr().out
    assert (settings.runs_dir / "Experiment 2.pt.1").read_bytes() == b"damaged"
    one.seconds.pop()
    one.save()
    assert set(kd.Results(settings.runs_dir, VAL).stages) == {"teacher"}
