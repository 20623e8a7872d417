"""The report: tables and sentences from made-up records, worked out by hand."""

import json
from dataclasses import replace

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")

import kd_utils as kd
from test_training import TRAINING, cohort, tiny_teacher, torch, train  # noqa: F401, a fixture


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path))
    return kd.Run("imagewoof2-160", "demo")


def record(run, experiment, train, seeds=(0, 1)):
    teacher = tiny_teacher() if experiment == "experiment2" else None
    students = cohort("alone" if teacher is None else "distilled", seeds=seeds)
    run.save(experiment, students, train, TRAINING, teacher, **({"temperature": 2.0, "alpha": 0.5} if teacher else {}))


def test_report_says_what_is_missing(run, train):
    assert "Experiment 1 and Experiment 2: not run yet" in kd.report_table(run) and "No experiment" in kd.report_verdict(run)
    record(run, "experiment2", train)
    assert "Experiment 1: not run yet" in kd.report_table(run) and "no verdict" in kd.report_verdict(run)
    record(run, "experiment1", train)
    assert "not run" not in kd.report_table(run) and "LeNet-5: inconclusive" in kd.report_verdict(run)


def test_report_is_made_from_the_records(run, train):
    record(run, "experiment1", train), record(run, "experiment2", train)
    for experiment, accuracies in (("experiment1", (0.50, 0.60)), ("experiment2", (0.53, 0.62))):
        path = run.folder / f"{experiment}.json"
        content = json.loads(path.read_text())
        for student, accuracy in zip(content["students"], accuracies):
            student["accuracy"] = accuracy
        path.write_text(json.dumps(content))
    # gains 3 and 2 points: mean 2.5, sd 0.7071, half width 12.706 · 0.7071 / √2 = 6.353
    assert "| LeNet-5 | 55.0 [0.0, 100.0] | 57.5 [0.3, 100.0] | +2.5 [-3.9, +8.9] | 2 of 2 |" in kd.report_table(run)
    assert "+2.5 points on average (standard deviation 0.7); it was better with 2 of 2 seeds" in kd.report_verdict(run)
    table = kd.provenance_table(run)
    assert "random initialisation" in table and torch.__version__ in table and "| temperature | — | 2.0 |" in table
    kd.plot_report(run)


def test_experiments_that_do_not_compare_are_refused(run, train):
    record(run, "experiment1", train), record(run, "experiment2", train)
    path = run.folder / "experiment1.json"
    path.write_text(path.read_text().replace('"epochs": 2', '"epochs": 20'))
    with pytest.raises(ValueError, match="do not compare.*epochs: 20 / 2"):
        kd.report_table(run)


def write(run, accuracies, confusions=None, **more):
    """Records {arm: [an accuracy per seed]} as `Run.save` would, for a teacher and three classes of ten images."""
    confusion = [[8, 2, 0], [0, 9, 1], [0, 0, 10]]
    for number, arms in (("1", ("alone", "smoothed")), ("2", ("distilled", "shuffled", "arg-max"))):
        students = [
            {"name": "LeNet-5", "arm": arm, "seed": seed, "accuracy": accuracy, "predicted": [0, 1, 2, 2], "nll": 1.0, "ece": 0.1, "temperature": 1.0,
             "fitted_nll": 1.0, "fitted_ece": 0.1, "never_seen_accuracy": 0.5, "confusion": (confusions or {}).get(arm, confusion), **more.get(arm, {})}
            for arm in arms for seed, accuracy in enumerate(accuracies.get(arm, []))
        ]  # fmt: skip
        teacher = {"accuracy": 0.9, "predicted": [0, 1, 2, 0], "confusion": confusion, "never_seen_accuracy": 0.8, "never_seen_images": 2}
        record = {"ran on": {}, "settings": {}, "students": students, "stopped": [], "teacher": teacher if number == "2" else None}
        kd._write_json(run.folder / f"experiment{number}.json", record)


ALONE = [0.50, 0.52, 0.54]


@pytest.mark.parametrize(
    "distilled, word, share", [([0.53, 0.56, 0.58], "helps", "3 of 3"), ([0.47, 0.48, 0.50], "hurts", "0 of 3"), ([0.55, 0.49, 0.55], "inconclusive", "2 of 3")]
)
def test_three_outcomes(run, distilled, word, share):
    write(run, {"alone": ALONE, "distilled": distilled})
    text = kd.report_verdict(run)
    assert f"LeNet-5: {word}." in text and kd.REASONS[word] in text and f"better with {share} seeds" in text
    assert kd.report_table(run).endswith(f"| {share} |") and "single image" not in text  # no controls, no word about them


