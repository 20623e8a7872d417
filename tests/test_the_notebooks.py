"""The two notebooks: alike, clean, and able to run top to bottom, also in parts."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import (
    ANSWERS,
    NETTE,
    RIGHT,
    ROOT,
    VAL,
    WOOF,
    code_cells,
    make_split,
    make_study,
    read,
    run_cells,
    smaller,
    text_of,
)
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import Markdown
from PIL import Image, ImageDraw
from torch import nn

import kd_utils as kd


# ── As they are committed ─────────────────────────────────────────────────
def test_imagenettes_code_is_in_order_a_part_of_imagewoofs():
    woof, nette = iter(code_cells(WOOF)), code_cells(NETTE)
    [own] = [source for source in nette if 'DATASET = "imagenette2-160"' in source]
    nette.remove(own)
    assert all(source in woof for source in nette)  # `in` moves the iterator on


@pytest.mark.parametrize("name", [WOOF, NETTE])
def test_committed_notebook_is_clean_run_once_and_quoted_by_the_readme(name):
    notebook, readme = read(name), (ROOT / "README.md").read_text()
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "widgets" not in notebook.metadata
    for cell in cells:  # plots are folded, in Colab and elsewhere
        if "plt.show()" in cell.source or "\nplot_" in cell.source:
            assert cell.metadata.cellView == "form"
            assert cell.metadata.jupyter.source_hidden
    _, *studies = (ROOT / "tests/full_h100.txt").read_text().split("## Image")
    rows = re.findall(rf"^\| {name[:-9]} (\|.*\|)$", readme, re.MULTILINE)
    assert len(rows) == 2 and all(row in studies[name == NETTE] for row in rows)


# ── Without one of the experiments ────────────────────────────────────────
@pytest.mark.parametrize("left_out", ["Experiment 1", "Experiment 2"])
def test_either_experiment_may_be_left_out(left_out, tmp_path, monkeypatch, capsys):
    shell, inside, shown = InteractiveShell(), False, []
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.setenv("KD_PROFILE", "demo")
    for kind in ("DATA", "RUNS"):
        monkeypatch.setenv(f"KD_{kind}_DIR", str(tmp_path / kind))
    for cell in read(NETTE).cells[2:]:  # kd_utils is there
        if cell.cell_type == "markdown" and "\n## " in f"\n{cell.source}":
            inside = f"\n## {left_out}" in f"\n{cell.source}"
        elif cell.cell_type == "code" and not inside:
            shown.append(shell.run_cell(cell.source + smaller(cell)))
            assert shown[-1].success, shown[-1]
    texts = [done.result.data for done in shown if isinstance(done.result, Markdown)]
    text = "\n".join(texts) + capsys.readouterr().out
    assert f"Not run yet: {left_out}" in text and "no verdict" in text
    assert ("the 40 never-seen" in text) == (left_out == "Experiment 1")
    assert not re.search(r"\bnan\b", text)


# ── Single cells ──────────────────────────────────────────────────────────
def test_set_up_asks_until_it_gets_the_module(tmp_path, monkeypatch, capsys):
    module = (ROOT / "kd_utils.py").read_bytes()
    uploads = [{}, {"x.ipynb": b"{}"}, {"kd_utils (1).py": module}]
    colab = Mock(**{"files.upload.side_effect": uploads})
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(tmp_path)
    Path("kd_utils.py").write_text("def distillation_loss(")  # an older one
    exec(code_cells()[0], {})
    told = capsys.readouterr().out.count("That was not the kd_utils.py")
    assert told == 2 and Path("kd_utils.py").read_bytes() == module


def choose(dataset, profile=""):
    names = {"DATASET": dataset, "PROFILE": profile, "KEEP_ON_DRIVE": False, "os": os}
    cells = "PROFILES =", "# @title Choose the profile", "weights ="
    return run_cells(*cells, asdict=asdict, **names)["SETTINGS"]


def test_profiles_and_folders_are_chosen_by_name(monkeypatch, capsys):
    for profile, chosen in {"small": (96, 3, 16), "full": (128, 5, 20)}.items():
        found = choose("own/demo", profile)
        assert (found.image_size, len(found.seeds), found.epochs) == chosen
        assert found.dataset == "own/demo" and found.runs_dir.name == f"demo-{profile}"
    assert ("No GPU" in capsys.readouterr().out) == (kd.DEVICE.type == "cpu")
    with pytest.raises(ValueError, match="'tpu' is none of full, small, demo"):
        choose("imagenette2-160", "tpu")
    monkeypatch.setenv("KD_RUNS_DIR", "~/kd")
    monkeypatch.setenv("KD_SEEDS", "4")
    found = choose("imagenette2-160", "demo")
    assert (found.seeds, found.epochs, found.teacher_weights) == ((0, 1, 2, 3), 3, None)
    assert found.dataset == "data/demo" and "~" not in str(found.runs_dir)
    for wrong in ("no/such/file", "IMAGENET1K_V9"):  # at the start, not an hour later
        monkeypatch.setenv("KD_TEACHER_WEIGHTS", wrong)
        with pytest.raises(ValueError, match=f"{wrong}.*IMAGENET1K_V1, IMAGENET1K_V2"):
            choose("imagewoof2-160", "small")


def test_demo_draws_shapes_that_belong_to_their_class(tmp_path):
    cell = "# @title Draw the demo's photographs"
    draw = run_cells(cell, Image=Image, ImageDraw=ImageDraw)["draw_demo_dataset"]
    draw(tmp_path / "demo")
    split = kd.load_split(tmp_path / "demo", "train", 96)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert len(split) == 200 and len(split.classes) == 10
    red, _green, blue = split.images.float().cpu().unbind(1)
    shapes = {"gold": (red > 200) & (blue < 120), "plum": (red > 180) & (blue > 180)}
    for label, name in enumerate(split.classes):
        colour, corners = re.match(r"(\w+) (\d)", name).groups()
        filled = shapes[colour][split.targets.cpu() == label].float()
        rows, columns = filled.amax(2).sum(1), filled.amax(1).sum(1)
        share = (filled.sum((1, 2)) / (rows * columns)).mean()  # of the box around it
        expected = {"3": 0.5, "4": 1.0, "5": 0.69, "6": 0.75, "7": 0.74}[corners]
        assert share == pytest.approx(expected, abs=0.06), name


class Given:
    """In place of `kd.Stage`: it keeps what it is given, and is not trained."""

    def __init__(self, name, losses, settings, splits, networks=None, teacher=None):
        self.losses, self.settings, self.splits = losses, settings, splits
        self.networks, self.teacher = networks, teacher
        logits = torch.eye(3)[splits[1].targets]
        self.students = [SimpleNamespace(network="trained", arm="x", logits=logits)]


def test_choices_and_teacher_get_what_they_should(settings, monkeypatch):
    split, held_out, made = make_split(50), torch.arange(50) % 10 == 0, []
    numbers = {"teacher": "resnet18", "teacher_weights": None, "teacher_epochs": 7}
    settings = replace(settings, trial_epochs=5, **numbers)
    given = {"train_split": split, "SETTINGS": settings, "replace": replace}
    given |= {"partial": partial, "splits": (split, VAL), "RUN_CHOICES": True}
    monkeypatch.setattr(kd, "Stage", Given)
    cells = ["def label_loss", "def fine_tune_teacher", "is_tenth =", "def tell_choice"]
    names = run_cells(*cells, "RATES = ", "def fixed_loss", train=made.append, **given)
    *rates, teacher, trial = made
    for stage in made:
        for part, chosen in zip(stage.splits, (~held_out, held_out), strict=True):
            assert torch.equal(part.images, split.images[chosen])
            assert torch.equal(part.targets, split.targets[chosen])
        assert stage.settings.runs_dir == settings.runs_dir / "trials"
    for stage in (*rates, trial):
        assert stage.settings.seeds == (100,) and stage.settings.epochs == 5
        assert not stage.settings.keep_weights and stage.networks is None  # the default
    tried = [stage.settings.recipe.learning_rate for stage in rates]
    assert tried == [0.001, 0.002, 0.004, 0.008]
    assert all(stage.losses == {"alone": names["label_loss"]} for stage in rates)
    assert teacher.settings.epochs == 7 and teacher.settings.seeds == (0,)
    assert teacher.settings.keep_weights and trial.teacher == "trained"
    assert teacher.networks["teacher"](num_classes=3).fc.out_features == 3
    logits = *torch.eye(3)[:2, None], torch.tensor([1])
    for arm, loss in list(trial.losses.items())[1:]:
        expected = kd.distillation_loss(
            *logits, *map(float, re.findall(r"[\d.]+", arm))
        )
        assert loss(*logits, settings.recipe) == expected
    names["fine_tune_teacher"]("teacher")
    assert made[-1].splits == (split, VAL)
    assert made[-1].settings.runs_dir == settings.runs_dir


def test_choice_is_made_by_its_rule(settings, capsys):
    given = {"train_split": make_split(), "replace": replace, "SETTINGS": settings}
    tell_choice = run_cells("is_tenth =", "def tell_choice", **given)["tell_choice"]
    hits = {"present": (torch.arange(100) < 2).float(), "other": torch.zeros(100)}
    for number, choice in ((3, "present"), (20, "other")):  # 3 may be luck
        hits["other"][:number] = 1
        tell_choice(hits, "present")
        assert f"By the rule, the choice is {choice}" in capsys.readouterr().out


def test_losses_of_arms_are_those_of_plain_formulas(settings):
    targets = torch.arange(6, device=kd.DEVICE) // 2
    images = (40 * torch.arange(6, dtype=torch.uint8)).view(6, 1, 1, 1)
    images = images.expand(6, 3, 32, 32).to(kd.DEVICE)
    weights = torch.tensor([[1.0, -2.0, 0.5]], device=kd.DEVICE)
    other = kd.Recipe(temperature=2.0, alpha=1.0)
    given = {
        "teacher": lambda images: images.mean((1, 2, 3)).view(-1, 1) * weights,
        "train_split": kd.Split(images, targets, ("a", "b", "c"), targets > 9),
        "SETTINGS": replace(settings, batch_size=6, recipes={"LeNet-5": other}),
        "num_classes": 3,
    }
    cells = "def label_loss", "temperatures = {", "def class_mean_loss"
    names = run_cells(*cells, **given)
    assert set(names["class_means"]) == {2.0, 3.0}
    logits, label = torch.tensor([[1.0, 0.0, 2.0]], device=kd.DEVICE), targets[2:3]
    for T, alpha in ((3.0, 0.5), (2.0, 1.0)):
        recipe = kd.Recipe(temperature=T, alpha=alpha)
        soft = (given["teacher"](kd.normalise(images)) / T).softmax(1)
        p, q = soft[2:4].mean(0), (logits[0] / T).softmax(0)
        hard = math.log(math.e + 1 + math.e**2)
        found = names["class_mean_loss"](logits, None, label, recipe).item()
        expected = alpha * T**2 * (p * (p / q).log()).sum().item() + (1 - alpha) * hard
        assert found == pytest.approx(expected, rel=1e-4)
        found = names["distilled_loss"](logits, logits, label, recipe).item()
        assert found == pytest.approx((1 - alpha) * hard, abs=1e-6)
    found = names["label_loss"](logits, None, label, recipe).item()
    assert found == pytest.approx(hard)


def test_printed_quality_is_of_the_last_epoch(capsys):
    students = []
    for values in ([0.2, 0.9, 0.5], [0.3, 0.9, 0.6]):
        history = {"val_accuracy": values}
        students.append(SimpleNamespace(key=("a", "b", 0), history=history))
    run_cells("def tell_quality", untaught=SimpleNamespace(students=students))
    assert "a, b: 55.0 % of val right, from 50.0 to 60.0 (2" in capsys.readouterr().out


# ── The report, against an independent calculation ────────────────────────
TRUTH, LEVELS = VAL.targets.cpu().numpy(), ("alone", "distilled")


def softmax(logits):
    powers = np.exp(logits.double().numpy())
    return powers / powers.sum(1, keepdims=True)


def accuracy(logits):
    return 100 * (logits.argmax(1).numpy() == TRUTH).mean()


def nll(logits):
    return -np.log(softmax(logits)[range(24), TRUTH]).mean()


def ece(logits):
    p, gap = softmax(logits).max(1), 0.0
    for number in range(1, 16):
        chosen = np.ceil(15 * p) == number
        gap += abs((logits.argmax(1).numpy() == TRUTH)[chosen].sum() - p[chosen].sum())
    return gap / 24


def recalls(logits):
    hits = logits.argmax(1).numpy() == TRUTH
    return np.array([100 * hits[label == TRUTH].mean() for label in range(3)])


def mean_of(arm, measure):
    return np.mean([measure(ANSWERS[arm, seed]) for seed in (0, 1)], axis=0)


def gain(arm, other, images=slice(None)):
    pairs = [(RIGHT[arm, seed], RIGHT[other, seed]) for seed in (0, 1)]
    gains = np.array([(a.int() - b.int()).numpy()[images] for a, b in pairs])
    mean, low, high = (100 * value for value in kd.interval(gains))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


REPORT = """How numbers|Read the results|Did it help|How sure|What a verdict|The words
|The verdicts|Metrics|By arm|Were the probabilities|Six photographs|The teacher's conf
|Did the students|What ran"""


def report(settings):
    """What the report shows, and its figures."""
    shown, figures = [], []
    mocked = vars(plt) | {"show": lambda: figures.append(plt.gcf())}
    given = {
        "SETTINGS": settings,
        "val_split": VAL,
        "is_drawn": False,
        "num_classes": 3,
    }
    given |= {"plt": SimpleNamespace(**mocked), "Markdown": shown.append}
    titles = [f"# @title {title.strip()}" for title in REPORT.split("|")]
    colours = {"teacher": "g", "alone": "k", "distilled": "b"}
    run_cells(*titles, COLOURS=colours, **given)
    return shown, figures


def test_report_gives_gains_and_verdicts(settings, monkeypatch):
    make_study(settings)
    (table, sure, verdicts, *_, ran), _ = report(settings)
    levels = [f"{mean_of(arm, accuracy):.1f}" for arm in LEVELS]
    row = f"| tiny | {' | '.join(levels)} | {gain('distilled', 'alone')} | 2 of 2 |"
    assert row in table
    pairs = [("distilled", "alone"), ("distilled", "alone", slice(0, None, 4))]
    pairs += [("class mean", "alone"), ("distilled", "class mean")]
    assert f"| tiny | {' | '.join(gain(*pair) for pair in pairs)} |" in sure
    assert "Distillation into tiny: helps.** It learned more" in verdicts
    assert "No clear lead over the teacher's mean answer" in verdicts
    assert "learning_rate of tiny 0.004; temperature of tiny 3.0" in ran
    # A seed without a gain is not won
    monkeypatch.setitem(ANSWERS, ("distilled", 0), ANSWERS["alone", 0])
    make_study(settings)
    assert "| 1 of 2 |" in report(settings)[0][0]


def test_report_says_what_became_of_probabilities_and_mistakes(settings):
    make_study(settings)
    (_, _, _, arms, spoiled, followed, _), (photographs, confusions) = report(settings)
    model = ANSWERS["teacher", 0].argmax(1)
    for arm in ("alone", "class mean", "distilled"):
        same = mean_of(
            arm, lambda x: 100 * (x.argmax(1) == model).double().mean().item()
        )
        found = f"{mean_of(arm, nll):.3f} | {mean_of(arm, ece):.3f} | {same:.1f} |"
        assert f"| tiny | {arm} | {mean_of(arm, accuracy):.1f} | {found}" in arms
    for name, measure in (("NLL", nll), ("ECE", ece)):
        before, after = (mean_of(arm, measure) for arm in LEVELS)
        word = "worse" if after > before else "better"
        assert f"{name} {word} ({before:.3f} → {after:.3f})" in spoiled
    shares = []
    for arm, other in (("distilled", "alone"), ("alone", "distilled")):
        copied = []
        for seed in (0, 1):  # mistakes of this arm only
            mistakes = RIGHT[other, seed] & ~RIGHT[arm, seed]
            own = ANSWERS[arm, seed].argmax(1) == model
            copied.append(own[mistakes].double().mean().item())
        shares.append(f"{np.mean(copied):.0%}")
    assert shares[0] != shares[1] and re.findall(r"\d+%", spoiled) == shares

    p = {arm: mean_of(arm, lambda x: softmax(x)[range(24), TRUTH]) for arm in LEVELS}
    change = np.sort(100 * (p["distilled"] - p["alone"]))
    titles = [axis.get_title().split("\n")[1] for axis in photographs.axes]
    expected = [*change[:-4:-1], *change[2::-1]]
    assert titles == [f"{value:+.0f} points" for value in expected]

    changes = mean_of("distilled", recalls) - mean_of("alone", recalls)
    bars = [patch.get_width() for patch in confusions.axes[1].patches]
    assert bars == pytest.approx(changes.tolist(), abs=1e-4)
    share = np.zeros((3, 3))
    for label, answered in zip(TRUTH, model.tolist(), strict=True):
        share[label, answered] += 100 * (label != answered) / (label == TRUTH).sum()
    row, column = np.unravel_index(share.argmax(), (3, 3))
    names = [f"*{VAL.classes[place]}*" for place in (row, column)]
    line = f"Of {names[0]}, the teacher calls {share[row, column]:.0f} % {names[1]}."
    assert line in followed and f"tiny {changes[row]:+.1f}" in followed


def test_one_seed_has_no_interval_and_no_verdict(settings):
    settings = replace(settings, seeds=(0,))
    make_study(settings)
    shown, _ = report(settings)
    assert "tiny: one seed.** One seed has no interval" in shown[2]
    assert not re.search("contains 0|nan|No clear lead", "".join(shown))


def test_drawing_of_networks_takes_any_network(settings):
    class Wrapped(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.body = kd.build_classifier(20, "mobilenet_v3_small")
            self.head = nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, num_classes))

        def forward(self, x):
            return self.head(self.body(x))

    names = run_cells("# @title The maps of a network", SETTINGS=settings, nn=nn)
    assert [m[:2] for m in names["list_maps"](Wrapped(3))] == [(3, 32), (20, 1), (3, 1)]
    maps = names["list_maps"](kd.LeNet5())
    assert maps[:3] == [(3, 32, 0), (6, 28, 456), (6, 14, 0)]


# ── All of it: the run that began with the first test ──────────────────────
ELSEWHERE = """
import json, sys, torch, warnings
for told in ("Attempted to insert", ".*does not reference", "The given buffer"):
    warnings.filterwarnings("ignore", told)  # torch 2.6, torch 2.11
