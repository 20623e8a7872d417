"""Stages that are finished without training, and a study whose answers are known."""

from dataclasses import replace

import torch
from conftest import distilled, label_loss, make_split, make_stage, tiny


def finish(stage, logits=None):
    """Writes the file of a finished stage without its training."""
    epochs = range(stage.settings.epochs)
    for student in stage.students:
        answers = logits[student.arm, student.seed] if logits else torch.zeros(24, 3)
        student.logits = answers
        student.history = {key: [0.25 for _ in epochs] for key in student.history}
    stage.seconds = [60.0 * (epoch + 1) for epoch in epochs]
    stage.path.parent.mkdir(parents=True, exist_ok=True)
    stage.save()


VAL = make_split(24, seed=1)
RIGHT = {  # whose answers are right, by arm and seed: all different
    ("alone", 0): torch.arange(24) % 3 == 0,
    ("alone", 1): torch.arange(24) % 4 == 0,
    ("class mean", 0): torch.arange(24) % 2 == 0,
    ("class mean", 1): torch.arange(24) < 15,
    ("distilled", 0): torch.arange(24) > 6,
    ("distilled", 1): torch.arange(24) % 5 > 0,
}
ANSWERS = {  # logits; a right answer is the label, a wrong one the next class
    key: 4.0 * torch.eye(3)[(torch.arange(24) + (~right).int()) % 3]
    for key, right in RIGHT.items()
}


def make_study(settings, second=None, shift=0.0):
    """The files of a study; `shift` makes another teacher, which it does not report."""
    one = make_stage(settings)
    finish(one, ANSWERS)
    build, once = {"ResNet-50": tiny}, replace(settings, seeds=(0,))
    learner = make_stage(once, {"teacher": label_loss}, "teacher", networks=build)
    finish(learner, {("teacher", 0): ANSWERS["distilled", 1]})
    teacher = learner.students[0].network
    teacher[-1].bias.data += shift
    losses = {"class mean": distilled, "distilled": distilled}
    two = make_stage(second or settings, losses, "Experiment 2", teacher=teacher)
    two.students.reverse()  # the order in a file must not matter
    finish(two, ANSWERS)
    return one, two