CONTROLS = {"smoothed": [0.50, 0.53, 0.54], "arg-max": [0.51, 0.52, 0.55], "shuffled": [0.52, 0.54, 0.56]}


def test_knowledge_is_shown_where_distilled_beats_everything(run):
    write(run, {"alone": ALONE, "distilled": [0.56, 0.58, 0.61], **CONTROLS})
    assert "Yes, as far as the controls can tell: distilled was better than smoothed, better than arg-max, better than shuffled." in kd.report_verdict(run)


def test_knowledge_is_not_shown_where_a_control_does_as_well(run):
    write(run, {"alone": ALONE, "distilled": [0.56, 0.58, 0.61], **CONTROLS, "shuffled": [0.57, 0.57, 0.61], "arg-max": [0.60, 0.62, 0.641]})
    text = kd.report_verdict(run)
    assert "LeNet-5: helps" in text
    assert "Not shown: distilled was better than smoothed, worse than arg-max, not told apart from shuffled." in text


def test_knowledge_is_not_shown_where_distillation_does_not_help(run):
    write(run, {"alone": [0.60, 0.50, 0.55], "distilled": [0.56, 0.58, 0.61], **CONTROLS})
    text = kd.report_verdict(run)
    assert "LeNet-5: inconclusive" in text and "Not shown: " in text and text.endswith("and no gain over alone is established.")


def test_controls_table_by_hand(run):
    write(run, {"alone": ALONE, "distilled": [0.53, 0.56, 0.58], **CONTROLS})
    rows = kd.controls_table(run).splitlines()[2:]
    # shuffled over alone: 2 points with every seed, so no interval; distilled over it: 1, 2, 2: mean 1.667, sd 0.577, half width 1.434
    assert rows[2] == "| LeNet-5 | shuffled | 54.0 [49.0, 59.0] | +2.0 [no interval] | +1.7 [+0.2, +3.1] | better than it |"
    assert [row.split(" | ")[1] for row in rows] == ["smoothed", "arg-max", "shuffled", "distilled"] and rows[3].endswith("| — | — |")


def test_controls_table_says_where_there_are_none(run):
    write(run, {"alone": ALONE, "distilled": ALONE})
    assert "profile `demo` leaves them out" in kd.controls_table(run)


def test_calibration_is_compared_by_seed(run):
    write(run, {"alone": ALONE, "distilled": ALONE}, distilled={"fitted_nll": 0.9, "ece": 0.15})
    rows = kd.calibration_table(run).splitlines()[2:]
    assert rows[1] == "| LeNet-5 | distilled | 1.000 | 0.150 | 1.000 | 0.900 | 0.100 |" and "| +0.050 | +0.000 | -0.100 |" in rows[2]


def test_likeness_by_hand(run):
    assert kd.confusion_likeness([[8, 2], [4, 6]], [[9, 1], [2, 8]]) == pytest.approx(1)  # rates .2 .4 and .1 .2
    assert kd.confusion_likeness([[8, 2], [1, 9]], [[9, 1], [2, 8]]) == pytest.approx(-1)
    assert np.isnan(kd.confusion_likeness([[5, 5], [5, 5]], [[9, 1], [2, 8]]))
    like, unlike = [[8, 2, 0], [0, 9, 1], [0, 0, 10]], [[8, 0, 2], [1, 9, 0], [1, 0, 9]]
    write(run, {"alone": ALONE, "distilled": ALONE}, {"distilled": like, "alone": unlike}, alone={"predicted": [1, 1, 1, 1]})
    rows = kd.likeness_table(run).splitlines()[2:]
    assert rows[0].startswith("| LeNet-5 | alone | 0.250 |") and rows[1].startswith("| LeNet-5 | distilled | 0.750 | 1.000 |")
    assert rows[2].startswith("| LeNet-5 | difference | +0.500 |") and rows[3] == "| ResNet-50 | teacher | — | — | 0.900 | 0.800 |"


