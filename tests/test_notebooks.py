"""The two notebooks: alike, clean, and able to run top to bottom, also in parts."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import make_dataclass, replace
from pathlib import Path
from unittest.mock import Mock

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, code_cells, make_split, own_folder, photograph, run_cells
from nbclient import NotebookClient
from study import RIGHT, VAL, make_study

import kd_utils as kd

WOOF, NETTE = "Imagewoof_KD.ipynb", "Imagenette_KD.ipynb"


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


def text_of(notebook):
    """What the cells printed and showed, if it is no error and no warning."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error" and output.get("name") != "stderr"
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
    texts = {"": text_of(notebook), ", H100": studies[name == NETTE]}
    rows = re.findall(rf"^\| {name[:-9]}(, H100)? (\|.*\|)$", readme, re.MULTILINE)
    assert len(rows) == 4 and all(row in texts[study] for study, row in rows)


# ── Top to bottom ─────────────────────────────────────────────────────────
def execute(notebook, tmp_path, monkeypatch, *lines):
    """Runs a notebook as `demo`, smaller still, as its text tells a reader to."""
    monkeypatch.setenv("KD_PROFILE", "demo")
    for folder in ("DATA_DIR", "RUNS_DIR"):
        monkeypatch.setenv(f"KD_{folder}", str(tmp_path))
    for cell in notebook.cells:
        if "SETTINGS = make_dataclass(" in cell.source:
            cell.source += "\nSETTINGS = replace(SETTINGS, epochs=1, image_size=32)"
        if cell.metadata.get("tags") == ["parameters"]:
            cell.source = "\n".join([cell.source, *lines])
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    return text_of(notebook)


ELSEWHERE = """
import json, sys, torch, warnings
warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.11
extra = {"classes.json": ""}
network = torch.export.load(sys.argv[1], extra_files=extra).module()
images = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).mul(7).to(torch.uint8)
answers = [network(images[:number]).tolist() for number in (1, 3)]
print(json.dumps([*answers, extra["classes.json"], "kd_utils" in sys.modules]))
"""


def test_all_of_imagewoof_runs_and_its_network_leaves(tmp_path, monkeypatch):
    images = {name: photograph(60 * number) for number, name in enumerate("abc")}
    own = own_folder(tmp_path / "own", images, copies=22)  # no never-seen images
    notebook = read(WOOF)
    for cell in notebook.cells:  # the exercises, too, and then the report again
        cell.source = cell.source.replace("RUN = False", "RUN = True")
    titles = [cell.source.split(":")[0] for cell in notebook.cells]
    report = notebook.cells[titles.index("# @title Read the results") :]
    notebook.cells += [cell.copy() for cell in report if "@title" in cell.source]
    text = execute(notebook, tmp_path, monkeypatch, f"DATASET = {str(own)!r}")
    assert "by hand 0.6450, kd.distillation_loss 0.6450" in text
    assert text.count("**Distillation into") == 4 and "lead over alone, longer" in text
    assert text.count("By the rule, the choice") == 2 and "lead over smoothed" in text
    assert not re.search("nan|Not run yet|never-seen", text)

    names = "Experiment 2", "teacher", "trials/teacher", "trials/T and alpha"
    files = [kd.read_checkpoint(tmp_path / f"own-demo/{name}.pt") for name in names]
    content = [saved["record"]["content of train"] for saved in files]
    assert content[0] == content[1] != content[2] == content[3]
    assert files[1]["record"]["peak learning rate"] == 2e-4
    assert files[0]["record"]["losses"]["distilled"]["temperature"] == "4.0"

    network = kd.CustomCNN(3).eval()
    student = files[0]["students"]["Custom CNN", "distilled", 0]
    network.load_state_dict(student["network"])
    images = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).mul(7).to(torch.uint8)
    expected = network(kd.normalise(images)).softmax(1).tolist()
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE, "own-demo/student.pt2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    one, three, classes, needs_kd = json.loads(done.stdout)
    assert np.allclose(one + three, expected[:1] + expected, atol=1e-5)
    assert json.loads(classes) == ["a", "b", "c"] and not needs_kd


@pytest.mark.parametrize("left_out", ["Experiment 1", "Experiment 2"])
def test_either_experiment_may_be_left_out(left_out, tmp_path, monkeypatch):
    notebook, inside = read(NETTE), False
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and "\n## " in f"\n{cell.source}":
            inside = f"\n## {left_out}" in f"\n{cell.source}"
        elif inside and cell.cell_type == "code":
            cell.source, cell.outputs = "", []
    text = execute(notebook, tmp_path, monkeypatch)
    assert f"Not run yet: {left_out}" in text and "no verdict" in text
    assert re.findall("nan|the 40", text) == ["the 40"] * (left_out == "Experiment 1")


