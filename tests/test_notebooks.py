"""The two notebooks: alike, clean, and able to run top to bottom, also in parts."""

import json
import re
import subprocess
import sys
import types

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, code_cells
from nbclient import NotebookClient
from PIL import Image

import kd_utils as kd

NOTEBOOKS = ["Imagewoof_KD.ipynb", "Imagenette_KD.ipynb"]


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


def test_imagenettes_code_is_in_order_a_part_of_imagewoofs():
    woof, nette = iter(code_cells(NOTEBOOKS[0])), code_cells(NOTEBOOKS[1])
    [own] = [source for source in nette if 'DATASET = "imagenette2-160"' in source]
    nette.remove(own)
    assert all(source in woof for source in nette)  # `in` moves the iterator on


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebook_was_run_once_and_is_clean(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert (
        counts == list(range(1, len(cells) + 1)) and "widgets" not in notebook.metadata
    )
    for output in outputs(notebook):
        assert output.output_type != "error" and output.get("name") != "stderr"
    for cell in cells:  # plots are folded, in Colab and elsewhere
        if "plt.show()" in cell.source:
            assert cell.metadata.cellView == "form"
            assert cell.metadata.jupyter.source_hidden


def test_readme_quotes_the_notebooks():
    texts = {name.split("_")[0]: text_of(read(name)) for name in NOTEBOOKS}
    readme = (ROOT / "README.md").read_text()
    for dataset, row in re.findall(r"^\| (Image\w+) (\|.*\|)$", readme, re.MULTILINE):
        assert row in texts[dataset]


def without(notebook, heading):
    """Drops the code between `## heading` and the next heading of that level."""
    inside, kept = False, []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and "\n## " in f"\n{cell.source}":
            inside = f"\n## {heading}" in f"\n{cell.source}"
        if not (inside and cell.cell_type == "code"):
            kept.append(cell)
    assert len(kept) < len(notebook.cells)
    notebook.cells = kept


def execute(notebook, tmp_path, monkeypatch, *lines):
    """Runs a notebook as `demo`, smaller still, as its text tells a reader to."""
    variables = {"PROFILE": "demo", "DATA_DIR": tmp_path, "RUNS_DIR": tmp_path}
    for key, value in variables.items():
        monkeypatch.setenv(f"KD_{key}", str(value))
    for cell in notebook.cells:
        if "SETTINGS = kd.choose_settings" in cell.source:
            cell.source += "\nSETTINGS = replace(SETTINGS, epochs=1, image_size=32)"
        if cell.metadata.get("tags") == ["parameters"]:
            cell.source = "\n".join([cell.source, *lines])
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    assert not [one for one in outputs(notebook) if one.get("name") == "stderr"]
    return text_of(notebook)


FIRST = "Custom CNN, distilled, seed 0"
IMAGES = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).mul(7).to(torch.uint8)
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
    notebook = read(NOTEBOOKS[0])
    for cell in notebook.cells:  # the exercises, too
        cell.source = cell.source.replace("RUN = False", "RUN = True")
    text = execute(notebook, tmp_path, monkeypatch)
    assert "by hand 0.6450, kd.distillation_loss 0.6450" in text
    assert text.count("**Distillation into") == 2 and "alone, longer" in text
    assert text.count("By the rule, the choice is") == 2
    assert "nan" not in text and "Not run yet" not in text

    folder = tmp_path / "imagewoof2-160-demo"
    for arm, stage in {"smoothed": "label smoothing", "no labels": "no labels"}.items():
        saved = kd.read_checkpoint(folder / f"{stage}.pt")
        assert {student["arm"] for student in saved["students"]} == {arm}

    network = kd.CustomCNN(10)
    for student in kd.read_checkpoint(folder / "Experiment 2.pt")["students"]:
        if kd.Student.__str__(types.SimpleNamespace(**student)) == FIRST:
            network.load_state_dict(student["network"])
    with torch.no_grad():
        expected = network.eval()(kd.normalise(IMAGES)).softmax(1)
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE, folder / "student.pt2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    one, three, classes = json.loads(done.stdout)
    assert np.allclose([*one, *three], expected[[0, 0, 1, 2]], atol=1e-5)
    assert classes[0] == "gold disc" and len(classes) == 10


@pytest.mark.parametrize("left_out", ["Experiment 1", "Experiment 2"])
def test_either_experiment_may_be_left_out(left_out, tmp_path, monkeypatch):
    notebook = read(NOTEBOOKS[1])
    without(notebook, left_out)
    text = execute(notebook, tmp_path, monkeypatch)
    assert f"Not run yet: {left_out}" in text and "no verdict" in text
    assert "nan" not in text


