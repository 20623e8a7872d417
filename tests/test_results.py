"""Statistics against independent numbers; results from hand-made logits."""

import math
from dataclasses import replace
from statistics import mean, variance

import conftest as kit
import numpy as np
import pytest
import torch
from conftest import distilled, finish, make_split, make_stage, tiny

import kd_utils as kd


# ── Statistics ────────────────────────────────────────────────────────────
def test_table_holds_students_quantiles():
    table = dict(zip(range(1, 10), kd.T_UNITS, strict=True))
    table |= dict(zip(range(10, 101, 10), kd.T_TENS, strict=True))
    for freedom, quantile in table.items():
        assert quantile == pytest.approx(kit.student_quantile(freedom), abs=1e-3)


@pytest.mark.parametrize("gains, freedom", kit.GAINS)
def test_interval_covers_the_luck_of_seeds_and_of_images(gains, freedom):
    seeds, images = ([mean(row) for row in rows.tolist()] for rows in (gains, gains.T))
    error = variance(seeds) / len(seeds) + variance(images) / len(images)
    half = kit.student_quantile(freedom) * math.sqrt(error)
    expected = (mean(seeds), mean(seeds) - half, mean(seeds) + half)
    assert kd.interval(gains) == pytest.approx(expected, abs=1e-3 * half)


def test_verdict_follows_the_interval():
    gains = np.zeros((5, 134))
    assert kd.verdict(gains) == "inconclusive"
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


def test_gains_are_paired_by_seed_and_have_the_right_sign(settings):
    _, two = kit.make_study(settings)
    two.students.reverse()  # the order in a file must not matter
    two.save()
    results = kd.Results(settings, VAL)
    for arm, other in (("distilled", "alone"), ("alone", "class mean")):
        found = sorted(results.gains("tiny", arm, other).tolist())
        pairs = [(kit.RIGHT[arm, seed], kit.RIGHT[other, seed]) for seed in (0, 1)]
        assert found == sorted((a.int() - b.int()).tolist() for a, b in pairs)
    default, full = results.gains("tiny"), results.gains("tiny", "distilled", "alone")
    assert np.array_equal(default, full) and results.missing == []
    assert torch.equal(results.teacher, kit.LOGITS["distilled", 1])
    assert np.array_equal(results.never_seen, np.arange(24) % 4 == 0)


def test_gains_take_the_common_seeds_and_any_metric(settings):
    kit.make_study(settings)
    longer = make_stage(replace(settings, seeds=(1,)), {"longer": distilled}, name="x")
    finish(longer, {("longer", 1): 2 * kit.LOGITS["distilled", 1]})
    results = kd.Results(settings, VAL)
    found = results.gains("tiny", "longer", "alone", lambda logits, _: logits.amax(1))
    assert found.tolist() == [[4.0] * 24]
    with pytest.raises(KeyError):
        results.gains("tiny", "taught")


def test_experiments_that_do_not_belong_together_are_refused(settings, monkeypatch):
    changes = {
        r"epochs was 2 and is 3": {"epochs": 3},
        r"peak learning rate was 0.004 and is 0.1": {"learning_rate": 0.1},
        r"seeds was \(0, 1\) and is \(0,\)": {"seeds": (0,)},
    }
    for told, change in changes.items():
        kit.make_study(settings, replace(settings, **change))
        with pytest.raises(ValueError, match=f"Experiments 1 and 2 differ: {told}"):
            kd.Results(settings, VAL)
    kit.make_study(settings, shift=0.5)
    with pytest.raises(ValueError, match="Experiment 2 had another teacher"):
        kd.Results(settings, VAL)
    kit.make_study(settings)
    with pytest.raises(ValueError, match="Experiment 1: scored on other images"):
        kd.Results(settings, make_split(24, seed=5))
    monkeypatch.setattr(kd, "choose_precision", lambda: torch.float64)
    finish(make_stage(settings), kit.LOGITS)
    with pytest.raises(ValueError, match="precision was float64 and is "):
        kd.Results(settings, VAL)


def test_what_is_missing_unfinished_damaged_or_a_trial_is_left_out(settings, capsys):
    assert kd.Results(settings, VAL).missing == ["Experiment 1", "Experiment 2"]
    one, two = kit.make_study(settings)
    trial = make_stage(settings, splits=(make_split(), make_split(24)), name="trial")
    finish(trial, kit.LOGITS)
    two.path.write_bytes(b"damaged")
    results = kd.Results(settings, VAL)
    assert results.missing == ["Experiment 2"] and "trial" not in results.stages
    assert list(results.students) == [("tiny", "alone")]
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
