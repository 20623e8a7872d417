"""The two notebooks: alike, clean, and able to run top to bottom, also in parts."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, code_cells, make_split, run_cells
from nbclient import NotebookClient
from PIL import Image
from test_results import RIGHT, VAL, make_study

import kd_utils as kd

WOOF, NETTE = "Imagewoof_KD.ipynb", "Imagenette_KD.ipynb"


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


def outputs(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in cells for output in cell.outputs]


def text_of(notebook):
    found = []
    for output in outputs(notebook):
        found.append(output.get("text", ""))
        found.append(output.get("data", {}).get("text/markdown", ""))
    return "\n".join(found)


# ── As they are committed ─────────────────────────────────────────────────
def test_imagenettes_code_is_in_order_a_part_of_imagewoofs():
    woof, nette = iter(code_cells(WOOF)), code_cells(NETTE)
    [own] = [source for source in nette if 'DATASET = "imagenette2-160"' in source]
    nette.remove(own)
    assert all(source in woof for source in nette)  # `in` moves the iterator on


@pytest.mark.parametrize("name", [WOOF, NETTE])
def test_committed_notebook_was_run_once_and_is_clean(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "widgets" not in notebook.metadata
    for output in outputs(notebook):
        assert output.output_type != "error" and output.get("name") != "stderr"
    for cell in cells:  # plots are folded, in Colab and elsewhere
        if "plt.show()" in cell.source or "\nplot_" in cell.source:
            assert cell.metadata.cellView == "form"
            assert cell.metadata.jupyter.source_hidden


def test_readme_quotes_the_notebooks():
    texts = {name.split("_")[0]: text_of(read(name)) for name in (WOOF, NETTE)}
    readme = (ROOT / "README.md").read_text()
    for dataset, row in re.findall(r"^\| (Image\w+) (\|.*\|)$", readme, re.MULTILINE):
        assert row in texts[dataset]


# ── Top to bottom ─────────────────────────────────────────────────────────
def execute(notebook, tmp_path, monkeypatch, *lines):
    """Runs a notebook as `demo`, smaller still, as its text tells a reader to."""
    variables = {"PROFILE": "demo", "DATA_DIR": tmp_path, "RUNS_DIR": tmp_path}
    for key, value in variables.items():
        monkeypatch.setenv(f"KD_{key}", str(value))
    for cell in notebook.cells:
        if "SETTINGS = make_dataclass(" in cell.source:
            cell.source += "\nSETTINGS = replace(SETTINGS, epochs=1, image_size=32)"
        if cell.metadata.get("tags") == ["parameters"]:
            cell.source = "\n".join([cell.source, *lines])
        if "download_dataset(" in cell.source:
            cell.source += "\nthird = torch.arange(0, len(train_split), 3)"
            cell.source += "\ntrain_split = train_split.subset(third)"
            cell.source += "\nsplits = (train_split, val_split)"
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    assert not [one for one in outputs(notebook) if one.get("name") == "stderr"]
    return text_of(notebook)


ELSEWHERE = """
import json, sys, torch
extra = {"classes.json": ""}
network = torch.export.load(sys.argv[1], extra_files=extra).module()
images = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).mul(7).to(torch.uint8)
assert "kd_utils" not in sys.modules
answers = [network(images[:number]).tolist() for number in (1, 3)]
print(json.dumps([*answers, json.loads(extra["classes.json"])]))
"""


def test_all_of_imagewoof_runs_and_its_network_leaves(tmp_path, monkeypatch):
    notebook = read(WOOF)
    for cell in notebook.cells:  # the exercises, too
        cell.source = cell.source.replace("RUN = False", "RUN = True")
    again = [cell for cell in notebook.cells if cell.source.startswith("# @title")]
    report = again[
        [c.source.startswith("# @title Read the") for c in again].index(True) :
    ]
    notebook.cells += [cell.copy() for cell in report]
    text = execute(notebook, tmp_path, monkeypatch)
    assert "by hand 0.6450, kd.distillation_loss 0.6450" in text
    assert text.count("**Distillation into") == 4 and "lead over alone, longer" in text
    assert (
        text.count("By the rule, the choice is") == 2 and "lead over smoothed" in text
    )
    assert "nan" not in text and "Not run yet" not in text

    folder = tmp_path / "imagewoof2-160-demo"
    names = "Experiment 2", "teacher", "trials/teacher", "trials/T and alpha"
    files = [kd.read_checkpoint(folder / f"{name}.pt") for name in names]
    content = [saved["record"]["content of train"] for saved in files]
    assert content[0] == content[1] != content[2] == content[3]
    assert files[1]["record"]["peak learning rate"] == 2e-4
    assert files[0]["record"]["losses"]["distilled"]["temperature"] == "4.0"

    saved, network = files[0]["students"], kd.CustomCNN(10)
    network.load_state_dict(saved["Custom CNN", "distilled", 0]["network"])
    images = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).mul(7).to(torch.uint8)
    with torch.no_grad():
        expected = network.eval()(kd.normalise(images)).softmax(1)
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE, folder / "student.pt2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    one, three, classes = json.loads(done.stdout)
    assert np.allclose([*one, *three], expected[[0, 0, 1, 2]], atol=1e-5)
    assert classes[0] == "gold 3-gon" and len(classes) == 10


@pytest.mark.parametrize("left_out", ["Experiment 1", "Experiment 2"])
def test_either_experiment_may_be_left_out(left_out, tmp_path, monkeypatch):
    notebook, inside = read(NETTE), False
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and "\n## " in f"\n{cell.source}":
            inside = f"\n## {left_out}" in f"\n{cell.source}"
        elif inside and cell.cell_type == "code":
            cell.source = ""
    text = execute(notebook, tmp_path, monkeypatch)
    assert f"Not run yet: {left_out}" in text and "no verdict" in text
    assert "nan" not in text


def test_a_folder_of_ones_own_runs_to_the_end(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for index in range(150):  # three classes, none of ImageNet's, no never-seen images
        split = "train" if index < 96 else "val"
        path = tmp_path / "own" / split / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    line = f'DATASET = "{tmp_path / "own"}"'
    text = execute(read(NETTE), tmp_path, monkeypatch, line)
    assert text.count("**Distillation into") == 2
    assert "nan" not in text and "never-seen" not in text


# ── Single cells ──────────────────────────────────────────────────────────
def test_set_up_asks_until_it_gets_the_module(tmp_path, monkeypatch, capsys):
    module = (ROOT / "kd_utils.py").read_bytes()
    uploads = [{}, {"x.ipynb": b"{}"}, {"kd_utils (1).py": module}]
    colab = ModuleType("google.colab")
    colab.files = SimpleNamespace(upload=lambda: uploads.pop(0))
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(tmp_path)
    exec(code_cells()[0], {})
    assert capsys.readouterr().out.count("That was not kd_utils.py") == 2
    assert (tmp_path / "kd_utils.py").read_bytes() == module


def test_set_up_fetches_the_module_from_where_it_is_hosted(tmp_path, monkeypatch):
    hosted = tmp_path / "raw" / "HEAD" / "kd_utils.py"
    hosted.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    cell = code_cells()[0].replace('REPO_URL = ""', f'REPO_URL = "{tmp_path.as_uri()}"')
    hosted.write_text("<html>")
    with pytest.raises(ValueError, match="correct REPO_URL"):
        exec(cell, {})
    assert not Path("kd_utils.py").exists()
    hosted.write_text("def distillation_loss(")
    exec(cell, {})
    assert Path("kd_utils.py").read_text() == hosted.read_text()


def choose(dataset, profile=""):
    names = {"DATASET": dataset, "PROFILE": profile, "KEEP_ON_DRIVE": False, "os": os}
    names |= {"Path": Path, "make_dataclass": make_dataclass}
    cells = "NUMBERS =", "PROFILES =", "# @title Choose the profile", "chosen ="
    return run_cells(*cells, **names)["SETTINGS"]


def test_profiles_and_folders_are_chosen_by_name(monkeypatch, capsys, tmp_path):
    variables = {"PROFILE": "demo", "RUNS_DIR": "~/kd", "SEEDS": "4"}
    for key, value in variables.items():
        monkeypatch.setenv(f"KD_{key}", value)
    chosen = choose("imagenette2-160")
    assert (chosen.dataset, chosen.epochs, chosen.seeds) == ("demo", 3, (0, 1, 2, 3))
    monkeypatch.delenv("KD_SEEDS")
    assert "~" not in str(chosen.runs_dir) and chosen.teacher_weights is None
    own = choose(str(tmp_path / "demo"))
    assert own.dataset == str(tmp_path / "demo") and own.runs_dir.name == "demo-demo"
    small, full = choose("a", "small"), choose("a", "full")
    assert (small.image_size, len(small.seeds), small.epochs) == (96, 3, 16)
    assert (full.image_size, len(full.seeds), full.epochs) == (128, 5, 20)
    assert ("No GPU" in capsys.readouterr().out) == (kd.DEVICE.type == "cpu")
    with pytest.raises(ValueError, match="'tpu' is none of full, small, demo"):
        choose("imagenette2-160", "tpu")
    monkeypatch.setenv("KD_TEACHER_WEIGHTS", "no/such/file.pth")
    with pytest.raises(FileNotFoundError, match=r"no/such/file\.pth"):
        choose("imagewoof2-160", "small")  # at the start, not an hour later


def test_label_loss_is_the_cross_entropy():
    logits, targets = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([1, 0])
    log_p = logits.log_softmax(1)
    found = run_cells("def label_loss")["label_loss"](logits, None, targets)
    assert found == -(log_p[0, 1] + log_p[1, 0]) / 2


def test_class_means_are_the_teachers_mean_soft_answers(settings):
    def teacher(images):  # logits that differ by image
        return images.mean((1, 2, 3), keepdim=True).flatten(1) @ weights.T

    weights = torch.tensor([[1.0], [-2.0], [0.5]], device=kd.DEVICE)
    values = torch.arange(6, device=kd.DEVICE, dtype=torch.uint8) * 40
    images = values.view(6, 1, 1, 1).expand(6, 3, 32, 32)
    targets = torch.arange(6, device=kd.DEVICE) // 2
    split = kd.Split(images, targets, ("a", "b", "c"), targets > 9)
    given = {"train_split": split, "num_classes": 3, "teacher": teacher}
    given["SETTINGS"] = replace(settings, batch_size=6)  # temperature 3
    names = run_cells("class_means = torch.zeros", "def class_mean_loss", **given)
    soft = (teacher(kd.normalise(images)) / 3.0).softmax(1)
    expected = soft.view(3, 2, 3).mean(1)
    assert torch.allclose(names["class_means"], expected, atol=1e-5)

    logits, target = torch.tensor([[1.0, 0.0, 2.0]]).to(kd.DEVICE), targets[2:3]
    found = names["class_mean_loss"](logits, None, target, 3.0, 1.0)
    q = (logits[0] / 3.0).softmax(0)
    kl = (expected[1] * (expected[1] / q).log()).sum()
    assert found.item() == pytest.approx(9 * kl.item(), rel=1e-4)


def test_choice_is_made_by_its_rule_on_the_held_out_tenth(capsys):
    split, settings = make_split(50), choose("a", "demo")
    given = {"train_split": split, "SETTINGS": settings, "replace": replace}
    names = run_cells("is_tenth =", "def tell_choice", **given)
    learned, held_out = names["choice_splits"]
    tenth = [0, 10, 20, 30, 40]
    assert torch.equal(held_out.images, split.images[tenth]) and len(learned) == 45
    assert not (learned.images[:, None] == held_out.images).flatten(2).all(2).any()

    hits = {name: torch.zeros(100) for name in ("present", "luck", "better")}
    hits["present"][:2], hits["luck"][2:5] = 1, 1
    names["tell_choice"]({name: hits[name] for name in ("present", "luck")}, "present")
    said = capsys.readouterr().out
    assert "+1.0 points" in said
    assert "error of 2.2. By the rule, the choice is present" in said
    hits["better"][:20] = 1
    names["tell_choice"](hits, "present")
    assert "the choice is better" in capsys.readouterr().out


def test_report_says_what_the_files_hold(settings):
    make_study(settings)
    titles = ["How numbers", "Read the", "Did it", "How sure", "What a verdict"]
    titles += ["The verdicts", "Metrics", "Were the probabilities"]
    shown, cells = [], [f"# @title {title}" for title in titles]
    given = {"SETTINGS": settings, "val_split": VAL, "Markdown": shown.append}
    run_cells(*cells, np=np, **given)

    def gain(arm, other, images=slice(None)):
        pairs = [(RIGHT[arm, seed], RIGHT[other, seed]) for seed in (0, 1)]
        gains = np.array([(a.int() - b.int()).numpy()[images] for a, b in pairs])
        mean, low, high = (100 * value for value in kd.interval(gains))
        return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"

    level = {
        a: 50 * (RIGHT[a, 0].float() + RIGHT[a, 1].float()).mean() for a, _ in RIGHT
    }
    row = f"| tiny | {level['alone']:.1f} | {level['distilled']:.1f} | "
    assert row + gain("distilled", "alone") + " | 2 of 2 |" in shown[0]
    pairs = [("distilled", "alone"), ("distilled", "alone", slice(0, None, 4))]
    pairs += [("class mean", "alone"), ("distilled", "class mean")]
    assert f"| tiny | {' | '.join(gain(*pair) for pair in pairs)} |" in shown[1]
    assert "Distillation into tiny: helps.** It learned more" in shown[2]
    # A wrong answer's cross-entropy is 4 more than a right one's
    least = math.log1p(2 * math.exp(-4))
    nll = {arm: least + 4 * (1 - level[arm] / 100) for arm in level}
    told = f"NLL better ({nll['alone']:.3f} → {nll['distilled']:.3f})"
    assert told in shown[3] and "ECE better" in shown[3]


def test_report_metrics_are_what_a_plain_calculation_gives():
    names = run_cells("# @title Metrics", num_classes=4)
    logits = 2 * torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(200) % 4
    logits[:80] = 0.5 * F.one_hot(targets[:80]).float()  # too modest, the rest too sure
    names["teacher_val_logits"] = logits.roll(1, dims=1)
    logits[150:] = logits[150:].roll(1, dims=1)
    agreement = (logits.argmax(1) == names["teacher_val_logits"].argmax(1)).float()
    assert names["agreement"](logits, targets) == agreement.mean() > 0.2
    soft, hits = logits.softmax(1).numpy(), (logits.argmax(1) == targets).numpy()
    expected = [hits[label::4].mean() for label in range(4)]
    assert names["recall"](logits, targets).numpy() == pytest.approx(expected)
    confidence, error = soft.max(1), 0
    for low in np.arange(15) / 15:
        members = (confidence >= low) & (confidence < low + 1 / 15)
        if members.any():
            gap = hits[members].mean() - confidence[members].mean()
            error += members.mean() * abs(gap)
    assert names["ece"](logits, targets).item() == pytest.approx(error, rel=1e-4)
