"""The two notebooks: alike, clean, and able to run top to bottom, also in parts."""

import inspect
import io
import json
import math
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from unittest.mock import MagicMock, Mock
from zipfile import ZipFile

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ANSWERS,
    HELD_OUT,
    HELD_OUT_ANSWERS,
    NETTE,
    PLACE,
    RIGHT,
    ROOT,
    VAL,
    WOOF,
    code_cells,
    find_cell,
    find_interval,
    make_split,
    make_study,
    photograph,
    read,
    read_results,
    run_cells,
    save,
    scene,
    smaller,
    text_of,
    tiny,
    unmark,
)
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import Markdown
from PIL import Image
from torch import nn
from torchvision.models import ResNet50_Weights

import kd_utils as kd


# ── As they are committed ─────────────────────────────────────────────────
def test_imagenettes_code_is_in_order_a_part_of_imagewoofs():
    woof, nette = iter(code_cells(WOOF)), code_cells(NETTE)
    [own] = [source for source in nette if 'DATASET = "imagenette2-160"' in source]
    nette.remove(own)
    assert all(source in woof for source in nette)  # `in` moves the iterator on


@pytest.mark.parametrize("name", [WOOF, NETTE])
def test_committed_notebook_is_clean_and_run_once(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "widgets" not in notebook.metadata
    for cell in cells:  # plots are folded, in Colab and elsewhere
        if "plt.show()" in cell.source or "\nplot_" in cell.source:
            assert cell.metadata.cellView == "form"
            assert cell.metadata.jupyter.source_hidden


def test_every_number_of_the_readme_was_printed():
    """By a committed notebook, or into a file beside the tests."""
    printed = [text_of(read(name)) for name in (WOOF, NETTE)]
    printed += [path.read_text() for path in sorted((ROOT / "tests").glob("*.txt"))]
    printed, readme = "\n".join(printed), (ROOT / "README.md").read_text()
    numbers = []
    for part in ("Results", "How fast"):
        text = readme.split(f"\n## {part}\n")[1].split("\n## ")[0]
        # With its interval, if there is one
        found = re.findall(r"[-+]?\d+\.\d+(?: \[.*?\])?", text)
        assert len(found) >= 2
        numbers += found
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", printed), number
    _, *studies = (ROOT / "tests/full_h100.txt").read_text().split("## Image")
    for name, study in zip(("Imagewoof", "Imagenette"), studies, strict=True):
        rows = re.findall(rf"^\| {name} (\|.*\|)$", readme, re.MULTILINE)
        assert len(rows) == 2 and all(row in study for row in rows)


def test_first_screen_shows_the_published_run_or_the_latest(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KD_RUNS_DIR", "~")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    cell, readme = (
        "# @title The result of the latest run",
        (ROOT / "README.md").read_text(),
    )
    result = run_cells(cell)["result"]
    assert all(number in readme for number in re.findall(r"\d+\.\d", result["says"]))
    for name, (mean, low, high) in result["gains"].items():
        [row] = re.findall(rf"\| Imagewoof \| {name} .*", readme)
        assert f"| {mean:+.1f} [{low:+.1f}, {high:+.1f}] |" in row
    gains = {"x": [math.nan] * 3, "y": [1.0, 0.5, 3.0]}
    kept = {"source": "mine", "says": "so", "gains": gains}
    kept |= {"photo": [[[0, 0, 0]]], "label": "a", "soft": {"a": 0.7, "b": 0.2}}
    others = "imagewoof2-160-demo", "imagenette2-160-full"
    for number, name in enumerate(["pets-full", "imagewoof2-160-full", *others]):
        path = tmp_path / name / "result.json"
        path.parent.mkdir()
        path.write_text(json.dumps({**kept, "label": name}))
        os.utime(path, (number, number))
    figures = show_nothing(monkeypatch)
    run_cells(cell, "# @title What comes out")
    photo, soft, axis = figures[0].axes
    texts = [text.get_text() for text in (*soft.texts, *axis.get_yticklabels())]
    assert texts == ["70%", "20%", "x", "y"] and axis.get_ylim() == (1.5, -0.5)
    assert photo.get_title() == "label: imagewoof2-160-full"
    bar, dot = (line.get_xdata() for line in axis.lines[2:4])
    assert [*bar, *dot] == [0.5, 3, 1]
    png, shown = run_cells("# @title Figures: sharp")["encode"](figures[0])
    width, height = Image.open(io.BytesIO(png)).size  # at double density
    assert shown == {"width": width // 2, "height": height // 2}
    chance = np.random.default_rng(0).random((300, 300, 3))
    plt.figure().gca().imshow(chance)  # a photograph's file would be large
    png, shown = run_cells("# @title Figures: sharp")["encode"](plt.gcf())
    assert (shown["width"], shown["height"]) == Image.open(io.BytesIO(png)).size


# ── Without one of the experiments ────────────────────────────────────────
@pytest.mark.parametrize("left_out", ["Experiment 1", "Experiment 2"])
def test_either_experiment_may_be_left_out(left_out, tmp_path, monkeypatch, capsys):
    shell, inside, shown = InteractiveShell(), False, []
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.setenv("KD_PROFILE", "demo")
    for kind in ("DATA", "RUNS"):
        monkeypatch.setenv(f"KD_{kind}_DIR", str(tmp_path / kind))
    for cell in read(NETTE).cells:
        if cell.source.startswith("# @title Find kd_utils"):
            continue  # it is there
        if cell.cell_type == "markdown" and "\n## " in f"\n{cell.source}":
            inside = f"\n## {left_out}" in f"\n{cell.source}"
        elif cell.cell_type == "code" and not inside:
            shown.append(shell.run_cell(cell.source + smaller(cell)))
            assert shown[-1].success, shown[-1]
    texts = [done.result.data for done in shown if isinstance(done.result, Markdown)]
    text = "\n".join(texts) + capsys.readouterr().out
    assert f"Not run yet: {left_out}" in text and "no verdict" in text
    assert "the numbers mean nothing" in text
    assert ("a CPU repeats" in text) == (kd.DEVICE.type == "cpu")
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
    exec(find_cell("# @title Find kd_utils"), {})
    told = capsys.readouterr().out.count("That was not the kd_utils.py")
    assert told == 2 and Path("kd_utils.py").read_bytes() == module


def choose(dataset, profile="", **form):
    names = {"DATASET": dataset, "PROFILE": profile, "KEEP_ON_DRIVE": False}
    names |= {"LENGTHS": "auto", "RUN_FEW_LABELS": "auto"}
    names |= {"NETWORKS": "Custom CNN, LeNet-5", "TEACHER": "resnet50:IMAGENET1K_V1"}
    names |= form
    cells = ["PROFILES =", "# @title Choose the profile", "# @title Which parts run"]
    cells += ["# @title The networks, by", "teacher_name, weights ="]
    return run_cells(*cells, **names)


def test_profiles_networks_and_folders_are_chosen_by_name(
    monkeypatch, capsys, tmp_path
):
    three, trials = (5, 6, 7), (200, 201, 202)
    chosen = {"small": (96, 16, 16, 1, three, trials)}
    chosen["full"] = (128, 20, 20, 2, three, (200, 201))
    if kd.DEVICE.type == "cuda":
        chosen["full"] = (128, 20, 20, 2, (5, 6, 7, 8, 9), trials)
    for profile, numbers in chosen.items():
        found = choose("own/demo", profile)["SETTINGS"]
        sizes = found.image_size, found.epochs, found.trial_epochs, found.teacher_epochs
        assert (*sizes, found.seeds, found.trial_seeds) == numbers
        others = found.batch_size, found.min_crop, found.weight_decay
        assert others == (64, 0.35, 0.05)
        recipes = found.recipe_of("LeNet-5"), found.recipe_of("teacher").learning_rate
        assert recipes == (kd.Recipe(0.004, 8.0, 0.9), 2e-4)
        assert found.dataset == "own/demo" and found.runs_dir.name == f"demo-{profile}"
    assert ("No GPU" in capsys.readouterr().out) == (kd.DEVICE.type == "cpu")
    with pytest.raises(ValueError, match="'tpu' is none of full, small, demo"):
        choose("imagenette2-160", "tpu")
    monkeypatch.setenv("KD_RUNS_DIR", "~/kd")
    monkeypatch.setenv("KD_SEEDS", "4")
    assert choose("own", "full")["SETTINGS"].seeds == (5, 6, 7, 8)
    found = choose("imagenette2-160", "demo")["SETTINGS"]
    assert (found.seeds, found.epochs, found.teacher_weights) == ((0, 1, 2, 3), 2, None)
    assert found.dataset == "data/demo" and "~" not in str(found.runs_dir)
    names = run_cells("# @title How the classes")["CLASS_NAMES"]
    known = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]  # sorted by folder
    places = [known.index(names[folder]) for folder in sorted(names)]
    assert places == sorted(places) and len(places) == 20
    has_gpu = kd.DEVICE.type == "cuda"
    most = "1 2 4" if has_gpu else "1 2"
    expected = {"full": (most, True), "demo": ("1 2", True)}
    expected["small"] = (most, True) if has_gpu else ("1", False)
    for profile, auto in expected.items():
        found = choose("own", profile)
        assert (found["lengths"], found["run_few_labels"]) == auto
        assert found["run_all"] == auto[1]
    found = choose("own", "full", LENGTHS="1 4", RUN_FEW_LABELS="no")
    assert found["lengths"] == "1 4" and not found["run_few_labels"]
    colab = SimpleNamespace(drive=Mock())
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    folder = choose("own", "full", KEEP_ON_DRIVE=True)["SETTINGS"].runs_dir
    assert str(folder) == "/content/drive/MyDrive/VK_KD/own-full"
    colab.drive.mount.assert_called_once_with("/content/drive")
    # What cannot be had fails at the start, not an hour later
    for form in ({"TEACHER": "resnet51:IMAGENET1K_V1"}, {"NETWORKS": "resnet51"}):
        with pytest.raises(ValueError, match="Unknown model resnet51"):
            choose("own", "small", **form)
    for network in ("LeNet-5, resnet18:no/such/file", "resnet18:IMAGENET1K_V9"):
        with pytest.raises(ValueError, match="no file, nor one of IMAGENET1K_V1"):
            choose("own", "small", NETWORKS=network)
    path = tmp_path / "mine.pth"
    torch.save(kd.build_classifier(7, "resnet18").state_dict(), path)
    form = {"NETWORKS": f"LeNet-5, resnet18 ,resnet18:{path}", "TEACHER": "resnet34"}
    found = choose("pets.zip", "small", **form)
    kept, mine = found["SETTINGS"], "resnet18 (mine.pth)"
    assert list(found["STUDENTS"]) == ["LeNet-5", "resnet18", mine]
    assert found["PRETRAINED"] == {mine: str(path)} and kept.teacher == "resnet34"
    assert kept.teacher_weights is None and kept.runs_dir.name == "pets-small"
    assert kept.recipe_of(mine) == kept.recipe_of("teacher")
    assert kept.recipe_of("resnet18") == kd.Recipe(0.002, 4.0, 0.9)
    first = found["STUDENTS"][mine](num_classes=3).state_dict()["conv1.weight"]
    assert torch.equal(first, torch.load(path)["conv1.weight"])
    for wrong in ("no/such/file", "IMAGENET1K_V9"):
        monkeypatch.setenv("KD_TEACHER_WEIGHTS", wrong)
        with pytest.raises(ValueError, match=f"{wrong}.*IMAGENET1K_V1, IMAGENET1K_V2"):
            choose("imagewoof2-160", "small")


def zip_of(*names, path, **options):
    with ZipFile(path, "w", **options) as archive:
        for name in names:
            archive.writestr(name, photograph())
    return path


def test_own_photographs_are_found_in_folders_and_zips(tmp_path):
    cells = "# @title Unpack a zip", "# @title Find photographs of your own"
    find = run_cells(*cells)["find_photographs"]
    data = tmp_path / "data"
    inside = "all/pets/cat/1.jpg", "all/pets/dog/2/2.jpg", "__MACOSX/all/._x"
    plain = zip_of(*inside, path=tmp_path / "pets.zip")
    folder = find(plain, data)
    assert folder.name == "pets" and kd.class_folders(folder) == ["cat", "dog"]
    (folder / "cat/1.jpg").unlink()
    assert find(plain, data) == folder and not list(folder.glob("cat/*"))  # once
    assert find(data, data) == folder and find(folder.parents[1], data) == folder
    zip_of("cat/1.jpg", "dog/1.jpg", path=plain)  # another one of the same name
    folder = find(plain, data)
    assert folder.parent == data and kd.class_folders(folder) == ["cat", "dog"]
    mac = unmark(zip_of("Bälle/1.jpg", "dog/1.jpg", path=tmp_path / "mac.zip"))
    assert kd.class_folders(find(mac, data)) == ["Bälle", "dog"]
    sides = zip_of("x/train/a/1.jpg", "x/val/a/1.jpg", path=tmp_path / "sides.zip")
    assert kd.class_folders(find(sides, data)) == ["train", "val"]

    before = sorted(tmp_path.rglob("*"))
    cut, foreign = tmp_path / "cut.zip", tmp_path / "foreign.zip"
    cut.write_bytes(plain.read_bytes()[:-60])
    foreign.write_bytes(photograph())
    bad = bytearray(plain.read_bytes())
    bad[60] ^= 255  # in the first photograph
    (tmp_path / "bad.zip").write_bytes(bad)
    hostile = [zip_of(name, path=tmp_path / f"{n}.zip") for n, name in enumerate(OUT)]
    for path in (cut, foreign, tmp_path / "bad.zip", *hostile):
        with pytest.raises(ValueError, match=rf"{path.name} cannot be unpacked: "):
            find(path, data)
        path.unlink()
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(
        ValueError, match=r"'none': no folder, no zip, nor of \['imagew"
    ):
        find(Path("none"), data)


OUT = "../x.jpg", "a/../../x.jpg", "/x.jpg"


def test_health_of_the_data_is_told(tmp_path, settings, monkeypatch):
    for number in range(60):
        side = "val" if number % 4 == 0 else "train"
        save(tmp_path / side / "ab"[number > 40] / f"{number}.png", scene(number))
    save(tmp_path / "val/a/90.png", scene(1)[:, ::-1])  # on both sides, mirrored
    save(tmp_path / "val/b/91.png", scene(2))  # and under another label
    save(tmp_path / "train/b/92.png", scene(3))
    save(tmp_path / "train/b/93.png", scene(42))
    (tmp_path / "train/a/x.heic").write_bytes(b"nothing")
    (tmp_path / "train/a/x.jpg").write_bytes(b"nothing")
    (tmp_path / "train/.DS_Store").write_bytes(b"nothing")
    (tmp_path / "loose.png").write_bytes(b"nothing")
    loaded, shown = kd.load_splits(tmp_path, 32), []
    splits = {f"{side}_split": loaded[side] for side in ("train", "val")}
    given = {"loaded": loaded, "folder": tmp_path, "num_classes": 2, **splits}
    given["SETTINGS"] = settings
    cells = ["# @title Which photographs", "# @title Pairs by kind"]
    cells += ["# @title What is left", "# @title Advice from"]
    cells += ["# @title Sizes and", "# @title Sizes,", "# @title Pairs, two of"]
    cells.append("# @title Photographs and views")
    figures = show_nothing(monkeypatch)
    names = run_cells(*cells, Markdown=shown.append, **given)
    titles = [axis.get_title() for axis in figures[0].axes[:4]]
    assert titles == ["train:\na", "val:\na", "train:\na", "val:\nb"]
    one, other = (axis.images[0].get_array() for axis in figures[0].axes[:2])
    assert np.allclose(one, other[:, ::-1], atol=3)  # mirrored
    photos, *views = np.split(figures[1].axes[0].images[0].get_array(), 3)
    assert not any(np.allclose(view, photos) for view in views)
    files = [loaded["val"].paths[place] for place in loaded["val"].places.tolist()]
    copied = [Path(file).stem in ("90", "91") for file in files]
    assert names["in_train"].tolist() == copied
    for told in (
        "| train | 47 | 17 (b) | 30 (a) |",
        "| val | 17 | 5 (b) | 12 (a) |",
        "- Left out: 1 × no image (.heic), such as `train/a/x.heic`.",
        "- Left out: 1 × cannot be read, such as `train/a/x.jpg`.",
        "- Left out: 1 × hidden, such as `train/.DS_Store`.",
        "- Left out: 1 × in no class, such as `loose.png`.",
        "- Photographs of `val` that also stand in `train`: 2.",
        "- Pairs that are nearly the same, on both sides, with one label: 1, such as "
        "`train/a/1.png` and `val/a/90.png`.",
        "both sides, with two labels: 1, such as `train/a/2.png` and `val/b/91.png`.",
        "one side, with one label: 1, such as `train/b/42.png` and `train/b/93.png`.",
        "one side, with two labels: 1, such as `train/a/3.png` and `train/b/92.png`.",
        "`val` of 17: expect intervals of about ±19.4 points.",
        "- Few photographs to learn from (below 50): b 17, a 30.",
        "- 4 steps for a student and 4 for the teacher are few.",
        "- The held-out tenth is so small",
    ):
        assert told in shown[0], told
    names["SETTINGS"] = replace(settings, epochs=500)  # and large enough classes
    assert "1000 steps for a student and 4 for" in names["advise_on_data"]()[2]
    for copies, epochs, lines in ((20, 500, 2), (30, 500, 1), (30, 11, 2)):
        names["SETTINGS"] = replace(settings, epochs=epochs)
        names["train_split"] = loaded["train"].subset(torch.arange(47).repeat(copies))
        assert len(names["advise_on_data"]()) == lines


def test_unlabelled_photographs_are_taught_in_as_many_steps(settings, monkeypatch):
    Given.made, pictures = [], [scene(number) for number in range(60)]
    monkeypatch.setattr(kd, "Stage", Given)
    pictures[50] = pictures[32][:, ::-1]  # stands in val
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(kd.DEVICE)
    places = torch.arange(60, device=kd.DEVICE)
    whole = kd.Split(images, [], ("red", "green", "blue"), places, places % 3)
    train, val, rest = (whole.subset(part) for part in places.split([30, 10, 20]))
    rest = replace(rest, targets=torch.full_like(rest.targets, -1))
    train, rest = (replace(part, whole=None) for part in (train, rest))
    given = {"train_split": train, "val_split": val}
    join = run_cells("# @title Which photographs are there twice", **given)
    given |= {name: join[name] for name in ("join", "in_both")}
    given |= {"SETTINGS": replace(settings, epochs=49), "no_label_loss": len}
    given |= {"teacher": "teacher", "train": lambda stage: None}
    run_cells("unlabelled = loaded", loaded={"unlabelled": rest}, **given)
    [stage] = Given.made
    more, tested = stage.splits
    assert more.places.tolist() == [*range(30), *range(40, 50), *range(51, 60)]
    assert more.targets.tolist() == [n % 3 for n in range(30)] + 19 * [-1]
    assert more.whole is train and tested is val and stage.teacher == "teacher"
    assert stage.losses == {"distilled, unlabelled too": len}
    assert stage.settings == replace(settings, epochs=30)  # of 49: 30 / 49
    nothing = rest.subset(rest.places < 0)
    run_cells("unlabelled = loaded", loaded={"unlabelled": nothing}, **given)
    assert len(Given.made) == 1


def test_demo_draws_shapes_that_belong_to_their_class(tmp_path):
    cell = "# @title Draw the demo's photographs"
    draw = run_cells(cell)["draw_demo_dataset"]
    draw(tmp_path / "demo")
    split = kd.load_splits(tmp_path / "demo", 96)["train"]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert len(split) == 200 and len(split.classes) == 10
    red, _green, blue = split.images_at(slice(None)).float().cpu().unbind(1)
    shapes = {"gold": (red > 200) & (blue < 120), "plum": (red > 180) & (blue > 180)}
    for label, name in enumerate(split.classes):
        colour, corners = re.match(r"(\w+) (\d)", name).groups()
        filled = shapes[colour][split.targets.cpu() == label].float()
        rows, columns = filled.amax(2).sum(1), filled.amax(1).sum(1)
        share = (filled.sum((1, 2)) / (rows * columns)).mean()  # of the box around it
        expected = {"3": 0.5, "4": 1.0, "5": 0.69, "6": 0.75, "7": 0.74}[corners]
        assert share == pytest.approx(expected, abs=0.06), name


class Given:
    """In place of `kd.Stage`: it keeps what it is given, and is not trained. How often
    a student is right follows from its recipe."""

    BEST = MappingProxyType({"a": (0.00025, 8.0, 0.9), "b": (0.016, 1.0, 0.25)})

    def __init__(self, name, losses, settings, splits, networks=None, teacher=None):
        self.name, self.losses, self.settings = name, losses, settings
        self.splits, self.networks, self.teacher = splits, networks, teacher
        self.val_split = splits[1]
        keys = product(networks, losses, settings.seeds)
        self.students = [self.learn(*key) for key in keys]
        Given.made.append(self)

    def learn(self, network_name, arm, seed):
        student = SimpleNamespace(network="trained", network_name=network_name)
        student.key, recipe = (network_name, arm, seed), self.settings.recipes
        targets = self.val_split.targets.cpu()
        right = torch.ones(len(targets))
        if " at " in network_name:  # a trial
            distance = self.distance(network_name[0], recipe[network_name])
            right = torch.arange(len(targets)) < 40 - 2 * distance - seed % 3
        student.logits = torch.eye(3)[(targets + ~right.bool()) % 3]
        return student

    def distance(self, name, recipe):
        """From the best recipe, in steps of the ladders."""
        rate, T, alpha = self.BEST[name]
        if self.teacher is None:
            return abs(math.log2(recipe.learning_rate / rate))
        steps = [0.1, 0.25, 0.5, 0.9, 1.0]
        steps = abs(steps.index(recipe.alpha) - steps.index(alpha))
        return abs(math.log2(recipe.temperature / T)) + steps


@pytest.fixture
def chosen(settings, monkeypatch, capsys):
    """What the choosing cells leave: their names, and the stages."""
    numbers = {"teacher": "resnet18", "teacher_weights": "x.pth", "teacher_epochs": 7}
    numbers |= {"trial_epochs": 5, "trial_seeds": (100, 101, 102)}
    given = {"SETTINGS": replace(settings, **numbers), "train_split": make_split(500)}
    given |= {"RUN_CHOICES": "auto", "run_all": True, "splits": (make_split(), VAL)}
    monkeypatch.setattr(kd, "Stage", Given)
    given["STUDENTS"] = {"a": tiny, "b": tiny}
    Given.made = []
    cells = ["def label_loss", "def fine_tune_teacher", "is_tenth ="]
    cells += ["from contextlib import", "# @title Answers at several temp"]
    cells += ["def change", "def best_of", "def choose(", "run_choices ="]
    cells.append("def distilled_loss")
    given["train"] = lambda stage: print(f"{stage.name}\nx is now y: z")
    names = run_cells(*cells, "trial_teacher =", "ALPHAS =", **given)
    return names, Given.made


def test_choices_find_the_best_beyond_their_first_grid_and_adopt_it(chosen, capsys):
    names, _ = chosen
    for name, best in Given.BEST.items():
        recipe = names["SETTINGS"].recipe_of(name)
        assert (recipe.learning_rate, recipe.temperature, recipe.alpha) == best
    # Beyond both ends of the first grid, and one step beyond the best
    grid = {0.0005, 0.001, 0.002, 0.004, 0.008}
    for name, more in {"a": {0.00025, 0.000125}, "b": {0.016, 0.032}}.items():
        assert {rate for (rate,) in names["rate_hits"][name]} == grid | more
    assert set(product((1, 2, 4, 8), (0.5, 0.9))) <= set(names["pair_hits"]["a"])
    hits = names["pair_hits"]["b"][1.0, 0.25]
    assert hits.sum(1).tolist() == [40 - seed % 3 for seed in (100, 101, 102)]
    said = capsys.readouterr().out
    assert "x is now y" in said and " at " not in said
    for word, count in (("yes", 2), ("no", 0)):
        given = {**names, "RUN_CHOICES": word, "run_all": word == "no"}
        assert len(run_cells("run_choices =", **given)["rate_hits"]) == count


def test_choices_and_teacher_get_what_they_should(chosen, settings):
    names, made = chosen
    split, held_out = names["train_split"], torch.arange(500) % 10 == 0
    trials = [stage for stage in made if stage.name != "teacher"]
    [teacher] = [stage for stage in made if stage.name == "teacher"]
    for stage in made:
        for part, rows in zip(stage.splits, (~held_out, held_out), strict=True):
            assert torch.equal(part.images_at(slice(None)), split.images_at(rows))
            assert torch.equal(part.targets, split.targets[rows])
        assert stage.settings.runs_dir == settings.runs_dir / "trials"
    for stage in trials:
        assert stage.settings.seeds == (100, 101, 102) and stage.settings.epochs == 5
        assert not stage.settings.keep_weights
        assert all(build is tiny for build in stage.networks.values())
        [loss] = stage.losses.values()
        rate_only = stage.teacher is None
        assert loss is names["label_loss" if rate_only else "distilled_loss"]
        assert rate_only or stage.teacher == "trained"
        for label, recipe in stage.settings.recipes.items():
            numbers = [float(text) for text in label.split(" at ")[1].split()]
            if rate_only:
                assert numbers == [recipe.learning_rate]
            else:  # at the rate that was chosen before
                assert numbers == [recipe.temperature, recipe.alpha]
                assert recipe.learning_rate == Given.BEST[label[0]][0]
    assert len({stage.name for stage in made}) == len(made)  # each in a file of its own
    assert teacher.settings.epochs == 7 and teacher.settings.seeds == (0,)
    assert teacher.settings.keep_weights
    build = teacher.networks["teacher"]
    assert build.func is kd.build_classifier
    assert build.keywords == {"name": "resnet18", "weights": "x.pth"}
    names["fine_tune_teacher"]("teacher")
    assert made[-1].splits == names["splits"]
    assert made[-1].settings.runs_dir == settings.runs_dir


def test_a_choice_is_told_with_the_lead_over_the_runner_up(monkeypatch):
    shown, figures = [], show_nothing(monkeypatch)
    cells = "# @title A choice as a table", "# @title A choice as a figure"
    names = run_cells("def best_of", *cells, Markdown=shown.append)
    right = [[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 1, 0, 0]]
    hits = {(2.0, 0.5): np.array(right[1]), (4.0, 0.9): np.array(right[0])}
    hits[8.0, 0.9] = np.zeros((2, 4))
    names["tell_choice"]({"one|two": hits}, ["T", "α"])
    lead = find_interval(100 * (hits[4.0, 0.9] - hits[2.0, 0.5]))
    mean, low, high = np.clip(lead, -100, 100)
    lead = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    rows = shown[0].splitlines()[2:]
    assert rows[0] == rf"| one\|two | **T 4, α 0.9** | 62.5 | {lead} |"
    assert [row.split(" | ")[1] for row in rows[1:]] == ["T 2, α 0.5", "T 8, α 0.9"]
    assert rows[1].split(" | ")[2] == "37.5" and mean == 25
    names["plot_choice"]({"x": hits}, ["T", "α"])
    lines = [line.get_xydata().tolist() for line in figures[0].axes[0].lines]
    assert lines == [[[2, 37.5]], [[4, 62.5], [8, 0]], [[4, 62.5]]]
    legend = [text.get_text() for text in figures[0].axes[0].get_legend().texts]
    assert legend == ["α 0.5", "α 0.9", "chosen"]


def test_losses_of_arms_are_those_of_plain_formulas(settings):
    targets = torch.arange(6, device=kd.DEVICE) // 2
    images = (40 * torch.arange(6, dtype=torch.uint8)).view(6, 1, 1, 1)
    images = images.expand(6, 3, 32, 32).to(kd.DEVICE)
    weights = torch.tensor([[1.0, -2.0, 0.5]], device=kd.DEVICE)
    other = kd.Recipe(temperature=2.0, alpha=1.0)
    given = {
        "teacher": lambda images: images.mean((1, 2, 3)).view(-1, 1) * weights,
        "train_split": kd.Split(images, [], ("a", "b", "c"), torch.arange(6), targets),
        "SETTINGS": replace(settings, batch_size=6, recipes={"LeNet-5": other}),
        "num_classes": 3,
        "run_few_labels": False,
    }
    cells = "def label_loss", "def distilled_loss", "def find_class", "def class_mean"
    names = run_cells(*cells, "def no_label_loss", **given)
    assert set(names["class_means"]) == {2.0, 3.0}
    names |= {"plt": MagicMock(), "draw_shares": Mock()}
    names["plt"].subplots.return_value = None, Mock()
    exec(find_cell("# @title The class means, in"), names)
    drawn = names["draw_shares"].call_args[0][1]  # a row is a class
    assert drawn == names["class_means"][2.0].tolist()
    names["train_split"] = given["train_split"].subset(targets < 2)  # one is not seen
    assert names["find_class_means"](given["teacher"])[2.0].isfinite().all()
    logits, label = torch.tensor([[1.0, 0.0, 2.0]], device=kd.DEVICE), targets[2:3]
    hard = [math.log(math.e + 1 + math.e**2) - z for z in (1, 0, 2)]
    for T, alpha in ((3.0, 0.5), (2.0, 1.0)):
        recipe = kd.Recipe(temperature=T, alpha=alpha)
        soft = (given["teacher"](kd.normalise(images)) / T).softmax(1)
        p, q = soft[2:4].mean(0), (logits[0] / T).softmax(0)
        found = names["class_mean_loss"](logits, None, label, recipe).item()
        kl = (p * (p / q).log()).sum().item()
        expected = alpha * T**2 * kl + (1 - alpha) * hard[1]
        assert found == pytest.approx(expected, rel=1e-4)
        found = names["distilled_loss"](logits, logits, label, recipe).item()
        assert found == pytest.approx((1 - alpha) * hard[1], abs=1e-6)
        p = (2 * logits[0] / T).softmax(0)
        found = names["no_label_loss"](logits, 2 * logits, label, recipe).item()
        kl = (p * (p / q).log()).sum().item()
        assert found == pytest.approx(T**2 * kl, rel=1e-4)
        none = names["no_label_loss"](logits, 2 * logits, -1 + 0 * label, recipe)
        assert none.item() == pytest.approx(found)
    given = {"kd": SimpleNamespace(Stage=Mock()), "train": Mock(), "SETTINGS": settings}
    arms = {
        "class mean": names["class_mean_loss"],
        "distilled": names["distilled_loss"],
    }
    given |= {
        "distilled_loss": arms["distilled"],
        "class_mean_loss": arms["class mean"],
    }
    given |= {"splits": (), "teacher": None}
    assert run_cells("LOSSES_2 =", **given)["LOSSES_2"] == arms
    found = names["label_loss"](logits, None, label, recipe).item()
    assert found == pytest.approx(hard[1])
    nothing = SimpleNamespace(Stage=Mock(), DEVICE=kd.DEVICE)
    given = {"kd": nothing, "train": Mock(), "SETTINGS": settings, "splits": ()}
    names = run_cells("def smoothed_loss", label_loss=len, **given)
    smoothed = names["smoothed_loss"]
    arms = {"alone": len, "smoothed": smoothed}
    again = {"alone again": len} if kd.DEVICE.type == "cuda" else {}
    assert names["LOSSES_1"] == {**arms, **again}
    expected = 0.9 * hard[1] + 0.1 * sum(hard) / 3
    assert smoothed(logits, None, label, recipe).item() == pytest.approx(expected)
    names, maps = (
        run_cells("MAPS =", distilled_loss=lambda *_: 1.0),
        torch.zeros(1, 2, 8, 8),
    )
    maps[:, :, :4] = 1  # above
    for other, gap in ((3 * maps, 0), (3 * maps.flip(2), 2)):  # as strong, elsewhere
        names["MAPS"].update(student=maps, teacher=other)
        assert names["attention_loss"](*[None] * 4).item() == pytest.approx(gap + 1)


def test_figures_of_the_idea(settings, monkeypatch):
    figures, drawn = show_nothing(monkeypatch), Mock()
    cells = "# @title Answers at several temp", "student_logits = torch"
    run_cells(*cells, "# @title The gradient of")
    lines = [line.get_ydata() for line in figures[0].axes[0].lines]
    sizes, T = np.array([0.27, 0.47, 0.61, 0.68, 0.71]), 2.0 ** np.arange(5)
    assert lines[0] == pytest.approx(sizes, abs=0.005)  # with T²
    assert lines[1] == pytest.approx(sizes / T**2, abs=0.005)
    assert figures[0].axes[0].lines[0].get_label() == "with T²"

    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 5.0]])
    given = {"teacher": lambda views: logits.to(views.device), "val_split": VAL}
    given |= {"find_example": lambda: (0, [2, 0, 1], "abc"), "draw_shares": drawn}
    run_cells("# @title Three views of it", SETTINGS=settings, **given)
    expected = softmax(logits)[:, [2, 0, 1]].T  # a column is a view
    _, shares, *names = drawn.call_args[0]
    assert np.allclose(shares, expected)
    assert names == ["abc", ["view 1", "view 2", "view 3"]]
    assert figures[1].axes[0].images[0].get_array().mean((0, 1)).argmax() == 0  # red


