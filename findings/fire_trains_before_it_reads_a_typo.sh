#!/usr/bin/env bash
# fire 0.7.1 makes a command of a function: fire.Fire(train). One expects an unknown
# option, as in `--epohcs=3`, to be refused before anything runs. The function is called
# first, with what could be understood: it trains to the end, with the default number of
# epochs, and only then comes "Could not consume arg", in place of the accuracy that was
# returned. `--no_augment` so trains *with* augmentation (it is spelt `--noaugment`).
# `--augment=false` does, too, and there is no error at all: the function gets the word
# "false", which counts as true, although its type says bool. `False` is understood.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q fire==0.7.1
cd "$folder"
cat > train.py <<'PYTHON'
import fire


def train(epochs: int = 10, augment: bool = True):
    print("trains", epochs, "epochs,", "augmented" if augment else "as they are")
    with open("student.txt", "w") as file:
        file.write(f"{epochs} epochs")
    return "accuracy: 0.9"


fire.Fire(train)
PYTHON
"$folder/venv/bin/python" -W error - <<'PYTHON'
import pathlib
import subprocess
import sys
from importlib.metadata import version

student = pathlib.Path("student.txt")


def call(option):
    student.unlink(missing_ok=True)
    command = [sys.executable, "train.py", option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    print(f"{option}: status {done.returncode}")
    for line in done.stdout.splitlines() + errors:
        print("   ", line)
    return done.returncode, done.stdout, student.exists()


print("fire", version("fire"))
trained, right = "trains 10 epochs, {}\n", "accuracy: 0.9\n"
augmented, plain = trained.format("augmented"), trained.format("as they are")
assert call("--augment=False") == (0, plain + right, True)
assert call("--noaugment") == (0, plain + right, True)
assert call("--epohcs=3") == (2, augmented, True), "this has changed"
assert call("--no_augment") == (2, augmented, True), "this has changed"
assert call("--augment=false") == (0, augmented + right, True), "this has changed"
PYTHON