extra = {"classes.json": ""}
network = torch.export.load("student.pt2", extra_files=extra).module()
images = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).mul(7).to(torch.uint8)
answers = [network(images[:number]).tolist() for number in (1, 3)]
print(json.dumps([*answers, extra["classes.json"], "kd_utils" in sys.modules]))
"""


def test_all_of_imagewoof_runs_and_its_network_leaves(whole_run):
    process, folder = whole_run
    assert process.wait() == 0
    text = text_of(nbformat.read(folder / "whole.ipynb", as_version=4))
    assert "by hand 0.6450, kd.distillation_loss 0.6450" in text
    assert text.count("**Distillation into") == 4 and "lead over alone, longer" in text
    assert text.count("By the rule, the choice") == 2 and "lead over smoothed" in text
    assert not re.search("nan|Not run yet|never-seen", text)

    folder = folder / "runs/own-demo"
    names = "Experiment 2", "teacher", "trials/teacher", "trials/T and alpha"
    files = [kd.read_checkpoint(folder / f"{name}.pt") for name in names]
    content = [saved["record"]["learns from"] for saved in files]
    assert content[0] == content[1] != content[2] == content[3]

    network = kd.CustomCNN(3).eval()
    student = files[0]["students"]["Custom CNN", "distilled", 0]
    network.load_state_dict(student["network"])
    images = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).mul(7).to(torch.uint8)
    expected = network(kd.normalise(images)).softmax(1).tolist()
    strict = ["-W", "error", "-W", "ignore::ResourceWarning"]  # of torch 2.6 itself
    command = [sys.executable, *strict, "-c", ELSEWHERE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    one, three, classes, needs_kd = json.loads(done.stdout)
    assert np.allclose(one + three, expected[:1] + expected, atol=1e-5)
    assert json.loads(classes) == ["a", "b", "c"] and not needs_kd