def test_longer_and_few_labels_get_what_they_should(settings, monkeypatch):
    settings = replace(settings, teacher="resnet18", teacher_weights=None)
    Given.made, tuned = [], Mock(return_value="few teacher")
    monkeypatch.setattr(kd, "Stage", Given)
    split = make_split(95)
    given = {"SETTINGS": settings, "train_split": split, "val_split": VAL}
    given |= {"splits": (split, VAL), "teacher": "teacher", "lengths": "1 2 4"}
    given |= {"run_few_labels": True, "fine_tune_teacher": tuned}
    given |= {"train": lambda stage: None, "trial_splits": "held out"}
    losses = run_cells("def label_loss", "def distilled_loss")
    given |= {name: losses[name] for name in ("label_loss", "distilled_loss")}
    names = run_cells("for times in", "def no_label_loss", **given)
    twice, four, alone, taught = Given.made
    for stage, times in ((twice, 2), (four, 4)):
        assert stage.settings == replace(settings, epochs=times * settings.epochs)
        assert stage.splits == (split, VAL) and stage.teacher == "teacher"
        expected = {f"{arm} ×{times}": losses[f"{part}_loss"] for arm, part in PARTS}
        assert stage.losses == expected
    few, val = alone.splits
    rows = [5, 15, 25, 35, 45, 55, 65, 75, 85]
    assert (
        torch.equal(few.images_at(slice(None)), split.images_at(rows * 10))
        and val is VAL
    )
    assert alone.settings == taught.settings == settings and alone.teacher is None
    assert alone.losses == {"alone, few labels": losses["label_loss"]}
    assert taught.losses == {"distilled, few labels": names["no_label_loss"]}
    assert taught.splits == (split, VAL) and taught.teacher == "few teacher"
    tuned.assert_called_once_with("few labels, teacher", alone.splits)

    trial = replace(settings, trial_seeds=(7, 8), trial_epochs=9)
    given |= {"SETTINGS": trial, "train_split": make_split(50), "trial_teacher": "own"}
    names = run_cells("is_tenth =", **given)
    run_cells("settings = replace(make_trial()", **names)
    held_out = Given.made[-1]
    assert held_out.splits is names["trial_splits"] and held_out.teacher == "own"
    assert held_out.settings.seeds == (7,) and held_out.settings.epochs == 2
    assert held_out.settings.runs_dir == settings.runs_dir / "held out"
    assert held_out.losses == {arm: losses[f"{part}_loss"] for arm, part in PARTS}


