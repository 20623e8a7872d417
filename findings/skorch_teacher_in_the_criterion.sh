#!/usr/bin/env bash
# skorch 1.4.0: in a NeuralNet, the natural place for a frozen teacher is the criterion
# (criterion__teacher=...). One expects a teacher in eval() to stay so, as a loss has no
# modes. Before each step skorch calls train() on the criterion, too: the teacher answers
# in training mode, and its batch normalisation follows the student's batches although its
# weights are frozen. The optimiser gets the teacher's weights along with the student's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q skorch==1.4.0 torch==2.14.1 numpy==2.4.6 \
    scikit-learn==1.9.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F
from skorch import NeuralNetClassifier
from torch import nn

torch.manual_seed(0)
images, labels = torch.randn(256, 20) + 1, torch.arange(256) % 10
modes = []


def network():
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.Linear(32, 10))


class Distillation(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, student_logits, images):
        modes.append(self.teacher.training)
        with torch.no_grad():
            soft = self.teacher(images).softmax(1)
        return F.cross_entropy(student_logits, soft)


class Student(NeuralNetClassifier):
    def get_loss(self, y_pred, y_true, X=None, training=False):
        return self.criterion_(y_pred, X)


teacher = network().eval().requires_grad_(False)
before = teacher[1].running_mean.clone()
student = Student(
    network,
    criterion=Distillation,
    criterion__teacher=teacher,
    max_epochs=2,
    train_split=None,
    verbose=0,
)
student.fit(images, labels)
moved = (teacher[1].running_mean - before).abs().max()
groups = student.optimizer_.param_groups
trained = sum(len(group["params"]) for group in groups)
own = len(list(student.module_.parameters()))
print(f"in training mode at its answers: {modes}; running mean moved by {moved:.2f}")
print(f"{trained} tensors in the optimiser, {own} of them are the student's")
assert modes and all(modes) and moved > 0.1, "this has changed"
assert trained == 2 * own, "this has changed"
PYTHON