# ── Single cells ──────────────────────────────────────────────────────────
def test_set_up_asks_until_it_gets_the_module(tmp_path, monkeypatch, capsys):
    module = (ROOT / "kd_utils.py").read_bytes()
    uploads = [{}, {"x.ipynb": b"{}"}, {"kd_utils (1).py": module}]
    colab = Mock(**{"files.upload.side_effect": uploads})
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(tmp_path)
    exec(code_cells()[0], {})
    assert capsys.readouterr().out.count("That was not kd_utils.py") == 2
    assert Path("kd_utils.py").read_bytes() == module


def choose(dataset, profile=""):
    names = {"DATASET": dataset, "PROFILE": profile, "KEEP_ON_DRIVE": False, "os": os}
    names |= {"Path": Path, "make_dataclass": make_dataclass}
    cells = "NUMBERS =", "PROFILES =", "# @title Choose the profile", "chosen ="
    return run_cells(*cells, **names)["SETTINGS"]


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
    assert (found.dataset, found.seeds, found.epochs) == ("demo", (0, 1, 2, 3), 3)
    assert "~" not in str(found.runs_dir) and found.teacher_weights is None
    monkeypatch.setenv("KD_TEACHER_WEIGHTS", "no/such/file.pth")
    with pytest.raises(FileNotFoundError, match=r"no/such/file\.pth"):
        choose("imagewoof2-160", "small")  # at the start, not an hour later


def test_losses_of_labels_and_of_class_means_are_those_of_plain_formulas(settings):
    targets = torch.arange(6, device=kd.DEVICE) // 2
    images = (40 * torch.arange(6, dtype=torch.uint8)).view(6, 1, 1, 1)
    images = images.expand(6, 3, 32, 32).to(kd.DEVICE)
    weights = torch.tensor([[1.0, -2.0, 0.5]], device=kd.DEVICE)
    given = {
        "teacher": lambda images: images.mean((1, 2, 3)).view(-1, 1) * weights,
        "train_split": kd.Split(images, targets, ("a", "b", "c"), targets > 9),
        "SETTINGS": replace(settings, batch_size=6),  # temperature 3
        "num_classes": 3,
    }
    cells = "def label_loss", "class_means = torch.zeros", "def class_mean_loss"
    names = run_cells(*cells, **given)
    soft = (given["teacher"](kd.normalise(images)) / 3.0).softmax(1)
    means = soft.view(3, 2, 3).mean(1)
    assert torch.allclose(names["class_means"], means, atol=1e-5)

    logits, label = torch.tensor([[1.0, 0.0, 2.0]], device=kd.DEVICE), targets[2:3]
    q, p = (logits[0] / 3.0).softmax(0), means[1]
    found = names["class_mean_loss"](logits, None, label, 3.0, 1.0)
    assert found.item() == pytest.approx(9 * (p * (p / q).log()).sum().item(), rel=1e-4)
    found = names["label_loss"](logits, None, label)
    assert found.item() == pytest.approx(math.log(math.e + 1 + math.e**2))


def test_choice_is_made_by_its_rule_on_the_held_out_tenth(capsys):
    split, settings = make_split(50), choose("a", "demo")
    given = {"train_split": split, "SETTINGS": settings, "replace": replace}
    names = run_cells("is_tenth =", "def tell_choice", **given)
    learned, held_out = names["choice_splits"]
    tenth = torch.arange(50) % 10 == 0
    for name in ("images", "targets", "never_seen"):
        assert torch.equal(getattr(held_out, name), getattr(split, name)[tenth])
        assert torch.equal(getattr(learned, name), getattr(split, name)[~tenth])

    hits = {"present": (torch.arange(100) < 2).float(), "other": torch.zeros(100)}
    for number, choice in ((3, "present"), (20, "other")):  # 3 may be luck
        hits["other"][:number] = 1
        names["tell_choice"](hits, "present")
        assert f"By the rule, the choice is {choice}" in capsys.readouterr().out


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

    share = {arm: (RIGHT[arm, 0] + 0.0 + RIGHT[arm, 1]).mean() / 2 for arm, _ in RIGHT}
    row = f"| tiny | {100 * share['alone']:.1f} | {100 * share['distilled']:.1f} | "
    assert row + gain("distilled", "alone") + " | 2 of 2 |" in shown[0]
    pairs = [("distilled", "alone"), ("distilled", "alone", slice(0, None, 4))]
    pairs += [("class mean", "alone"), ("distilled", "class mean")]
    assert f"| tiny | {' | '.join(gain(*pair) for pair in pairs)} |" in shown[1]
    assert "Distillation into tiny: helps.** It learned more" in shown[2]
    # A wrong answer's cross-entropy is 4 more than a right one's
    least = math.log1p(2 * math.exp(-4))
    nll = [least + 4 * (1 - share[arm]) for arm in ("alone", "distilled")]
    assert f"NLL better ({nll[0]:.3f} → {nll[1]:.3f})" in shown[3]
    sure = 1 / (1 + 2 * math.exp(-4))  # of each answer
    ece = [abs(share[arm] - sure) for arm in ("alone", "distilled")]
    assert f"ECE better ({ece[0]:.3f} → {ece[1]:.3f})" in shown[3]