def attending(num_classes):
    """A transformer's layer for 8 tokens of 16 numbers."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    patches = nn.Conv2d(3, 8, 8, stride=8, bias=False)  # 16 of them
    return nn.Sequential(patches, nn.Flatten(2), layer)


def test_alone_gets_the_epochs_that_a_distilled_student_costs(settings, monkeypatch):
    Given.made = []
    monkeypatch.setattr(kd, "Stage", Given)
    settings = replace(settings, epochs=20, teacher_epochs=2)
    counts = {"a": 240.0, "b": 7.0, "teacher": 1330.0}
    given = {"num_classes": 3}
    given["STUDENTS"] = {"a": tiny, "b": tiny}
    names = run_cells("# @title Multiply-adds of", SETTINGS=settings, **given)
    assert names["count_multiply_adds"](tiny, 32) == 7 * 7 * 8 * 75 + 8 * 3
    by_hand = 16 * 8 * 3 * 64 + 4 * 8 * 16**2 + 2 * 8**2 * 16 + 2 * 8 * 16 * 32
    assert names["count_multiply_adds"](attending, 32) == by_hand
    given = {"SETTINGS": settings, "BUILDS": dict(zip(counts, counts, strict=True))}
    given["STUDENTS"] = {"a": tiny, "b": tiny}
    given |= {
        "count_multiply_adds": lambda build, size: counts[build],
        "lengths": "1 2",
    }
    given |= {"splits": ((), VAL)}
    given |= {"train": lambda stage: None, "label_loss": len}
    given["affordable_epochs"] = names["affordable_epochs"]
    run_cells("adds = {n:", **given)
    # 26 readings of 1330 for 3 · 240 an epoch: 48 epochs more, or 9.6; of b too many
    made = [
        (stage.networks, stage.losses, stage.settings.epochs) for stage in Given.made
    ]
    expected = [({"a": tiny}, {f"alone for {n} epochs": len}, n) for n in (68, 29)]
    assert made == expected and Given.made[0].teacher is None
    given["lengths"] = "1"
    run_cells("adds = {n:", **given)
    assert len(Given.made) == 2


def test_estimate_of_minutes_counts_every_pass(settings):
    given = {"count_multiply_adds": lambda build, size: build * size * 1e6}
    given["BUILDS"] = {"Custom CNN": 2, "LeNet-5": 1, "teacher": 10}
    small = {"image_size": 96, "seeds": (0, 1, 2), "epochs": 16, "teacher_epochs": 1}
    given["affordable_epochs"] = lambda *x: 20 if x[3] > 1 else 65
    cells = "# @title Speeds, and", "# @title The minutes of each part"
    estimate = run_cells(*cells, **given)["estimate"]
    found = estimate(kd.Settings(**small, trial_epochs=16), 1e9, 9025)
    adds = 9025 * 96e6 / 1e9 / 60  # minutes for one pass of a network of one
    arm, reading, tuning = 3 * 16 * 3 * 3 * adds, 16 * 10 * adds, 3 * 10 * adds
    expected = {"Experiment 1": 2 * arm, "Experiment 2": 2 * arm + reading + tuning}
    expected["the choices"] = 13 * 0.9 * arm + reading
    expected["twice as long"] = 4 * arm + 2 * reading
    expected["four times as long"] = 8 * arm + 4 * reading
    expected["at equal cost"] = 20 * 3 * 3 * 3 * adds  # 65 are more than 4 · 16
    expected["few labels"] = 2 * arm + reading + tuning
    expected["temperatures"] = 2 * arm / 3 + reading + tuning
    expected["all"] = sum(expected.values())
    assert found == {part: f"{minutes:.0f}" for part, minutes in expected.items()}
    assert estimate(kd.Settings(**small, trial_epochs=16), 1e15, 9025)["all"] == "< 1"


class Sized(nn.Sequential):
    """For images of one size only, as torchvision's transformers."""

    def forward(self, images):
        assert images.shape[-1] == 32, "wrong height"
        return super().forward(images)