def test_a_folder_of_ones_own_runs_to_the_end(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for index in range(90):  # three classes, none of ImageNet's, no never-seen images
        split = "train" if index < 60 else "val"
        path = tmp_path / "own" / split / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    line = f'DATASET = "{tmp_path / "own"}"'
    text = execute(read(NOTEBOOKS[1]), tmp_path, monkeypatch, line)
    assert text.count("**Distillation into") == 2
    assert "nan" not in text and "never-seen" not in text


def test_set_up_asks_until_it_gets_the_module(tmp_path, monkeypatch, capsys):
    uploads = [
        {},
        {"x.ipynb": b"{}"},
        {"kd_utils (1).py": (ROOT / "kd_utils.py").read_bytes()},
    ]
    colab = types.ModuleType("google.colab")
    colab.files = types.SimpleNamespace(upload=lambda: uploads.pop(0))
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(tmp_path)
    exec(code_cells()[0], {})
    assert capsys.readouterr().out.count("That was not kd_utils.py") == 2
    assert (tmp_path / "kd_utils.py").read_bytes() == (
        ROOT / "kd_utils.py"
    ).read_bytes()


@pytest.mark.parametrize("content", ["def distillation_loss(", "<html>"])
def test_set_up_fetches_the_module_from_where_it_is_hosted(
    content, tmp_path, monkeypatch
):
    (tmp_path / "raw" / "HEAD").mkdir(parents=True)
    (tmp_path / "raw" / "HEAD" / "kd_utils.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    cell = code_cells()[0].replace('REPO_URL = ""', f'REPO_URL = "{tmp_path.as_uri()}"')
    if content == "<html>":
        with pytest.raises(ValueError, match="correct REPO_URL"):
            exec(cell, {})
        assert not (tmp_path / "kd_utils.py").exists()
    else:
        exec(cell, {})
        assert (tmp_path / "kd_utils.py").read_text() == content


def notebook_names(starts, **names):
    """Runs the cells of Imagewoof that begin so, and returns what they define."""
    names = {"kd": kd, "torch": torch, "np": np, "F": torch.nn.functional, **names}
    for start in starts:
        [cell] = [source for source in code_cells() if source.startswith(start)]
        exec(cell, names)
    return names


def test_label_loss_is_the_cross_entropy():
    label_loss = notebook_names(["def label_loss"])["label_loss"]
    logits, targets = (
        torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 3.0]]),
        torch.tensor([1, 0]),
    )
    log_p = logits.log_softmax(1)
    assert label_loss(logits, None, targets) == -(log_p[0, 1] + log_p[1, 0]) / 2


def test_class_means_are_the_teachers_mean_soft_answers():
    images = torch.arange(6).view(6, 1, 1, 1).expand(6, 3, 32, 32).to(torch.uint8) * 40
    split = kd.Split(
        images.to(kd.DEVICE),
        torch.tensor([0, 0, 1, 1, 2, 2], device=kd.DEVICE),
        ("a", "b", "c"),
        torch.zeros(6, dtype=torch.bool, device=kd.DEVICE),
    )
    settings = kd.Settings("x", "demo", None, None, None, batch_size=6, temperature=3.0)
    weights = torch.tensor([[1.0], [-2.0], [0.5]], device=kd.DEVICE)

    def teacher(images):  # logits that differ by image
        return images.mean((1, 2, 3), keepdim=True).flatten(1) @ weights.T

    given = {
        "SETTINGS": settings,
        "teacher": teacher,
        "train_split": split,
        "num_classes": 3,
    }
    starts = ["class_means = torch.zeros", "def class_mean_loss"]
    names = notebook_names(starts, **given)
    soft = (teacher(kd.normalise(images.to(kd.DEVICE))) / 3.0).softmax(1)
    expected = soft.view(3, 2, 3).mean(1)
    assert torch.allclose(names["class_means"], expected, atol=1e-5)

    logits = torch.tensor([[1.0, 0.0, 2.0]], device=kd.DEVICE)
    target = torch.tensor([1], device=kd.DEVICE)
    found = names["class_mean_loss"](logits, None, target, 3.0, 1.0)
    q = (logits[0] / 3.0).softmax(0)
    kl = (expected[1] * (expected[1] / q).log()).sum()
    assert found.item() == pytest.approx(9 * kl.item(), rel=1e-4)


def test_report_metrics_are_what_a_plain_calculation_gives():
    names = notebook_names(["# @title Metrics"], num_classes=4)
    generator = torch.Generator().manual_seed(1)
    logits, targets = (
        2 * torch.randn(200, 4, generator=generator),
        torch.arange(200) % 4,
    )
    soft, hits = logits.softmax(1).numpy(), (logits.argmax(1) == targets).numpy()
    expected = [hits[label::4].mean() for label in range(4)]
    assert names["recall"](logits, targets).numpy() == pytest.approx(expected)
    confidence, error = soft.max(1), 0
    for low in np.arange(15) / 15:
        members = (confidence >= low) & (confidence < low + 1 / 15)
        if members.any():
            error += members.mean() * abs(
                hits[members].mean() - confidence[members].mean()
            )
    assert names["ece"](logits, targets).item() == pytest.approx(error, rel=1e-4)
