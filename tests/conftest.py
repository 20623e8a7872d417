"""What the tests share: small splits, a quick network, known answers, the cells."""

import io
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
WOOF, NETTE = "Imagewoof_KD.ipynb", "Imagenette_KD.ipynb"
sys.path.insert(0, str(ROOT))
for variable in ("PROFILE", "SEEDS", "DATA_DIR", "RUNS_DIR", "TEACHER_WEIGHTS"):
    os.environ.pop(f"KD_{variable}", None)
torch.set_num_threads(1)  # the networks here are small

import kd_utils as kd  # noqa: E402 - found through the path above


def make_settings(runs_dir, **changes):
    recipe = kd.Recipe(learning_rate=0.004, temperature=3.0, alpha=0.5)
    small = {"seeds": (0, 1), "epochs": 2, "batch_size": 16, "image_size": 32}
    return kd.Settings(runs_dir=runs_dir, **{"recipe": recipe, **small, **changes})


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


def smaller(cell):
    """What to add to a cell, so that a notebook takes seconds."""
    if "SETTINGS = kd.Settings(" not in cell.source:
        return ""
    return "\nSETTINGS = replace(SETTINGS, epochs=1, image_size=32, teacher='resnet18')"


def code_cells(name=WOOF):
    return [cell.source for cell in read(name).cells if cell.cell_type == "code"]


@cache
def find_cell(start):
    """The cell of Imagewoof that begins so."""
    [cell] = [source for source in code_cells() if source.startswith(start)]
    return cell


COMMON = {"STUDENTS": kd.STUDENTS}  # what most cells use
for start in (
    "# @title Figures: sharp",
    "# @title Imports",
    "# @title Import the libraries",
    "# @title The 95 % interval",
    "# @title How numbers are written",
    "# @title Intervals as texts",
):
    exec(find_cell(start), COMMON)
find_interval = COMMON["find_interval"]


def run_cells(*starts, **names):
    """Runs these cells of Imagewoof, and returns what they define."""
    names = {**COMMON, **names}
    for start in starts:
        exec(find_cell(start), names)
    return names


def read_results(runs_dir, val):
    """What the first cells of the report define."""
    cells = ["# @title What the finished", "# @title Are they of one"]
    cells += [
        "# @title Read the results",
        "# @title Which arms are",
        "# @title What a verdict",
    ]
    given = {"SETTINGS": kd.Settings(runs_dir=runs_dir), "val_split": val}
    return run_cells(*cells, **given)


def label_loss(student_logits, teacher_logits, targets, recipe):
    return F.cross_entropy(student_logits.float(), targets)


def distilled(student_logits, teacher_logits, targets, recipe):
    return kd.distillation_loss(student_logits, teacher_logits, targets, 2.0, 0.5)


def make_split(count=48, seed=0, size=32):
    """Three classes that differ in colour; a quarter of the images is never seen."""
    generator, number = torch.Generator().manual_seed(seed), torch.arange(count)
    shape = (count, 3, size, size)
    images = torch.randint(0, 120, shape, dtype=torch.uint8, generator=generator)
    images[number, number % 3] += 120
    paths = [f"{'drawn' if n % 4 else 'ILSVRC2012_val'}_{n}.png" for n in range(count)]
    images, number = images.to(kd.DEVICE), number.to(kd.DEVICE)
    return kd.Split(images, paths, ("red", "green", "blue"), number, number % 3)