class Twice(nn.Sequential):
    """Of two outputs, as GoogLeNet."""

    def forward(self, images):
        return (super().forward(images),) * 2


def test_networks_for_one_size_of_images(settings):
    given = {"num_classes": 3, "train_split": VAL, "SETTINGS": settings}
    given["BUILDS"] = {"sized": lambda num_classes: Sized(tiny(num_classes))}
    cell = "# @title Can every network learn"
    run_cells(cell, **given)
    given["train_split"] = replace(VAL, pixels=VAL.pixels[..., :16, :16])
    message = rf"sized cannot learn .* {settings.image_size} pixels.*\(wrong height"
    with pytest.raises(ValueError, match=message):
        run_cells(cell, **given)
    given["BUILDS"] = {"two": lambda num_classes: Twice(tiny(num_classes))}
    with pytest.raises(ValueError, match=r"two cannot learn .*need logits \(4, 3\)"):
        run_cells(cell, **given)

    def estimate(settings, *others):
        assert settings.image_size in (96, 32)
        return {"all": (settings.image_size, *others)}

    given |= {"estimate": estimate, "SPEEDS": {"full": ("T", 1), "small": ("C", 3)}}
    given |= {"PROFILES": {"full": {}, "small": {"image_size": 96}}}
    given["DATASET"] = "imagewoof2-160"
    given |= {"has_gpu": False, "table": lambda *lines: lines, "Markdown": Mock()}
    run_cells("# @title How long will it take?", **given)
    header = ["minutes for", "small on C", "these SETTINGS on C"]
    row = ["all", (96, 3, 9025, 2), (32, 3, 24, 2)]  # the last: arms of Experiment 1
    assert given["Markdown"].call_args[0][0] == (header, [row])


PARTS = (("alone", "label"), ("distilled", "distilled"))


def test_printed_quality_is_of_the_last_epoch(capsys, monkeypatch):
    students, figures = [], show_nothing(monkeypatch)
    for values in ([0.2, 0.9, 0.5], [0.3, 0.9, 0.6]):
        history = {"val_accuracy": values, "train_accuracy": [0.1] * 3}
        student = SimpleNamespace(key=("a", "b", 0), history=history)
        student.network_name, student.arm, _ = student.key
        student.logits = ANSWERS["alone", 0]
        students.append(student)
    cell = {"untaught": SimpleNamespace(students=students)}
    run_cells("def tell_quality", **cell)
    told = capsys.readouterr().out
    assert "same answer" not in told
    students[1].logits = torch.eye(3)[[2] * 24]
    run_cells("def tell_quality", **cell)
    assert "One of them gives every image the same answer" in capsys.readouterr().out
    assert "a, b: 55.0 % of val right, from 50.0 to 60.0 (2 seeds); the best" in told
    assert "would say 90.0" in told
    curves = run_cells("# @title Learning curves:", COLOURS={}, plt=plt)["plot_curves"]
    curves(students)
    val, train = figures[0].axes[0].lines
    assert val.get_ydata() == pytest.approx([25, 90, 55]) and val.get_linestyle() == "-"
    assert [*val.get_xdata()] == [1, 2, 3]  # epochs
    [band] = figures[0].axes[0].collections
    box = band.get_paths()[0].get_extents().extents  # the lowest and the highest seed
    assert box == pytest.approx([1, 20, 3, 90])
    assert val.get_label() == "b, val" and train.get_ydata() == pytest.approx([10] * 3)

    logits = torch.eye(3)[PLACE // 12]  # never the third class
    monkeypatch.setattr(kd, "predict", lambda *_: logits)
    run_cells("files = [", val_split=VAL, fine_tune_teacher=str)
    told = capsys.readouterr().out
    assert f"{hits(logits)[::4].mean():.1%} right on the 6 never-seen images" in told
    assert "It never answers blue: give" in told


# ── The report, against an independent calculation ────────────────────────
TRUTH, LEVELS = VAL.targets.cpu().numpy(), ("alone", "distilled")
PAIR = ("alone", "alone again")


def softmax(logits):
    powers = np.exp(logits.double().numpy())
    return powers / powers.sum(1, keepdims=True)


def hits(logits):
    return (logits.argmax(1).numpy() == TRUTH).astype(float)


def nll(logits):
    return -np.log(softmax(logits)[range(24), TRUTH])


def ece(logits):
    """[24], with the expected calibration error as its mean."""
    p, parts = softmax(logits).max(1), np.zeros(24)
    for number in range(1, 16):
        chosen = np.ceil(15 * p) == number
        gaps = hits(logits)[chosen] - p[chosen]
        parts[chosen] = gaps * np.sign(gaps.sum())
    return parts


def recalls(logits):
    return np.array([100 * hits(logits)[label == TRUTH].mean() for label in range(3)])


def floor(arm):
    """The ECE of labels that are drawn by the probabilities themselves."""
    found = []
    for seed in range(len(RIGHT[arm])):
        logits = ANSWERS[arm, seed]
        with kd.seeded(0):
            drawn = torch.multinomial(logits.softmax(1), 1)[:, 0]
        p, gap = softmax(logits).max(1), 0.0
        right = (logits.argmax(1) == drawn).numpy()
        for number in range(1, 16):
            chosen = np.ceil(15 * p) == number
            gap += abs(right[chosen].sum() - p[chosen].sum()) / 24
        found.append(gap)
    return np.mean(found)


def each(arm, measure=hits, T=1.0):
    """[seeds, …] of an arm."""
    return np.array([measure(ANSWERS[arm, s] / T) for s in range(len(RIGHT[arm]))])


def level(arm):
    return f"{100 * each(arm).mean():.1f}"


def write(values, digits=3, sign="", most=math.inf):
    least = -most if sign else 0
    found = [min(most, max(least, value)) for value in find_interval(values)]
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in found)
    return f"{mean} [{low}, {high}]"


