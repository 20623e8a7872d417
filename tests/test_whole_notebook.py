"""All of Imagewoof: it was started with the first test, and is looked at here."""

import json
import re
import subprocess
import sys

import nbformat
import numpy as np
import torch
from conftest import text_of

import kd_utils as kd

ELSEWHERE = """
import json, sys, torch, warnings
warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.11
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
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    one, three, classes, needs_kd = json.loads(done.stdout)
    assert np.allclose(one + three, expected[:1] + expected, atol=1e-5)
    assert json.loads(classes) == ["a", "b", "c"] and not needs_kd
