"""Trains the students of a notebook's stages side by side, in several processes.

    python .study/train.py Imagewoof_KD.ipynb 2

Each of the two processes runs the notebook's own cells, down to its report. Only the
loop is another: a process takes one student after the other, if none else has it, and a
teacher's answers are computed once and kept. A student learns what it learns in the
notebook, bit for bit on a CPU. Run it again after an interruption; at the end, run the
notebook, which loads what was trained.
"""

import copy
import fcntl
import hashlib
import multiprocessing
import os
import sys
import time
from itertools import zip_longest
from pathlib import Path

import nbformat
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import kd_utils as kd  # noqa: E402 - found through the path above

REPORT = "# @title What the finished stages left"
LOCKS = {}  # held until this process ends
unfinished = []  # stages of which others train students


def take(path: Path) -> bool:
    """Whether this process, and no other, is to write a file."""
    if path not in LOCKS:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{path}.lock", "w")  # noqa: SIM115 - it stays open
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        LOCKS[path] = lock
    return True


def write(content, path: Path) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save(content, aside)
    aside.replace(path)


# ── What the teacher says ─────────────────────────────────────────────────
def answers_folder(stage) -> Path:
    record = stage.record
    shapes = ("batch_size", "min_crop", "stream_seed", "image_size", "precision")
    shaped = [record["study"][name] for name in shapes]
    shaped += [record["teacher"], record["learns from"]]
    key = hashlib.sha256(str(shaped).encode()).hexdigest()[:16]
    return stage.path.parent / "answers" / key


@torch.no_grad()
def read_answers(stage, epoch: int) -> list:
    """The teacher's logits for an epoch's batches. While another process computes them,
    this one computes those of a later epoch."""
    folder = answers_folder(stage)
    paths = {n: folder / f"{n}.pt" for n in range(epoch, stage.settings.epochs)}
    while not paths[epoch].exists():
        missing = [n for n, path in paths.items() if not path.exists()]
        mine = next((n for n in missing if take(paths[n])), None)
        if mine is None:
            time.sleep(1)
            continue
        with kd.mixed_precision():
            batches = stage.batches(mine)
            write([stage.teacher(images).cpu() for images, _ in batches], paths[mine])
    return torch.load(paths[epoch], map_location=kd.DEVICE, weights_only=True)


# ── Students ──────────────────────────────────────────────────────────────
# On a GPU, three students share the batches, which are then made once for them
TOGETHER = 3 if kd.DEVICE.type == "cuda" else 1


def parts_of(stage) -> dict:
    """{file: some students}, those of the largest network first."""
    students = sorted(stage.students, key=lambda s: -s.parameters)
    parts = [students[n : n + TOGETHER] for n in range(0, len(students), TOGETHER)]
    folder = stage.path.parent / "students" / stage.name
    folder = folder / f"teacher {stage.record['teacher'][:8]}"
    return {folder / f"{part[0]} of {len(part)}.pt": part for part in parts}


def find(stage, path: Path):
    """A finished file that fits the stage, or None."""
    saved = kd.read_checkpoint(path)
    if saved and len(saved["seconds"]) == stage.settings.epochs:
        return None if kd.differences(saved["record"], stage.record) else saved
    return None


def train_part(stage, path: Path, students) -> None:
    part = copy.copy(stage)
    part.name, part.path = f"{stage.name}: {students[0]}", path
    part.students, part.seconds = students, []
    for epoch in part.epochs_left():
        answers = read_answers(stage, epoch) if stage.teacher else []
        for batch, teacher_logits in zip_longest(part.batches(epoch), answers):
            images, targets = batch
            for student in students:
                student_logits = student.forward(images)
                student.step(student.loss(student_logits, teacher_logits, targets))
        print(f"{part.name}: epoch {epoch + 1}", flush=True)


def join(stage, saved) -> None:
    """One file from those of its parts."""
    seconds = zip(*(one["seconds"] for one in saved), strict=True)
    students = {key: state for one in saved for key, state in one["students"].items()}
    joined = {"seconds": [sum(parts) for parts in seconds], "students": students}
    write({**saved[0], **joined}, stage.path)


def train(stage) -> None:
    """In place of the notebook's: what the other processes train is not waited for,
    unless the next cells need it."""
    for student in stage.students:
        student.parameters = sum(w.numel() for w in student.network.parameters())
    parts, is_trial = parts_of(stage), stage.path.parent.name == "trials"
    while not find(stage, stage.path):
        for path, students in parts.items():
            if not find(stage, path) and take(path):
                train_part(stage, path, students)
        saved = [find(stage, path) for path in parts]
        if all(saved):
            join(stage, saved)
        elif is_trial or len(stage.students) == 1:  # it chooses, or is a teacher
            time.sleep(5)
        else:
            unfinished.append(stage.name)
            return
    kd.restore(stage)


# ── The notebook ──────────────────────────────────────────────────────────
def run(notebook: str) -> None:
    names = {"__name__": "__main__"}
    for cell in nbformat.read(ROOT / notebook, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        title = cell.source.split("\n")[0]
        if title == REPORT:
            break
        try:  # what shows results fails where others train them
            exec(cell.source, names)
        except Exception as error:
            print(f"cell failed: {title}: {error!r}", flush=True)
        if "train" in names:
            names["train"] = train


def work(notebook: str) -> None:
    torch.set_num_threads(1)
    run(notebook)
    while unfinished:
        print("Others still train", *unfinished, sep="; ", flush=True)
        unfinished.clear()
        time.sleep(20)
        run(notebook)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"
    spawned = multiprocessing.get_context("spawn")
    workers = [
        spawned.Process(target=work, args=(sys.argv[1],))
        for _ in range(int(sys.argv[2]))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
