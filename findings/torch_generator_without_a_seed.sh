#!/usr/bin/env bash
# torch 2.14.1: torch.Generator() without a seed. One expects it to be seeded by chance,
# as numpy's default_rng(), random.Random() and torch's own global generator are. It
# always has the same seed, 67280421310721: two generators give the same numbers, and so
# do two runs of a program. So random splits with generator=torch.Generator() are one
# split, a loader that is given one begins with the same images in each run, and the noise
# for a student and for a teacher, from a generator each, is the same noise. Its method
# seed() draws a seed by chance.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import random

import numpy as np
import torch
from torch.utils.data import DataLoader, random_split

loader = DataLoader(range(100), 5, shuffle=True, generator=torch.Generator())
split = random_split(range(100), [95, 5], generator=torch.Generator())[1]
print("numpy.default_rng()", *np.random.default_rng().permutation(100)[:5], sep=",")
print("random.Random()", *random.Random().sample(range(100), 5), sep=",")
print("torch without a generator", *torch.randperm(100)[:5].tolist(), sep=",")
own = torch.randperm(100, generator=torch.Generator())
print("torch.Generator()", *own[:5].tolist(), sep=",")
print("random_split", *split.indices, sep=",")
print("DataLoader", *next(iter(loader)).tolist(), sep=",")
PYTHON
"$folder/venv/bin/python" -W ignore - "$folder/run.py" <<'PYTHON'
import subprocess
import sys

import torch

print("torch", torch.__version__)
command = [sys.executable, "-W", "ignore", sys.argv[1]]
runs = [subprocess.check_output(command, text=True).splitlines() for _ in range(3)]
for lines in zip(*runs):
    name = lines[0].split(",")[0]
    print(f"{name}, three runs:", *(line.split(",", 1)[1] for line in lines), sep="\n  ")
    same = name in ("torch.Generator()", "random_split", "DataLoader")
    assert len(set(lines)) == (1 if same else 3), "this has changed"
student, teacher = torch.Generator(), torch.Generator()
noise = [torch.randn(1000, generator=one) for one in (student, teacher)]
print("noise for student and teacher the same:", torch.equal(*noise))
print("initial seeds:", student.initial_seed(), teacher.initial_seed())
assert torch.equal(*noise) and student.initial_seed() == 67280421310721, "changed"
assert student.seed() != teacher.seed(), "this has changed"
print("after seed() on each, the same seed:",
      student.initial_seed() == teacher.initial_seed())
PYTHON