def gain(arm, other="alone", images=slice(None)):
    return write(100 * (each(arm) - each(other))[:, images], 1, "+", most=100)


def word_of(change):
    _, low, high = find_interval(change)
    word = "worse" if low > 0 else "better" if high < 0 else "cannot tell"
    return f"{word} ({write(change, sign='+')})"


def fit(logits):
    """The best of 401 temperatures on the held-out images."""
    truth, temperatures = HELD_OUT.targets.cpu().numpy(), np.geomspace(0.1, 10, 401)
    losses = [
        -np.log(softmax(logits / T)[range(24), truth]).mean() for T in temperatures
    ]
    return temperatures[np.argmin(losses)]


FITTED = [fit(HELD_OUT_ANSWERS[arm, 100]) for arm in LEVELS]


def show_nothing(monkeypatch):
    """Figures are kept in this list instead of shown."""
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    return figures


@pytest.fixture
def report(settings, monkeypatch):
    """Runs its cells on the study: {title: what it shows}, {title: figures}."""
    made = show_nothing(monkeypatch)
    settings = replace(settings, teacher="resnet18")

    def run(settings=settings):
        shown = []
        given = {"SETTINGS": settings, "val_split": VAL, "is_drawn": False}
        given |= {"num_classes": 3, "trial_splits": (None, HELD_OUT), "PRETRAINED": {}}
        given |= {"DATASET": "own-160", "profile": "demo", "STUDENTS": {"tiny": tiny}}
        given |= {"never_seen": np.arange(24) % 4 == 0, "in_train": PLACE % 5 == 1}
        given["teacher_val_logits"] = ANSWERS["teacher", 0]
        given["measure_latency"] = lambda _, device, threads: f"1 ms ({device!r})"
        given["Markdown"] = shown.append
        titles = [source.split("\n")[0] for source in code_cells()]
        first = titles.index("# @title What the finished stages left")
        last = titles.index("# @title Your own photograph")
        before = ["# @title Colours", "# @title Multiply-adds of"]
        before += ["# @title Tables of shares", "# @title The photograph to look at"]
        before += ["# @title Answers at several", "# @title Its answer at five"]
        titles = before + titles[first:last]
        given = run_cells(**given)
        texts, figures = {}, {}
        for title in titles:
            if title == "# @title Latency":
                continue
            before, drawn = len(shown), len(made)
            exec(find_cell(title), given)
            texts[title[9:]] = "\n".join(shown[before:])
            figures[title[9:]] = made[drawn:]
        return texts, figures

    return run


def starting(found, start):
    [text] = [value for title, value in found.items() if title.startswith(start)]
    return text


def verdict(arm, other="alone"):
    _, low, high = find_interval(each(arm) - each(other))
    return "helps" if low > 0 else "hurts" if high < 0 else "inconclusive"


def test_report_gives_gains_and_verdicts(settings, report, monkeypatch):
    make_study(settings)
    texts, figures = report()
    sentence = starting(texts, "In a sentence")
    assert sentence.startswith("- **Distillation into tiny: helps.** It learned more")
    assert sentence.split("\n")[0].endswith(f"{gain('distilled')} points.")
    assert "numbers mean nothing" not in sentence
    assert f"The teacher is right on {level('teacher')} % of 24 images." in sentence
    never_seen = gain("distilled", images=slice(0, None, 4))
    row = f"{level('alone')} | {level('distilled')} | {gain('distilled')} | 2 of 2"
    assert f"| tiny | {row} | {never_seen} |" in starting(texts, "Did it help")
    table = starting(texts, "At equal epochs")
    for arm, epochs in (("", 2), (" ×2", 4)):
        row = [epochs, level("alone" + arm), level("distilled" + arm)]
        pair = "distilled" + arm, "alone" + arm
        row += [gain(*pair), verdict(*pair)]
        assert f"| tiny | {' | '.join(map(str, row))} |" in table
    few = [f"{arm}, few labels" for arm in LEVELS]
    row = [*map(level, few), level("few labels, teacher"), gain(few[1], few[0])]
    row.append(verdict(few[1], few[0]))
    assert f"| tiny | {' | '.join(row)} |" in starting(texts, "Alone with a tenth")
    row = [gain("smoothed"), gain("class mean"), gain("distilled")]
    row += [gain("distilled", "smoothed"), gain("distilled", "class mean")]
    assert f"| tiny | {' | '.join(row)} |" in starting(texts, "The controls")
    rest = gain("distilled", images=(PLACE % 5 != 1).numpy())
    worth = f"- tiny: {gain('distilled')} with these 5, {rest} without."
    assert starting(texts, "What are the photographs worth") == worth
    assert starting(texts, "Which small network").startswith("None started from")
    words = starting(texts, "The same in words").splitlines()
    assert words[0].endswith(
        "cannot tell whether *smoothed* helps: it says nothing here."
    )
    assert words[1].endswith(
        "helps, too; the run cannot tell whether *distilled* is ahead of it."
    )
    answers = [each(arm, lambda z: z.argmax(1).numpy()) for arm in PAIR]
    told = starting(texts, "How far may")
    assert f"answers {(answers[0] != answers[1]).mean():.1%} of the images oth" in told
    assert f"gains {gain('alone again')}, as it should." in told
    ran = texts["Settings, machine, teacher"]
    assert "learning_rate of tiny 0.004; temperature of tiny 3.0" in ran
    assert "| few labels, teacher | 2 | 0 |" in ran
    assert "| 2 times as long | 4 | 0, 1 |" in ran

    heads = [text.split("\n")[0] for text in texts.values() if text.startswith("| ")]
    heads = [head for head in heads if not re.search("[0-9] (never|thr)", head)]
    committed = text_of(read(WOOF)) + text_of(read(NETTE))
    assert len(heads) == 8 and all(head in committed for head in heads)
    [axis] = starting(figures, "Gain over")[0].axes
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert names == [*list(RIGHT)[1:6], "distilled ×2"]
    assert axis.get_ylim() == (5.6, -0.6) and axis.lines[-1].get_xdata() == [0, 0]
    drawn = [line.get_xdata() for line in axis.lines]
    for place, arm in enumerate(names):
        other = "alone ×2" if "×2" in arm else "alone"
        gains = 100 * (each(arm) - each(other))
        mean, low, high = find_interval(gains)
        bar, dot, seeds = drawn[3 * place : 3 * place + 3]
        assert [*bar, *dot] == pytest.approx([low, high, mean])
        assert sorted(seeds) == pytest.approx(sorted(gains.mean(1)))
    [axis] = starting(figures, "Accuracy at the end")[0].axes
    ends = [line for line in axis.lines if line.get_marker() == "o"]
    for line, arm in zip(ends, LEVELS, strict=True):
        assert line.get_label() == arm
        expected = [[2, 100 * each(arm).mean()], [4, 100 * each(f"{arm} ×2").mean()]]
        assert line.get_xydata() == pytest.approx(np.array(expected), abs=1e-4)
    assert f"(teacher: {level('teacher')} %)" in axis.get_title()
    assert f"{axis.lines[-1].get_ydata()[0]:.1f}" == level("teacher")
    [way] = [line for line in axis.lines if line.get_alpha()][:1]
    assert way.get_ydata() == pytest.approx([90, 100 * each("alone").mean()])
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    ends = [100 * each(arm).mean(1) for arm in ("alone", "alone ×2")]
    assert [band.min(), band.max()] == pytest.approx([np.min(ends), np.max(ends)])
    above, below = starting(figures, "Its answer at five")[0].axes
    assert above.images[0].get_array().sum() == VAL.images_at(9).sum().item()
    p = [softmax(ANSWERS["teacher", 0] / T)[9] for T in (1, 2, 4, 8, 16)]
    shares = [f"{100 * share:.0f}" for share in np.sort(p)[:, ::-1].T.flatten()]
    shares += [*(f"T = {T}" for T in (1, 2, 4, 8, 16)), VAL.classes[p[0].argmax()]]
    texts = [*below.texts, *below.get_xticklabels(), below.get_yticklabels()[0]]
    assert [text.get_text() for text in texts] == shares
    assert below.texts[1].get_position() == (1, 0)

    # A seed without a gain is not won; a report without the teacher
    monkeypatch.setitem(ANSWERS, ("distilled", 0), ANSWERS["alone", 0])
    make_study(settings)
    for name in ("teacher", "few labels, teacher"):
        (settings.runs_dir / f"{name}.pt").unlink()
    texts, _ = report()
    assert f"{level('distilled, few labels')} | – |" in starting(texts, "Alone with a")
    assert "| 1 of 2 |" in starting(texts, "Did it help")
    assert starting(texts, "At equal cost").startswith("This needs both experiments")


def test_a_student_is_compared_with_a_fine_tuned_one(tmp_path):
    right = {("a", "distilled"): [1, 1, 1, 1, 0], ("b", "alone"): [1, 0, 0, 0, 0]}
    right |= {("a", "alone"): [0, 0, 0, 0, 0], ("b", "distilled"): [1, 1, 0, 0, 0]}
    right["c", "distilled"] = [0, 0, 0, 0, 0]
    values = {key: np.tile(row, (2, 40)) for key, row in right.items()}
    shown, both = [], ("alone", "distilled")
    given = {"ARMS": dict.fromkeys("ab", both), "BOTH": ["a", "b"]}
    given["values_of"] = lambda name, arm: dict(enumerate(values[name, arm]))
    given["paired"] = read_results(tmp_path, VAL)["paired"]
    given |= {"PRETRAINED": {"b": "x.pth"}, "Markdown": shown.append, "in_train": None}
    given |= {
        "mean_of": lambda name, arm: 100 * values[name, arm].mean(),
    }
    cells = "# @title Against a network", "# @title Which small network"
    names = run_cells("# @title What a verdict", *cells, **given)
    behind = names["tell_lead"]("c", "b")
    assert behind.startswith("- c, distilled, is behind b, alone: -20.0 [")
    lead = write(100 * (values["a", "distilled"] - values["b", "alone"]), 1, "+")
    told = f"- a, distilled, is ahead of b, alone: {lead} points."
    assert shown[0].splitlines()[-1] == told and lead.startswith("+60.0 [")
    assert "| a | random | 0.0 → 80.0 |" in shown[0]
    assert "| b | x.pth | 20.0 → 40.0 |" in shown[0]