def tiny(num_classes, activation=nn.ReLU):
    """Quick, with what a resume must restore: batch statistics, and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4, bias=False),
        nn.BatchNorm2d(8),
        activation(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def make_stage(settings, losses=None, name="Experiment 1", **changes):
    losses = losses or {"alone": label_loss}
    splits = changes.get("splits") or (make_split(), make_split(24, seed=1))
    networks = changes.get("networks", {"tiny": tiny})
    return kd.Stage(name, losses, settings, splits, networks, changes.get("teacher"))


def photograph(level=90, mode="RGB"):
    """The bytes of a grey JPEG."""
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), (level, level, level)).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def own_folder(root, images, copies=1):
    """`root` with train and val, each with classes of one image in several copies."""
    for split, name, number in product(("train", "val"), images, range(copies)):
        path = root / split / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[name])
    return root


def scene(number):
    """A picture [64, 64, 3] with outlines and details of its own."""
    rng = np.random.default_rng(number)
    layers = [rng.normal(0, 255 / side, (side, side, 3)) for side in (4, 8, 16)]
    picture = 128 + sum(
        layer.repeat(64 // len(layer), 0).repeat(64 // len(layer), 1)
        for layer in layers
    )
    return picture.clip(0, 255).astype(np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def unmark(path):
    """Takes away the mark that names are in UTF-8: a Mac does not set it."""
    path.write_bytes(path.read_bytes().replace(b"\0\x08\0\0", b"\0\0\0\0"))
    return path


def make_zip(folder):
    """As a Mac makes it, of photographs by class and of some without labels."""
    pets = folder / "own pets"
    for number in range(66):
        save(pets / "abç"[number % 3] / f"{number}.png", scene(number))
    for number in range(60, 70):  # six of them may stand in val
        save(pets / "unlabelled" / f"{number}.png", scene(number))
    save(pets / "a" / "again.png", scene(0)[:, ::-1])
    (pets / "a" / "notes.txt").write_text("nothing")
    (pets / "b" / "broken.jpg").write_bytes(photograph()[:300])
    with zipfile.ZipFile(folder / "own.zip", "w") as archive:
        for path in sorted(pets.rglob("*.*")):
            name = str(path.relative_to(folder))
            archive.write(path, name)
            archive.writestr(
                f"__MACOSX/{name.replace(path.name, '._' + path.name)}", "x"
            )
    shutil.rmtree(pets)
    return unmark(folder / "own.zip")


def same(first, second):
    """Whether two networks have the same weights and buffers, bit for bit."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def compare(students, others):
    """Asserts that they are the same, bit for bit."""
    for first, second in zip(students, others, strict=True):
        assert same(first.network, second.network) and first.key == second.key
        assert torch.equal(first.logits, second.logits)
        assert first.history == second.history


# ── A study whose answers are known ───────────────────────────────────────
def finish(stage, logits=None):
    """Writes the file of a finished stage without its training."""
    epochs, count = stage.settings.epochs, len(stage.val_split)
    for student in stage.students:
        answers = logits[student.arm, student.seed] if logits else torch.zeros(count, 3)
        student.logits = answers
        last = kd.correct(answers, stage.val_split.targets.cpu()).mean().item()
        curve = [0.9 for _ in range(epochs - 1)]  # it falls: the last one counts
        student.history = {key: [*curve, last] for key in student.history}
        student.history["train_accuracy"] = [0.1 for _ in range(epochs)]
    stage.seconds = [60.0 * (epoch + 1) for epoch in range(epochs)]
    stage.path.parent.mkdir(parents=True, exist_ok=True)
    kd.save(stage)