def test_confusions_are_named_and_judged(run):
    unlike = [[[8, 0, 2], [1, 9, 0], [1, 0, 9]], [[8, 0, 2], [2, 8, 0], [1, 0, 9]], [[8, 0, 2], [1, 9, 0], [0, 0, 10]]]
    write(run, {"alone": ALONE, "distilled": ALONE})
    path = run.folder / "experiment1.json"
    content = json.loads(path.read_text())
    for student, confusion in zip(content["students"], unlike):
        student["confusion"] = confusion
    path.write_text(json.dumps(content))
    text = kd.report_confusions(run)
    assert "disc taken for ring (2 of 10); ring taken for square (1 of 10)" in text  # the first three classes of demo
    assert "distilled, it errs more like the teacher" in text


def test_predecessor_only_beside_its_own_dataset(run):
    write(run, {"alone": ALONE, "distilled": ALONE})
    assert "nothing to compare" in kd.predecessor_table(run)
    run.dataset = "imagenette2-160"
    text = kd.predecessor_table(run)
    assert "| LeNet-5 | 72.2 | 71.1 | -1.1 | 52.0" in text and "not comparable: 64 px instead of 160" in text


def test_one_experiment_or_none_draws_and_tells(run, train):  # noqa: F811
    for experiment in (None, "experiment2"):
        if experiment:
            record(run, experiment, train)
        for part in (kd.controls_table, kd.calibration_table, kd.likeness_table, kd.report_confusions, kd.search_table):
            assert part(run)
        for plot in (kd.plot_report, kd.plot_classes, kd.plot_reliability, kd.plot_search):
            plot(run)


def test_scores_with_a_fitted_temperature(run, train):  # noqa: F811
    students = cohort(seeds=(0, 1))
    run.save("experiment1", students, train, TRAINING, selection=train)
    saved = run.load("experiment1")["students"][0]
    logits = kd.predict(students[0].model, train)
    assert saved["temperature"] == kd.fit_temperature(logits, train.targets)
    assert saved["fitted_nll"] == kd.metrics(logits / saved["temperature"], train.targets)["nll"] <= saved["nll"]
    assert saved["predicted"] == logits.argmax(1).tolist() and torch.tensor(saved["reliability"])[:, 0].sum() == len(train)


def test_search_treats_both_arms_alike_and_spares_val(run, train, monkeypatch):  # noqa: F811
    monkeypatch.setattr(kd, "STUDENTS", {"LeNet-5": kd.LeNet5})
    monkeypatch.setattr(kd, "build_teacher", lambda classes, weights: Headed())
    calls, fit = [], kd.fit
    monkeypatch.setattr(kd, "fit", lambda students, *args, **settings: calls.append((students, args, settings)) or fit(students, *args, **settings))
    run.profile = replace(run.profile, search=("as chosen", "lr ÷ 2", "epochs ÷ 2", "milder crops"))
    rows = kd.search(run, train, TRAINING, temperature=2.0, alpha=0.5, temperatures=(1.0, 2.0), alphas=(0.5, 0.9))
    rest, selection = kd.selection_split(train)
    assert all((args[0].files, args[1].files) == (rest.files, selection.files) for _, args, _ in calls)
    tried = [(row["arm"], row["variation"], row.get("temperature"), row.get("alpha")) for row in rows]
    for variation in run.profile.search:
        assert tried.count(("alone", variation, None, None)) == tried.count(("distilled", variation, 2.0, 0.5)) == 1
    assert len(tried) == 8 + 3  # and the rest of the grid
    cohorts = {(settings["epochs"], settings["min_crop"]): [s.lr for s in students] for students, _, settings in calls[1:]}
    assert cohorts == {(2, 0.35): [2e-3] * 5 + [1e-3] * 2, (1, 0.35): [2e-3] * 2, (2, 0.6): [2e-3] * 2}
    assert all(student.seed == 100 for students, _, _ in calls[1:] for student in students)
    assert run.load("search")["trials"] == rows and "| LeNet-5 | lr ÷ 2 |" in kd.search_table(run)
    kd.plot_search(run)


class Headed(torch.nn.Module):
    """A teacher small enough for a test."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def test_no_dropout_concerns_the_custom_cnn_alone():
    assert list(kd._vary({"dropout": 0.0})) == ["Custom CNN"] and kd._vary({"lr": 2}) is kd.STUDENTS
    assert kd._vary({"dropout": 0.0})["Custom CNN"](10).head[0].p == 0