def test_costs_are_multiply_adds_of_student_and_teacher(settings, report):
    make_study(settings)
    texts, _ = report()
    table = starting(texts, "At equal cost")
    student = 7 * 7 * 8 * 75 + 8 * 3  # tiny at 32 px: a convolution, a linear layer
    conv, sides = 3 * 49 * 64 * 16**2, (8, 4, 2, 1)
    for side, width in zip(sides, (64, 128, 256, 512), strict=True):
        before = max(64, width // 2)
        conv += side**2 * 9 * width * (before + 3 * width)
        conv += side**2 * width * before * (side < 8)  # the shortcut
    teacher = conv + 512 * 3
    running = starting(texts, "The cost of running")
    row = (
        f"| resnet18 | 11,178,051 | {teacher / 1e6:,.1f} M | 44.71 MB | 1 ms ('cpu') |"
    )
    assert row in running and "| tiny | 643 | 0.0 M | 0.00 MB |" in running
    clock = Mock(perf_counter=Mock(side_effect=np.cumsum([0, 9] + [0.002] * 20)))
    latency = run_cells("# @title Latency", time=clock, SETTINGS=settings)
    assert latency["measure_latency"](tiny(3).eval(), "cpu", 1) == "2.0 ms"
    for students, epochs in product((1, 5), (2, 4)):
        # Fine-tuned for two epochs; an own step is three times an answer
        cost = epochs + (epochs + 3 * 2) * teacher / (3 * student * students)
        arm = "distilled" if epochs == 2 else "distilled ×2"
        row = (
            f"| tiny | {students} | {arm} | {cost:.1f} | alone ×2 | {400 / cost:.0f} %"
        )
        row += f" | {gain(arm, 'alone ×2')} | no fair test |"
        assert row in table


def test_an_alone_of_any_length_is_a_candidate_at_equal_cost():
    epochs = {"alone": 2, "alone ×2": 4, "alone for 3 epochs": 3}
    others = {"alone again": 2, "alone, few labels": 2, "distilled": 2}
    given = {"ARMS": {"x": [*epochs, *others]}, "times_of": len}
    names = run_cells("# @title The same arm in all", **given)
    names["epochs_of"] = lambda name, arm: {**epochs, **others}[arm]
    assert names["longer_of"]("x") == ["alone", "alone for 3 epochs", "alone ×2"]


def test_report_says_what_became_of_the_probabilities(settings, report):
    make_study(settings)
    texts, figures = report()
    table = starting(texts, "By arm")
    for arm in RIGHT:
        name = "teacher" if "teacher" in arm else "tiny"
        row = [level(arm)]
        for measure in (nll, ece):
            values = each(arm, measure)
            row.append(write(values) if len(values) > 1 else f"{values.mean():.3f}")
        row.append(f"{floor(arm):.3f}")
        assert f"| {name} | {arm} | {' | '.join(row)} |" in table
    told = starting(texts, "Did distillation spoil").splitlines()
    arms = ("", " ×2", ", few labels")
    for line, end in zip(told, arms, strict=True):
        for name, measure in (("NLL", nll), ("ECE", ece)):
            change = each(f"distilled{end}", measure) - each(f"alone{end}", measure)
            assert f"{name}: {word_of(change)}" in line

    after = starting(texts, "What these temperatures do")
    for arm, T in zip(LEVELS, FITTED, strict=True):
        row = [f"{T:.2f}"]
        for measure in (nll, ece):
            row += [write(each(arm, measure)), write(each(arm, measure, T))]
        assert f"| tiny | {arm} | {' | '.join(row)} |" in after
    assert FITTED[0] != FITTED[1] and "Fitted on 24 images" in after

    [axis] = starting(figures, "Reliability")[0].axes
    assert axis.lines[0].get_slope() == 1 and axis.get_xlabel() == "mean confidence"
    pairs = zip(LEVELS, FITTED, strict=True)
    expected = [(arm, T) for arm, fitted in pairs for T in (1.0, fitted)]
    for line, (arm, T) in zip(axis.lines[1:], expected, strict=True):
        p = each(arm, softmax, T).max(2).flatten()
        right = each(arm).flatten()
        bins = [np.ceil(15 * p) == number for number in range(1, 16)]
        means = [[p[b].mean(), right[b].mean()] for b in bins if b.any()]
        assert line.get_xydata() == pytest.approx(np.array(means), abs=1e-4)
        assert line.get_label() == arm + ", fitted" * int(T != 1)


def test_temperatures_of_other_images_are_refused(settings, report):
    make_study(settings)
    former = settings.runs_dir / "held out/for the temperatures.pt"
    saved = kd.read_checkpoint(former)
    saved["record"]["study"]["images of val"] = "others"
    torch.save(saved, former)
    with pytest.raises(ValueError, match=r"images of val was .* and is others"):
        report()


def test_report_says_whether_the_teacher_was_followed(settings, report):
    make_study(settings)
    texts, figures = report()
    model = ANSWERS["teacher", 0].argmax(1)

    def shared(pairs):
        both, right = (
            np.concatenate([np.stack(pair) for pair in pairs], 1),
            np.tile(TRUTH, len(pairs)),
        )
        wrong = (both != right).all(0)
        return (both[0] == both[1])[wrong].mean()

    picked = {arm: [ANSWERS[arm, seed].argmax(1) for seed in (0, 1)] for arm in LEVELS}
    shares = [shared([(one, model) for one in picked[arm]]) for arm in LEVELS]
    shares.append(shared([picked["alone"]]))
    cells = " | ".join(f"{100 * share:.0f} %" for share in shares)
    assert f"| tiny | {cells} |" in starting(texts, "Where both are wrong")

    def confusion(logits):
        found = np.zeros((3, 3))
        for label, answered in zip(TRUTH, logits.argmax(1).tolist(), strict=True):
            found[label, answered] += (label != answered) / (label == TRUTH).sum()
        return found

    old, new = (sum(confusion(ANSWERS[arm, s]) for s in (0, 1)) for arm in LEVELS)
    off = ~np.eye(3, dtype=bool)  # at the same number of mistakes
    change = (new / new.sum() - old / old.sum())[off]
    columns = change.round(6), confusion(ANSWERS["teacher", 0])[off].round(6)
    ranks = [[np.mean(c < v) + np.mean(c <= v) for v in c] for c in columns]
    found = starting(texts, "The rank correlation")
    assert f"tiny: rank correlation {np.corrcoef(*ranks)[0, 1]:+.2f} [" in found

    [photographs] = starting(figures, "Six photographs")
    [confusions] = starting(figures, "The teacher's mistakes")
    [bars] = starting(figures, "Distilled − alone, in points")
    p = {arm: each(arm, softmax).mean(0)[range(24), TRUTH] for arm in LEVELS}
    change = np.sort(100 * (p["distilled"] - p["alone"]))
    titles = [axis.get_title().split("\n")[1] for axis in photographs.axes]
    expected = [*change[:-4:-1], *change[2::-1]]
    assert titles == [f"{value:+.0f} points" for value in expected]
    photos = VAL.images_at(slice(None)).permute(0, 2, 3, 1).cpu().numpy()
    for axis in photographs.axes:
        [i] = np.flatnonzero((photos == axis.images[0].get_array()).all((1, 2, 3)))
        assert axis.get_title().startswith(f"{VAL.classes[TRUTH[i]]}\n")
        model = softmax(ANSWERS["teacher", 0])[i]
        says = f"teacher\n  {100 * model.max():.0f} {VAL.classes[model.argmax()]}\n"
        sure = (
            f"\ndistilled\n  {100 * each('distilled', softmax).mean(0)[i].max():.0f} "
        )
        assert axis.get_xlabel().startswith(says) and sure in axis.get_xlabel()
    changes = (each("distilled", recalls) - each("alone", recalls)).mean(0)
    widths = [patch.get_width() for patch in bars.axes[0].patches]
    assert widths == pytest.approx(changes.tolist(), abs=1e-4)
    middles = [patch.get_y() + patch.get_height() / 2 for patch in bars.axes[0].patches]
    assert middles == pytest.approx([0, 1, 2])
    sizes = "a class has 6 photographs at least, 11 at most"
    assert bars.axes[0].get_title() == sizes
    labels = [text.get_text() for text in bars.axes[0].get_yticklabels()]
    assert labels == list(VAL.classes)
    share = 100 * confusion(ANSWERS["teacher", 0])
    texts = [text.get_text() for text in confusions.axes[0].texts]
    expected = np.array([[f"{value:.0f}" for value in row] for row in share])
    np.fill_diagonal(expected, "")
    assert texts == expected.flatten().tolist()


@pytest.mark.parametrize("alike", [True, False])  # the luck of images, or of seeds
def test_rank_correlation_shares_ranks_and_has_the_bootstraps_interval(alike):
    truth, states = torch.arange(300) % 3, {}
    with kd.seeded(0):
        model = torch.randn(300, 3) + torch.randn(3, 3)[truth]
        for arm in ("alone", "distilled"):
            draws = 6 * [torch.randn(300, 3) + (model if arm == "distilled" else 0)]
            draws[1] = draws[1] if alike else torch.randn(300, 3)
            states["x", arm] = {s: {"logits": each} for s, each in enumerate(draws)}
    given = {"num_classes": 3, "truth": truth, "model_logits": model, "TAUGHT": []}
    given |= {"TRAINED": states, "Markdown": str}
    cells = ["# @title Confusions", "# @title Are the students"]
    cells += ["# @title New draws", "# @title The rank corr"]
    names = run_cells(*cells, **given)
    assert names["ranks"](np.array([3, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    text = names["tell_correlation"]("x")
    found, low, high = map(float, re.findall(r"[-+]\d\.\d\d", text))
    assert low > 0 and text.endswith("its mistakes shifted towards the teacher's.")
    rng, draws = np.random.default_rng(1), []
    for _ in range(300):
        images = torch.from_numpy(rng.integers(0, 300, 300))
        draws.append(names["rank_correlation"]("x", rng.integers(0, 6, 6), images))
    half = 2.571 * np.nanstd(draws) * (6 / 5) ** 0.5  # t with five degrees of freedom
    assert high == pytest.approx(min(1, found + half), abs=0.15 * half)
    assert low == pytest.approx(max(-1, found - half), abs=0.15 * half)
    half = 2.571 * np.nanstd(names["draw_correlations"]("x")) * 1.2**0.5
    assert low == pytest.approx(max(-1, found - half), abs=0.011)  # of two digits
    names["model_logits"] = -model
    assert names["tell_correlation"]("x").endswith("away from the teacher's.")


def test_fewer_mistakes_of_every_kind_are_no_shift():
    place, truth = torch.arange(360), torch.arange(360) % 3
    shift = torch.tensor([0, 0, 0, 1, 1, 2])[place // 3 % 6]
    half = shift * (place // 18 % 2)  # half of each kind is right now
    answers = {"alone": shift, "distilled": half}
    states = {
        ("x", arm): {0: {"logits": torch.eye(3)[(truth + wrong) % 3]}}
        for arm, wrong in answers.items()
    }
    given = {"num_classes": 3, "truth": truth, "model_logits": torch.randn(360, 3)}
    given["TRAINED"] = states
    names = run_cells("# @title Confusions", "# @title Are the students", **given)
    assert np.isnan(names["rank_correlation"]("x", [0], slice(None)))


def test_advice_follows_the_numbers(settings, report):
    make_study(settings)
    texts, _ = report()
    advice = starting(texts, "Advice")
    helped = []

    def answered(case, arm, other):
        word = verdict(arm, other)
        helped.extend([case] * (word == "helps"))
        return f"> - *{case}*: {word} ({gain(arm, other)})\n"

    for epochs, end in ((2, ""), (4, " ×2")):
        case = f"for {epochs} epochs each"
        assert answered(case, f"distilled{end}", f"alone{end}") in advice
    at = re.findall(r"alone ×2 \| (\d+ %) \|", starting(texts, "At equal cost"))
    for who, share in (("one student", at[0]), ("one of 5", at[2])):
        lead = f"no fair test ({gain('distilled', 'alone ×2')}, *alone* at {share} of "
        assert f"> - *at equal cost, {who}*: {lead}" in advice
    few = "distilled, few labels", "alone, few labels"
    assert answered("with a tenth of the labels", *few) in advice
    pair = [each(arm, metric) for metric in (nll, ece) for arm in LEVELS]
    changes = f"NLL {word_of(pair[1] - pair[0])}, ECE {word_of(pair[3] - pair[2])}\n"
    assert f"> - *its probabilities*: {changes}" in advice
    pair = [each(arm, nll, T) for arm, T in zip(LEVELS, FITTED, strict=True)]
    change = f"with fitted temperatures*: NLL {word_of(pair[1] - pair[0])}"
    assert advice.endswith(change)
    says = f"It helps {'; '.join(helped)}."
    assert helped and advice.startswith(f"> **Distil into tiny?** {says}\n>\n> - *for")

    path = settings.runs_dir / "result.json"
    kept = json.loads(path.read_text())
    assert kept["gains"]["tiny"] == pytest.approx(interval_of("distilled"))
    assert kept["class mean"]["tiny"] == pytest.approx(interval_of("class mean"))
    assert kept["says"].startswith("**Distillation into tiny: helps.**")
    assert kept["source"] == "own-160, demo, seeds (0, 1)."
    soft = dict(
        zip(VAL.classes, ANSWERS["teacher", 0].softmax(1).tolist()[9], strict=True)
    )
    assert kept["recipes"]["tiny"] == asdict(settings.recipe)
    assert kept["label"] == max(kept["soft"], key=kept["soft"].get)
    assert sorted(kept["soft"].values()) == pytest.approx(sorted(soft.values()))
    assert kept["photo"] == VAL.images_at(9).permute(1, 2, 0).tolist()
    found = {"a-demo": kept["recipes"], "z-demo": {"tiny": "another"}}
    for name, recipes in {**found, "b-full": kept["recipes"]}.items():
        other = path.parent.with_name(name)
        other.mkdir()
        (other / "result.json").write_text(json.dumps({**kept, "recipes": recipes}))
    [axis] = starting(report()[1], "Gains on both")[0].axes
    labels = [text.get_text() for text in axis.get_yticklabels()]
    arms = "distilled", "class mean"
    assert labels == [f"{name}, tiny, {arm}" for name in ("a", "runs") for arm in arms]
    bars = [line.get_xdata() for line in axis.lines[:4]]
    for bar, dot, arm in ((*bars[:2], "distilled"), (*bars[2:], "class mean")):
        mean, low, high = interval_of(arm)
        assert [*bar, *dot] == pytest.approx([low, high, mean])


def test_advice_names_what_helps_and_what_hurts():
    verdicts = {"a": "helps", "b": "hurts", "c": "inconclusive", "d": "hurts"}
    shown, given = [], {"BOTH": ["x"], "FITTED": {}, "nll": None, "ece": None}
    given |= {"gains_of": Mock(), "tell_change": str, "Markdown": shown.append}
    for cases, says in (("abcd", "It helps a. It hurts b; d."), ("c", "No verdict")):
        given["cases_of"] = Mock(return_value=[(c, verdicts[c], "") for c in cases])
        run_cells("# @title Advice, chosen", **given)
        assert shown[-1].startswith(f"> **Distil into x?** {says}")
    pairs = {("c", "alone"): "helps", ("distilled", "c"): "hurts"}
    pairs |= {("d", "alone"): "helps", ("distilled", "d"): "helps"}
    pairs["alone again", "alone"] = "hurts"
    given = {
        "verdict": pairs.get,
        "gains_of": lambda _, arm, other="alone": (arm, other),
    }
    tell = run_cells("# @title What a control tells", **given)["tell_control"]
    assert tell("x", "c") == "- x: *c* helps, too; it is ahead of *distilled*."
    assert tell("x", "d") == "- x: *d* helps, too; *distilled* is ahead of it."
    states = {0: {"logits": ANSWERS["alone", 0]}}
    given |= {"TRAINED": {("x", arm): states for arm in PAIR}, "points": str}
    again = run_cells("# @title What a second training", **given)["tell_again"]
    assert again("x").endswith(", by chance 1 in 20 times.")


def interval_of(arm):
    return [100 * value for value in find_interval(each(arm) - each("alone"))]


def test_arms_of_one_length_have_the_same_epochs():
    def order(**epochs):
        students = {}
        for arm, count in epochs.items():
            state = {"history": {"loss": [0.0] * count}}
            students["a", arm] = {0: state}
        given = {"TRAINED": students}
        cells = ["# @title Colours", "# @title Which arms are compared?"]
        return run_cells(*cells, "# @title Which networks and arms", **given)["ARMS"]

    arms = {"distilled, unlabelled too": 1, "alone for 3 epochs": 3, "alone ×2": 4}
    arms |= {"distilled": 2, "alone": 2, "distilled ×2": 4}
    [found] = order(**arms).values()
    assert found[0] == "alone" and sorted(found) == sorted(arms)
    with pytest.raises(ValueError, match=r"'mine': 5.*end a longer's name in ×2"):
        order(**arms, mine=5)


@pytest.mark.parametrize(
    ("share", "lead", "expected"),
    [
        (80, 1, "helps"),
        (90, -1, "hurts"),
        (90, 0, "inconclusive"),
        (79, 1, "no fair test"),
        (10, -1, "hurts"),
    ],
)
def test_to_beat_a_cheaper_one_is_no_verdict(share, lead, expected):
    cells = "# @title What a verdict means", "# @title At equal cost"
    given = {"BOTH": [], "Markdown": str}
    names = run_cells(*cells, **given)
    assert names["verdict_at"](share, np.full((2, 9), lead)) == expected
    told = {"helps": "learned more .* above 0", "hurts": "learned less .* below 0"}
    assert re.search(told.get(expected, ""), names["WORDS"].get(expected, ""))


def test_one_seed_has_no_interval_and_no_verdict(settings, report):
    make_study(replace(settings, seeds=(0,)))
    texts, _ = report()
    assert "one seed.** One seed has no interval" in starting(texts, "In a sentence")
    wrong = r"contains 0|nan|clearly|cannot|\byes\b|\bno \(|as it should|\[[-+]"
    assert not re.search(wrong, "\n".join(texts.values()))
    assert starting(texts, "Advice").count("one seed") == 8


def test_a_value_that_rounds_to_0_shows_its_deciding_digit():
    names = run_cells()
    gains = np.full((2, 4000), 0.0)
    gains[:, 0] = 1
    assert names["points"](gains).startswith("+0.03 [-0.02, +0.07")
    assert names["points"](np.zeros((2, 9))) == "0, no answer differs"
    assert names["with_interval"](np.array([[1.0, 3.0]])) == "2.000"
    assert names["table"](["a"], [["x|y"]]).splitlines()[2] == r"| x\|y |"


def test_drawing_of_networks_takes_any_network(settings, monkeypatch):
    class Wrapped(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.body = kd.build_classifier(20, "mobilenet_v3_small")
            self.head = nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, num_classes))

        def forward(self, x):
            return self.head(self.body(x))

    names = run_cells("# @title The maps of a network", SETTINGS=settings)
    maps = [m[:2] for m in names["list_maps"](Wrapped(3))]
    assert maps == [(3, 32), (576, 1), (20, 1), (3, 1)]
    maps = names["list_maps"](kd.LeNet5())
    assert maps[:3] == [(3, 32, 0), (6, 28, 456), (6, 14, 0)]
    names |= {"STUDENTS": {"x": kd.CustomCNN}, "num_classes": 10, "plt": plt}
    figures = show_nothing(monkeypatch)
    exec(find_cell("# @title The networks, drawn"), names)
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    assert "256\n2×2\n0.89 M" in texts  # 9 · 128 · 256 + 9 · 256² + 4 · 256


# ── What the reader writes ────────────────────────────────────────────────
def solution(name):
    """The folded solution of a task, from the notebook's text."""
    texts = [cell.source for cell in read(WOOF).cells if cell.cell_type == "markdown"]
    [code] = re.findall(rf"```python\n(def {name}\(.*?)```", "\n".join(texts), re.S)
    return code


def told(name, code):
    """What the check of a task prints for this code."""
    first = "# @title What may be wrong with its dist"
    second, third = "# @title What may be wrong with a loss", "# @title What a value"
    checks = {"my_loss": [first, second, third, "# @title Check the loss"]}
    first = "# @title Two steps of a student of one weight"
    checks["my_step"] = [first, "# @title Check the step"]
    first = "# @title What may be wrong with class means"
    checks["my_class_means"] = [first, "# @title Check the class means"]
    names = {"F": F, "torch": torch, "SimpleNamespace": SimpleNamespace}
    exec(code, names)
    with redirect_stdout(io.StringIO()) as said:
        run_cells(*checks[name], **names)
    return said.getvalue()


SOFT = "F.softmax(teacher_logits.detach() / T, dim=1)"
HARD = "F.one_hot(teacher_logits.argmax(1), num_classes=5).float()"
CE = "F.cross_entropy(student_logits, targets)"
KL = 'F.kl_div(q, p, reduction="batchmean")'
WEIGHTS = "alpha * T**2 * kl + (1 - alpha)"
MEAN = "soft[targets == label].mean(0)"
COLD = "(teacher_logits / T).softmax(dim=1)"
TASKS = [  # task, what is wrong in the solution, what the check says
    ("my_loss", "", "", "Right."),
    ("my_loss", "alpha * T**2 * kl", "alpha * kl", "T² is missing"),
    ("my_loss", "T**2", "T", "T stands in place of T²"),
    ("my_loss", '"batchmean"', '"mean"', "not by the classes"),
    ("my_loss", '"batchmean"', '"sum"', "by the number of images"),
    ("my_loss", ".detach()", "", "gradient flows into the teacher"),
    ("my_loss", "student_logits / T", "student_logits.detach() / T", "does not reach"),
    ("my_loss", SOFT, HARD, "arg-max only"),
    ("my_loss", "student_logits / T", "student_logits", "student's logits are not"),
    ("my_loss", "detach() / T", "detach()", "teacher's logits are not"),
    ("my_loss", "F.log_softmax", "F.softmax", "wants the student's log-prob"),
    ("my_loss", "F.softmax", "F.log_softmax", "nan: kl_div wants log-prob"),
    ("my_loss", WEIGHTS, "(1 - alpha) * T**2 * kl + alpha", "of the other term"),
    ("my_loss", WEIGHTS, "alpha * T**2 * kl + T**2 * (1 - alpha)", "term alone"),
    ("my_loss", f"{WEIGHTS} *", "T**2 * kl +", "alpha is missing"),
    ("my_loss", f" + (1 - alpha) * {CE}", "", "label term is missing"),
    ("my_loss", CE, CE.replace(",", " / T,"), "has no temperature"),
    ("my_loss", CE, CE.replace(")", ", reduction='none')"), "one number"),
    ("my_loss", KL, KL.replace("q, p", "p.log(), q.exp()"), "sides of KL"),
    ("my_loss", KL, "-(p * q).sum(1).mean()", "not KL"),
    ("my_loss", "return alpha", "return 2 * alpha", "is right"),
    ("my_loss", "kl = ", "kl = nothing + ", "stops: name 'nothing'"),
    ("my_step", "", "", "Right."),
    ("my_step", "student.optimizer.zero_grad()", "pass", "zero_grad"),
    ("my_step", "loss.backward()", "pass", "then backward"),
    ("my_step", "student.optimizer.step()", "pass", "the weight stays"),
    ("my_step", "student.schedule.step()", "pass", "learning rate stays"),
    (
        "my_step",
        "schedule.step()",
        "schedule.step(); student.schedule.step()",
        "one step for",
    ),
    (
        "my_step",
        "loss.backward()",
        "loss.backward(); student.schedule.step()",
        "before the sch",
    ),
    ("my_step", "loss.backward()", "(3 * loss).backward()", "0.5 is right"),
    ("my_step", "loss.backward()", "loss.backwards()", "Your function stops"),
    ("my_class_means", "", "", "Right."),
    ("my_class_means", " / T", "", "T is missing"),
    ("my_class_means", ".mean(0)", ".sum(0)", "divide by the images"),
    ("my_class_means", "classes])", "classes]).T", "exchanged"),
    ("my_class_means", "soft[targets == label]", "soft", "of the class only"),
    ("my_class_means", COLD, HARD.replace("5", "3"), "hard"),
    ("my_class_means", COLD, "teacher_logits", "should be"),
    (
        "my_class_means",
        MEAN,
        "(teacher_logits[targets == label].mean(0) / T).softmax(0)",
        "first soften",
    ),
    ("my_class_means", f"torch.stack([{MEAN} for label in classes])", "soft", "[3, 3]"),
    ("my_class_means", "targets == label", "target == label", "Your function stops"),
]


@pytest.mark.parametrize(("task", "old", "new", "expected"), TASKS)
def test_checks_say_what_is_wrong(task, old, new, expected):
    code = solution(task)
    assert old in code
    assert expected in told(task, code.replace(old, new))


def test_nothing_need_be_written():
    for task in ("my_loss", "my_step", "my_class_means"):
        assert told(task, find_cell(f"def {task}")) == "Not written yet.\n"


def test_the_network_that_leaves_is_the_distilled_one_with_its_temperature(
    settings, monkeypatch
):
    with kd.seeded(0):
        networks = {("tiny", arm): tiny(3).eval() for arm in ("distilled", "alone")}
        networks["teacher", "teacher"], other = tiny(3).eval(), tiny(3).state_dict()
    given = {
        "SETTINGS": settings,
        "BOTH": ["tiny"],
        "FITTED": {("tiny", "distilled"): 2.0},
    }
    val = replace(VAL, classes=("a", "b", "Golfba\u0308lle"))
    states = {key: network.state_dict() for key, network in networks.items()}
    states = {key: [{"network": s}, {"network": other}] for key, s in states.items()}
    given |= {"TRAINED": states, "STUDENTS": {"tiny": tiny}, "build_teacher": tiny}
    given |= {"num_classes": 3, "val_split": val}
    settings.runs_dir.mkdir(parents=True)
    images = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).mul(7).to(torch.uint8)
    logits = networks["tiny", "distilled"](kd.normalise(images))
    for count, temperature in ((99, 1), (100, 2)):  # fitted on too few, or on enough
        given["held_out"] = SimpleNamespace(targets=torch.zeros(count))
        names = run_cells("# @title Your own photograph", "take_away =", **given)
        path = names["take_away"]
        extra = {"about.json": ""}
        found = torch.export.load(path, extra_files=extra).module()(images).numpy()
        assert np.allclose(found, (logits / temperature).softmax(1).detach(), atol=1e-5)
        about = json.loads(extra["about.json"])
        assert about["temperature"] == temperature and about["image_size"] == 32
        assert about["classes"] == ["a", "b", "Golfb\u00e4lle"]
    batch, answers = kd.normalise(images), names["look_at"](images[1])
    for who, found in answers.items():
        network = networks["teacher" if who == "teacher" else "tiny", who]
        assert torch.allclose(found, network(batch)[1].softmax(0), atol=1e-5)
    assert list(answers) == ["teacher", "alone", "distilled"]
    save(settings.runs_dir / "x.png", scene(1))
    names |= {"photo": settings.runs_dir / "x.png", "TAUGHT": ["tiny"], "plt": plt}
    names["draw_shares"] = drawn = Mock()
    show_nothing(monkeypatch)
    exec(find_cell("# @title Three answers"), names)
    soft = [*names["look_at"](kd.read_image(names["photo"], 32)).values()]
    order = soft[0].argsort(descending=True)
    assert drawn.call_args[0][1] == torch.stack(soft)[:, order].T.tolist()
    assert drawn.call_args[0][2:] == ([val.classes[i] for i in order], [*answers])


# ── All of it: the run that began with the first test ──────────────────────
ELSEWHERE = """
import json, sys, torch, warnings
for told in ("Attempted to insert", ".*does not reference", "The given buffer"):
    warnings.filterwarnings("ignore", told)  # torch 2.6, torch 2.11
extra = {"about.json": ""}
network = torch.export.load("student.pt2", extra_files=extra).module()
images = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).mul(7).to(torch.uint8)
answers = [network(images[:number]).numpy().tolist() for number in (1, 3)]
print(json.dumps([*answers, extra["about.json"], "kd_utils" in sys.modules]))
"""


def test_whole_run_of_imagewoof_and_its_network_leaves(whole_run):
    process, folder = whole_run
    assert process.wait() == 0
    notebook = nbformat.read(folder / "whole.ipynb", as_version=4)
    text = text_of(notebook)
    assert "by hand 0.6450, kd.distillation_loss 0.6450" in text
    assert text.count("**Distillation into") == 6 and "weaker teacher" in text
    assert not re.search("nan|Not run yet|never-seen images", text)

    # Each cell again, in the reverse order, shows what it showed
    shown = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and "latency" not in cell.source:
            found = [out.data for out in cell.outputs if "data" in out]
            shown.setdefault(cell.source, []).append(found)
    again = [pair[-2:] for pair in shown.values() if len(pair) > 1]
    assert len(again) > 70 and all(first == second for first, second in again)

    # The photographs, of which one is there twice, mirrored
    for told in (
        "Left out: 1 × cannot be read, such as `b/broken.jpg`",
        "Left out: 1 × no image (.txt), such as `a/notes.txt`",
        "Photographs of `val` that also stand in `train`: 0.",
        "one side, with one label: 1, such as `a/0.png` and `a/again.png`.",
        "Few photographs to learn from (below 50): ",
        "mobilenet_v3_small (mobile.pth), alone: ",
        "its weights at the start: random",
        "*with photographs without labels, too*: ",
    ):
        assert told in text, told
    folder = folder / "runs/own-demo"
    names = "Experiment 2", "teacher", "trials/teacher", "held out/for the temperatures"
    files = [kd.read_checkpoint(folder / f"{name}.pt") for name in names]
    content = [saved["record"]["learns from"] for saved in files]
    assert content[0] == content[1] != content[2] == content[3]
    names = "class left out", "taught by the weaker"
    fewer, weaker = (kd.read_checkpoint(folder / f"{name}.pt") for name in names)
    assert weaker["record"]["teacher"] != files[0]["record"]["teacher"]
    [pets] = folder.parents[1].glob("data/own-*/own pets")
    train = kd.load_splits(pets, 32)["train"]
    without = train.subset(train.targets != 2).fingerprint()
    learned = [content[0], fewer["record"]["learns from"]]
    assert learned == [train.fingerprint(), without]

    network = kd.CustomCNN(3).eval()
    student = files[0]["students"]["Custom CNN", "distilled", 0]
    network.load_state_dict(student["network"])
    images = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).mul(7).to(torch.uint8)
    T = float(re.search(r"MB, T ([\d.]+)", text).group(1))
    expected = (network(kd.normalise(images)) / T).softmax(1).tolist()
    strict = ["-W", "error", "-W", "ignore::ResourceWarning"]  # of torch 2.6 itself
    command = [sys.executable, *strict, "-c", ELSEWHERE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    one, three, about, needs_kd = json.loads(done.stdout)
    assert np.allclose(one + three, expected[:1] + expected, atol=0.002)
    assert not needs_kd
    about = json.loads(about)
    assert about["classes"] == ["a", "b", "ç"] and about["image_size"] == 32
    assert about["torch"] == torch.__version__

    # Photographs that are turned, transparent, or of 16 bits are read as in training
    assert inspect.getsource(kd.read_image) in (folder / "use_student.py").read_text()
    exif, picture = Image.Exif(), scene(7)
    exif[0x0112] = 6
    Image.fromarray(picture).save(folder / "x.jpg", exif=exif)
    clear = np.dstack([picture, picture[..., 0]])
    Image.fromarray(clear).save(folder / "y.png")
    deep = picture[..., 0].astype(np.uint16) * 16
    Image.fromarray(deep).save(folder / "z.png")
    command = [sys.executable, "use_student.py", "x.jpg", "y.png", "z.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    for first, name in zip((0, 4, 8), ("x.jpg", "y.png", "z.png"), strict=True):
        head, *lines = told[first : first + 4]
        shares = {label: float(share[:-1]) for share, label in map(str.split, lines)}
        image = kd.normalise(kd.read_image(folder / name, 32)[None])
        expected = (network(image) / about["temperature"]).softmax(1)[0]
        assert head == name and sorted(shares.values()) == [*shares.values()][::-1]
        shares = [shares[label] / 100 for label in "abç"]
        assert shares == pytest.approx(expected.tolist(), abs=0.002)
    [row] = re.findall(r"\| cpu \| (.*) \|", text)[:1]
    from_file, itself, _, different = row.split(" | ")
    assert from_file == itself and different == "0"