VAL, HELD_OUT = make_split(24, seed=1), make_split(24, seed=2)
VAL.targets[[1, 2, 5]] = 0  # classes of 11, 7 and 6 images
PLACE = torch.arange(24)
RIGHT = {  # whose answers are right, by arm, for seed 0 and seed 1: all different
    "alone": (PLACE % 3 == 0, PLACE % 4 == 0),
    "alone again": (PLACE % 3 == PLACE // 20, PLACE % 4 == PLACE // 20),
    "smoothed": (PLACE % 3 == 1, PLACE % 4 < 2),
    "class mean": (PLACE % 4 > 0, PLACE > 5),  # clearly ahead of alone
    "distilled": (PLACE > 6, PLACE % 5 > 0),
    "alone for 3 epochs": (PLACE % 5 > 2, PLACE % 6 > 3),
    "alone ×2": (PLACE % 2 == 0, PLACE % 7 > 2),
    "distilled ×2": (PLACE % 6 > 0, PLACE > 4),
    "alone, few labels": (PLACE % 5 == 0, PLACE % 6 == 1),
    "distilled, few labels": (PLACE % 7 != 3, PLACE % 8 > 1),
    "teacher": (PLACE % 7 > 0,),
    "few labels, teacher": (PLACE % 7 > 1,),
}
SURE = torch.where(PLACE % 5 < 2, 4.0, 1.5)  # of an answer: its logit
SURE[[7, 8, 9]] = torch.tensor([2.9, 1.6, 2.5])  # the teacher is wrong; a rare bin


def answer(right, wrong=1, split=VAL):
    """Logits [24, 3]: the label where it is right, else a class `wrong` after it."""
    chosen = (split.targets.cpu() + wrong * (~right).int()) % 3
    return SURE[:, None] * torch.eye(3)[chosen]


# Wrong answers of the second seed are not the teacher's; some of *alone* are
ANSWERS = {
    (arm, seed): answer(right, 1 + seed * (PLACE % 2 if arm == "alone" else 1))
    for arm, seeds in RIGHT.items()
    for seed, right in enumerate(seeds)
}
HELD_OUT_ANSWERS = {
    ("alone", 100): answer(PLACE % 4 > 0, split=HELD_OUT),
    ("distilled", 100): answer(PLACE % 3 > 0, split=HELD_OUT),
}


def make_study(settings, shift=0.0):
    """The files of a study; `shift` makes another teacher, which it does not report."""

    def fill(name, arms, settings=settings, answers=ANSWERS, **parts):
        losses = dict.fromkeys(arms, distilled if "teacher" in parts else label_loss)
        parts = {"splits": (make_split(), VAL), **parts}
        stage = make_stage(settings, losses, name, **parts)
        stage.students.reverse()  # the order in a file must not matter
        finish(stage, answers)
        return stage

    one = fill("Experiment 1", ("alone", "smoothed", "alone again"))
    once = replace(settings, seeds=(0,))
    teachers = {"networks": {"teacher": tiny}, "settings": once}
    teacher = fill("teacher", ["teacher"], **teachers).students[0].network
    fill("few labels, teacher", ["few labels, teacher"], **teachers)
    teacher[-1].bias.data += shift
    two = fill("Experiment 2", ("class mean", "distilled"), teacher=teacher)
    longer = {"settings": replace(settings, epochs=2 * settings.epochs)}
    fill("2 times as long", ("alone ×2", "distilled ×2"), teacher=teacher, **longer)
    three = {"settings": replace(settings, epochs=3 * settings.epochs // 2)}
    fill("alone for 3 epochs", ["alone for 3 epochs"], **three)
    few = ("alone, few labels", "distilled, few labels")
    fill("few labels", few, teacher=teacher)
    apart = replace(settings, runs_dir=settings.runs_dir / "held out", seeds=(100,))
    splits = {"splits": (make_split(), HELD_OUT), "answers": HELD_OUT_ANSWERS}
    fill("for the temperatures", ("alone", "distilled"), apart, **splits)
    return one, two


# ── Fixtures ──────────────────────────────────────────────────────────────
@pytest.fixture
def settings(tmp_path):
    return make_settings(tmp_path / "runs-demo")


@pytest.fixture
def teacher():
    with kd.seeded(7):
        return tiny(3).to(kd.DEVICE).eval()


@pytest.fixture
def train():
    """`train` as the reader runs it: the notebook's own cell."""
    return run_cells("def train(stage)")["train"]


@pytest.fixture
def exact(monkeypatch):
    """On the CPU in float32, where the same numbers come out each time. Called with a
    precision, it sets another one."""
    monkeypatch.setattr(kd, "DEVICE", torch.device("cpu"))
    set_precision = partial(monkeypatch.setattr, kd, "choose_precision")
    set_precision(lambda: torch.float32)
    return lambda precision: set_precision(lambda: precision)


@pytest.fixture(scope="session", autouse=True)
def whole_run(request, tmp_path_factory):
    """All of Imagewoof runs aside, as a process, while the other tests do: also what a
    reader switches on, on photographs of his own, and then the report once more."""
    if not any("whole_run" in item.name for item in request.session.items):
        return None
    folder, notebook = tmp_path_factory.mktemp("whole"), read(WOOF)
    own, weights = make_zip(folder), folder / "mobile.pth"  # no never-seen images
    mobile = kd.build_classifier(1000, "mobilenet_v3_small")
    torch.save(mobile.state_dict(), weights)
    for cell in notebook.cells:
        cell.source = cell.source.replace("RUN = False", "RUN = True") + smaller(cell)
        cell.source = cell.source.replace("targets) >= 100", "targets) >= 1")
        if cell.metadata.get("tags") == ["parameters"]:
            cell.source += f"\nDATASET = {str(own)!r}\nNETWORKS = 'Custom CNN, "
            cell.source += f"mobilenet_v3_small:{weights}'"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first = [cell.source.split("\n")[0] for cell in cells]
    report = cells[first.index("# @title Read the results") :]
    after = cells[first.index("def train(stage):") :]
    again = [cell for cell in report if "@title" in cell.source] + after[::-1]
    notebook.cells += [cell.copy() for cell in again]
    for number, cell in enumerate(notebook.cells):
        cell.id = str(number)
    shutil.copy(ROOT / "kd_utils.py", folder)
    nbformat.write(notebook, folder / "whole.ipynb")
    variables = {"KD_PROFILE": "demo", "OMP_NUM_THREADS": "1"}
    command = "jupyter nbconvert --to notebook --inplace --execute --allow-errors"
    command = [sys.executable, "-m", *command.split(), "whole.ipynb"]
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, **variables})
    return process, folder
