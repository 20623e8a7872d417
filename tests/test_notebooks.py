"""The two notebooks: alike, clean, small, and able to run top to bottom, also without either experiment."""

import re
import statistics
import sys
import types

import nbformat
import pytest
from conftest import ROOT, code_cells
from nbclient import NotebookClient

NOTEBOOKS = ["Imagewoof_KD.ipynb", "Imagenette_KD.ipynb"]


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(notebook):
    parts = [(o.get("text", ""), o.get("data", {}).get("text/markdown", "")) for o in outputs(notebook)]
    return "\n".join(text for pair in parts for text in pair)


def test_code_is_identical_but_for_the_dataset():
    pairs = zip(*(code_cells(name) for name in NOTEBOOKS), strict=True)
    [(woof, nette)] = [pair for pair in pairs if pair[0] != pair[1]]
    assert "imagewoof2-160" in woof and "imagenette2-160" in nette


@pytest.mark.parametrize("name, words, cells", [(NOTEBOOKS[0], 2000, 45), (NOTEBOOKS[1], 500, 40)])
def test_committed_notebook_is_small_and_clean(name, words, cells):
    notebook, sources = read(name), code_cells(name)
    nbformat.validate(notebook)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert sum(len(text.split()) for text in prose) <= words and len(notebook.cells) <= cells
    lines = [source.splitlines() for source in sources]
    assert statistics.median(map(len, lines)) <= 6 and max(map(len, lines)) <= 16
    assert max(len(line) for source in lines for line in source) <= 100
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(sources) + 1)) and "widgets" not in notebook.metadata
    assert (ROOT / name).stat().st_size < 1_500_000
    for output in outputs(notebook):
        assert output.output_type != "error" and output.get("name") != "stderr"


def test_readme_quotes_the_notebooks():
    texts = {name.split("_")[0]: text_of(read(name)) for name in NOTEBOOKS}
    results = (ROOT / "README.md").read_text().split("## Results")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (Image\w+) (\|.*\|)$", results, re.MULTILINE)
    assert rows and all(row in texts[dataset] for dataset, row in rows)
    numbers = re.findall(r"\d+\.\d+", results)
    assert numbers and all(number in "".join(texts.values()) for number in numbers)


def test_module_is_small():
    lines = (ROOT / "kd_utils.py").read_text().splitlines()
    assert len(lines) <= 700 and max(map(len, lines)) <= 100
    assert sum(line.startswith(("def ", "class ")) for line in lines) <= 60


def without(notebook, heading):
    """The notebook less the code between `## heading` and the next heading of that level."""
    inside, kept = False, []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and "\n## " in f"\n{cell.source}":
            inside = f"\n## {heading}" in f"\n{cell.source}"
        if not (inside and cell.cell_type == "code"):
            kept.append(cell)
    assert len(kept) < len(notebook.cells)
    notebook.cells = kept


@pytest.mark.parametrize("name, left_out", [(NOTEBOOKS[0], None), (NOTEBOOKS[1], None),
                                            (NOTEBOOKS[0], "Experiment 1"), (NOTEBOOKS[0], "Experiment 2")])
def test_notebook_runs_top_to_bottom(name, left_out, tmp_path, monkeypatch):
    for key, value in (("PROFILE", "demo"), ("DATA_DIR", tmp_path), ("RUNS_DIR", tmp_path)):
        monkeypatch.setenv(f"KD_{key}", str(value))
    notebook = read(name)
    if left_out:
        without(notebook, left_out)
    for cell in notebook.cells:  # smaller still, in the way that the settings cell tells its reader
        if cell.source.startswith("SETTINGS ="):
            cell.source += "\nSETTINGS = replace(SETTINGS, epochs=1, image_size=32)"
            cell.source += "\nSWEEP = False" if left_out else ""
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    text = text_of(notebook)
    assert "by hand 0.6450, kd.distillation_loss 0.6450" in text or left_out == "Experiment 2"
    assert text.count("**Distillation into") == (0 if left_out else 2)
    assert text.count("no verdict") == (2 if left_out else 0)
    assert ("By the rule, the choice is" in text) == (name == NOTEBOOKS[0] and not left_out)
    assert not left_out or f"Not run yet: {left_out}" in text
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]


def test_set_up_asks_for_the_module_and_takes_an_upload(tmp_path, monkeypatch, capsys):
    colab = types.ModuleType("google.colab")
    colab.files = types.SimpleNamespace(upload=lambda: {"kd_utils (1).py": b"answer = 42"})
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(tmp_path)
    exec(code_cells()[0], {})
    assert "beside the notebook" in capsys.readouterr().out
    assert (tmp_path / "kd_utils.py").read_text() == "answer = 42"


def test_set_up_fetches_the_module_from_where_it_is_hosted(tmp_path, monkeypatch):
    (tmp_path / "raw" / "HEAD").mkdir(parents=True)
    (tmp_path / "raw" / "HEAD" / "kd_utils.py").write_text("answer = 42")
    monkeypatch.chdir(tmp_path)
    exec(code_cells()[0].replace('REPO_URL = ""', f'REPO_URL = "{tmp_path.as_uri()}"'), {})
    assert (tmp_path / "kd_utils.py").read_text() == "answer = 42"
