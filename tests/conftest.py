"""What the tests share: a small split, settings for it, and the loop from the notebook's own cell."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.pop("KD_PROFILE", None)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the splits below are on the CPU, so all the rest is, too

import kd_utils as kd


def code_cells(name="Imagewoof_KD.ipynb"):
    cells = nbformat.read(ROOT / name, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def label_loss(student_logits, teacher_logits, targets):
    return F.cross_entropy(student_logits.float(), targets)


def distilled(student_logits, teacher_logits, targets):
    return kd.distillation_loss(student_logits, teacher_logits, targets, temperature=2.0, alpha=0.5)


def make_split(count=48, size=32, seed=0):
    """Three classes that differ in colour; a quarter of the images counts as never seen."""
    generator, targets = torch.Generator().manual_seed(seed), torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    images[torch.arange(count), targets] += 120
    return kd.Split(images, targets, ["red", "green", "blue"], torch.arange(count) % 4 == 0)


def make_settings(runs_dir):
    demo = kd.choose_settings("imagewoof2-160", "demo")
    return replace(demo, runs_dir=Path(runs_dir), batch_size=16, seeds=(0, 1))


def make_teacher():
    """A small frozen network with a batch normalisation, whose buffers training mode would change."""
    torch.manual_seed(7)
    return tiny(3).eval().requires_grad_(False)


def tiny(num_classes):
    """A quick network with what a resume must restore: batch statistics, and dropout by seed and step."""
    layers = nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def make_students(settings, losses=None, networks=None):
    return kd.make_students(losses or {"alone": label_loss}, settings, 3, networks or {"LeNet-5": kd.LeNet5})


def same_weights(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def notebook_loop(settings, split, val):
    """`train` as the reader runs it: the cell of the notebook that defines it."""
    [cell] = [source for source in code_cells() if source.startswith("def train(")]
    names = {"kd": kd, "torch": torch, "SETTINGS": settings, "train_split": split, "val_split": val}
    exec(cell, names)
    return names["train"]


@pytest.fixture
def split():
    return make_split()


@pytest.fixture
def settings(tmp_path):
    return make_settings(tmp_path / "runs")


@pytest.fixture
def train(settings, split):
    return notebook_loop(settings, split, make_split(24, seed=1))
