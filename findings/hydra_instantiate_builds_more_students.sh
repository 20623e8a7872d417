#!/usr/bin/env bash
# hydra-core 1.3.8, instantiate: a configuration with a student, an optimiser and a moving
# average, to which it is given as ${student}. One expects one student that all share, as
# YAML's own alias, *student, is one object. But ${student} repeats the student's
# *configuration*: three students are built, each with random weights of its own. The
# optimiser moves the weights of one that never gets a gradient, so nothing is learned,
# and the average is that of a third. There is no warning. Built first and handed over,
# as in instantiate(config.optimizer, student=student), it learns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q hydra-core==1.3.8 omegaconf==2.3.1
"$folder/venv/bin/python" -W error - <<'PYTHON'
import random

import hydra
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

print("hydra-core", hydra.__version__)

class Student:
    made = 0
    def __init__(self):
        Student.made += 1
        self.weight, self.gradient = random.random(), 0

class User:
    def __init__(self, student):
        self.student = student
    def step(self):
        self.student.weight -= 0.1 * self.student.gradient

def learn(student, optimizer):
    """To become 5, by 100 steps down the gradient of the squared error."""
    before = student.weight
    for _ in range(100):
        student.gradient = 2 * (student.weight - 5)
        optimizer.step()
    print(f"weight of the student: before {before:.2f}, after {student.weight:.2f}")
    return student.weight - before


config = OmegaConf.create("""
student: {_target_: __main__.Student}
optimizer: {_target_: __main__.User, student: "${student}"}
average: {_target_: __main__.User, student: "${student}"}
""")
parts = instantiate(config)
print("students built:", Student.made)
assert Student.made == 3 and learn(parts.student, parts.optimizer) == 0, "changed"
assert parts.average.student not in (parts.student, parts.optimizer.student), "changed"
alias = yaml.safe_load("student: &student {width: 8}\noptimizer: {student: *student}")
print("YAML's alias is one object:", alias["student"] is alias["optimizer"]["student"])
assert alias["student"] is alias["optimizer"]["student"], "this has changed"
student = instantiate(config.student)
assert learn(student, instantiate(config.optimizer, student=student)) > 3, "changed"
PYTHON
