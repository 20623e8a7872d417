"""Stages that are finished without training, and a study whose answers are known."""

from dataclasses import replace

import torch
from conftest import distilled, label_loss, make_split, make_stage, tiny

import kd_utils as kd


def finish(stage, logits=None):
    """Writes the file of a finished stage without its training."""
    epochs = range(stage.settings.epochs)
    for student in stage.students:
        answers = logits[student.arm, student.seed] if logits else torch.zeros(24, 3)
        student.logits = answers
        student.history = {key: [0.25 for _ in epochs] for key in student.history}
    stage.seconds = [60.0 * (epoch + 1) for epoch in epochs]
    stage.path.parent.mkdir(parents=True, exist_ok=True)
    kd.save(stage)


VAL = make_split(24, seed=1)
VAL.targets[[1, 2, 5]] = 0  # classes of 11, 7 and 6 images
PLACE = torch.arange(24)
RIGHT = {  # whose answers are right, by arm and seed: all different
    ("alone", 0): PLACE % 3 == 0,
    ("alone", 1): PLACE % 4 == 0,
    ("class mean", 0): PLACE % 2 == 0,
    ("class mean", 1): PLACE < 15,
    ("distilled", 0): PLACE > 6,
    ("distilled", 1): PLACE % 5 > 0,
    ("teacher", 0): PLACE % 6 > 0,
}
SURE = torch.where(PLACE % 5 < 2, 4.0, 1.5)  # of an answer: its logit


def answer(right, wrong=1):
    """Logits [24, 3]: the label where it is right, else a class `wrong` after it."""
    chosen = (VAL.targets.cpu() + wrong * (~right).int()) % 3
    return SURE[:, None] * torch.eye(3)[chosen]


# Wrong answers of the second seed are not the teacher's
ANSWERS = {key: answer(RIGHT[key], wrong=1 + key[1]) for key in RIGHT}


def make_study(settings, shift=0.0):
    """The files of a study; `shift` makes another teacher, which it does not report."""
    splits = (make_split(), VAL)
    one = make_stage(settings, splits=splits)
    finish(one, ANSWERS)
    build, once = {"teacher": tiny}, replace(settings, seeds=(0,))
    learner = make_stage(
        once, {"teacher": label_loss}, "teacher", splits=splits, networks=build
    )
    finish(learner, ANSWERS)
    teacher = learner.students[0].network
    teacher[-1].bias.data += shift
    losses = {"class mean": distilled, "distilled": distilled}
    parts = {"splits": splits, "teacher": teacher}
    two = make_stage(settings, losses, "Experiment 2", **parts)
    two.students.reverse()  # the order in a file must not matter
    finish(two, ANSWERS)
    return one, two
