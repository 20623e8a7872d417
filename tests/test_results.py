"""Statistics against independent numbers; results from hand-made logits."""

import math
from dataclasses import replace
from statistics import mean, variance

import numpy as np
import pytest
import torch
from conftest import (
    LOGITS,
    RIGHT,
    VAL,
    distilled,
    finish,
    make_split,
    make_stage,
    make_study,
)

import kd_utils as kd


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
    number = range(freedom + 1)
    in_table = freedom if freedom < 10 else min(freedom // 10 * 10, 100)
    half = student_quantile(in_table) * math.sqrt(variance(number) / len(number))
    expected = mean(number), mean(number) - half, mean(number) + half
    gains = np.outer(number, np.ones(5))
    for found in (kd.interval(gains), kd.interval(gains.T)):
        assert found == pytest.approx(expected, abs=1e-3 * freedom)


def test_interval_adds_up_and_a_verdict_follows_it():
    gains = np.array([[1.0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, -1]])
    seeds, images = ([mean(row) for row in rows.tolist()] for rows in (gains, gains.T))
    error = math.sqrt(variance(seeds) / 3 + variance(images) / 4)
    low, high = kd.interval(gains)[1:]
    assert (high - low) / 2 == pytest.approx(student_quantile(3) * error, rel=1e-3)

    gains = np.zeros((5, 134))
    assert kd.verdict(gains) == "inconclusive" and kd.interval(gains) == (0, 0, 0)
    gains[:, :3] = 1  # the seeds agree, but three images may be luck
    assert kd.verdict(gains) == kd.verdict(-gains) == "inconclusive"
    gains[:, :12] = 1
    assert kd.verdict(gains) == "helps" and kd.verdict(-gains) == "hurts"
    assert kd.verdict(gains[:1]) == kd.verdict(gains[:, :1]) == "inconclusive"
    assert np.isnan(kd.interval(gains[:, :0])).all()  # nothing is never seen


# ── Results ───────────────────────────────────────────────────────────────
def test_gains_are_paired_by_seed_and_take_any_metric(settings):
    make_study(settings)
    longer = make_stage(replace(settings, seeds=(1,)), {"longer": distilled}, name="x")
    finish(longer, {("longer", 1): 2 * LOGITS["distilled", 1]})
    results = kd.Results(settings.runs_dir, VAL)
    for arm, other in (("distilled", "alone"), ("alone", "class mean")):
        pairs = [(RIGHT[arm, seed], RIGHT[other, seed]) for seed in (1, 0)]
        expected = sorted((a.int() - b.int()).tolist() for a, b in pairs)
        assert sorted(results.gains("tiny", arm, other).tolist()) == expected
    assert np.array_equal(results.gains("tiny"), results.gains("tiny", "distilled"))
    found = results.gains("tiny", "longer", "alone", lambda logits, _: logits.amax(1))
    assert found.tolist() == [[4.0] * 24]  # of the seed that both have
    assert np.array_equal(results.never_seen, np.arange(24) % 4 == 0)
    with pytest.raises(KeyError):
        results.gains("tiny", "taught")
    finish(make_stage(settings, name="once more"), LOGITS)
    with pytest.raises(ValueError, match=r"once more\.pt repeats tiny, alone"):
        kd.Results(settings.runs_dir, VAL)


def test_experiments_that_do_not_belong_together_are_refused(settings, monkeypatch):
    def assert_refused(told, val=VAL):
        with pytest.raises(ValueError, match=told):
            kd.Results(settings.runs_dir, val)

    make_study(settings, replace(settings, learning_rate=0.1))
    assert_refused(
        "Experiments 1 and 2 differ: peak learning rate was 0.004 and is 0.1"
    )
    make_study(settings, shift=0.5)
    assert_refused("Experiment 2 had another teacher")
    make_study(settings)
    assert_refused(
        r"Experiment 1\.pt was scored on other images", make_split(24, seed=5)
    )
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float64)
    finish(make_stage(settings), LOGITS)
    assert_refused("precision was float64 and is ")


def test_what_is_unfinished_damaged_or_a_trial_is_left_out(settings, capsys):
    one, two = make_study(settings)
    splits = (make_split(), make_split(24))
    finish(make_stage(settings, name="trials/x", splits=splits), LOGITS)
    two.path.write_bytes(b"damaged")
    torch.save({"foreign": 1}, settings.runs_dir / "mine.pt")
    one.seconds.pop()
    one.save()
    assert set(kd.Results(settings.runs_dir, VAL).stages) == {"teacher"}
    assert "is no readable checkpoint" in capsys.readouterr().out
    assert (settings.runs_dir / "Experiment 2.pt.1").read_bytes() == b"damaged"
