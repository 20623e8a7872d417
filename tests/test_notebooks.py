"""The two notebooks: alike, clean, and able to run top to bottom, also without either experiment."""

import sys
import types
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import kd_utils as kd

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ["Imagewoof_KD.ipynb", "Imagenette_KD.ipynb"]


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def without(notebook, heading):
    """The notebook without the code cells between `## heading` and the next heading of that level."""
    inside, kept = False, []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            inside = cell.source.startswith(f"## {heading}")
        if not (inside and cell.cell_type == "code"):
            kept.append(cell)
    assert len(kept) < len(notebook.cells)
    notebook.cells = kept
    return notebook


def text_of(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "\n".join(output.get("text", "") + str(output.get("data", {}).get("text/markdown", "")) for output in outputs)


def test_code_is_identical_but_for_the_dataset():
    first, second = ([cell.source for cell in code_cells(read(name))] for name in NOTEBOOKS)
    differing = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    assert differing == [('DATASET = "imagewoof2-160"', 'DATASET = "imagenette2-160"')]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebook_is_clean(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    assert (ROOT / name).stat().st_size < 1_500_000
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
    lines = sorted(len(cell.source.splitlines()) for cell in code_cells(notebook))
    assert lines[len(lines) // 2] < 12 and lines[-1] <= 15
    assert "class " not in "".join(cell.source for cell in code_cells(notebook))


@pytest.mark.parametrize("name, dataset", [*zip(NOTEBOOKS, ["imagewoof2-160", "imagenette2-160"])])
def test_committed_notebook_shows_a_whole_study_of_real_images(name, dataset):
    notebook = read(name)
    text, outputs = text_of(notebook), [output for cell in code_cells(notebook) for output in cell.outputs]
    assert f"| dataset | {dataset} |" in text and "| profile | demo |" not in text and "not run" not in text
    figures = 9 if name == "Imagewoof_KD.ipynb" else 8  # the search is shown once
    assert sum("image/png" in output.get("data", {}) for output in outputs) == figures
    assert "| Custom CNN | shuffled |" in text and "Was it the teacher's knowledge of the single image?" in text
    assert text.count("Distillation changed its accuracy by") == 2  # a verdict for each student


@pytest.mark.parametrize("student", ["Custom CNN", "LeNet-5"])
def test_readme_quotes_the_committed_notebooks(student):
    readme = (ROOT / "README.md").read_text()
    for name in NOTEBOOKS:
        rows = [line for line in text_of(read(name)).splitlines() if line.startswith(f"| {student} |")]
        result = next(row for row in rows if "+" in row or "[-" in row)  # the one that has a gain
        assert result.removeprefix(f"| {student} ") in readme


@pytest.mark.parametrize("removed", [None, "Experiment 1", "Experiment 2"])
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_in_demo(name, removed, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_PROFILE", "demo")
    monkeypatch.setenv("KD_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path / "runs"))
    notebook = read(name) if removed is None else without(read(name), removed)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    text = text_of(notebook)
    if removed is None:
        assert sum(text.count(f"{word}.** Dist") for word in kd.REASONS) == 2 and "random initialisation" in text
    else:
        assert f"{removed}: not run yet" in text and text.count("no verdict") == 2
    assert not [output for cell in code_cells(notebook) for output in cell.outputs if output.get("name") == "stderr"]


def test_set_up_takes_an_uploaded_module(tmp_path, monkeypatch):
    colab = types.ModuleType("google.colab")
    colab.files = types.SimpleNamespace(upload=lambda: {"kd_utils (1).py": b"answer = 42"})  # as a browser names a second copy
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(tmp_path)
    exec(code_cells(read(NOTEBOOKS[0]))[0].source, {})
    assert Path("kd_utils.py").read_text() == "answer = 42"


def test_set_up_fetches_the_module_from_repo_url(tmp_path, monkeypatch):
    cell = code_cells(read(NOTEBOOKS[0]))[0].source
    served = tmp_path / "hosted" / "raw" / "HEAD"
    served.mkdir(parents=True)
    (served / "kd_utils.py").write_text("answer = 42\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    exec(cell.replace('REPO_URL = ""', f'REPO_URL = "{(tmp_path / "hosted").as_uri()}"'), {})
    assert Path("kd_utils.py").read_text() == "answer = 42\n"
