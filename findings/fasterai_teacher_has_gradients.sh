#!/usr/bin/env bash
# fasterai 0.4.1 (fastai 2.8.12): one expects KnowledgeDistillationCallback to ask the
# teacher for answers without gradients, and to change the loss of training only. It sets
# the teacher to evaluation mode, but its forward pass is recorded: each step also goes
# backward through the teacher, and the gradients pile up in its weights, step by step,
# since no optimiser clears them. The weights do not move; memory and time are lost. And
# `valid_loss`, also in `learn.validate()`, is the mixture of labels and distillation: it
# cannot be compared with that of a student that learned alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q fasterai==0.4.1 fastai==2.8.12 torch==2.14.1 \
    torchvision==0.29.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner
from fasterai.distill.all import KnowledgeDistillationCallback, SoftTarget
from torch import nn

torch.manual_seed(0)
features, labels = torch.randn(64, 8), torch.randint(0, 3, (64,))
rows = list(zip(features, labels))
loaders = DataLoaders.from_dsets(rows, rows, bs=16, device="cpu")
student, teacher = nn.Linear(8, 3), nn.Linear(8, 3)
before = teacher.weight.detach().clone()
callback = KnowledgeDistillationCallback(teacher, SoftTarget, weight=0.9)
loss = CrossEntropyLossFlat()
learner = Learner(loaders, student, loss_func=loss, cbs=callback, lr=0.01)
sizes = []
with learner.no_bar(), learner.no_logging():
    for _ in range(3):
        learner.fit(1)
        sizes.append(teacher.weight.grad.norm().item())
    valid_loss = learner.validate()[0]
print("the teacher's gradient after 1, 2 and 3 epochs:", [round(x, 3) for x in sizes])
assert torch.equal(teacher.weight, before)
assert 0 < sizes[0] < sizes[1] < sizes[2], "changed"

with torch.no_grad():
    logits = student(features)
    of_labels = F.cross_entropy(logits, labels).item()
    soft = SoftTarget(logits, teacher(features)).item()
print(f"valid_loss {valid_loss:.4f}; labels {of_labels:.4f}, distillation {soft:.4f}")
assert abs(valid_loss - of_labels) > 0.1, "changed"
assert abs(valid_loss - (0.1 * of_labels + 0.9 * soft)) < 1e-3, "changed"
PYTHON
