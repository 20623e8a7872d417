#!/usr/bin/env bash
# KD-Lib 0.0.32: VanillaKD stands there as the method of Hinton et al. (2015). One
# expects a student that is in training mode in every epoch, and a KL of softened answers.
# - The student is in training mode in the first epoch only: train() is called once, and
#   the evaluation after each epoch leaves it in eval(). From the second epoch on there is
#   no dropout, and batch normalisation keeps the statistics of the first.
# - The loss is T² times the mean squared difference of the softened probabilities, T = 20
#   by default. For C classes its gradient is about C² / 2 times smaller than that of
#   T² · KL, 50 times for ten: `distil_weight` = 0.5 means almost only labels.
# Run with today's torch, without the package's own pins of 2021; its text part, which
# needs torchtext's former `legacy`, is replaced by an empty module.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 \
    matplotlib==3.11.0 tensorboard==2.20.0
"$folder/venv/bin/pip" install -q --no-deps KD-Lib==0.0.32
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from types import SimpleNamespace

sys.modules["KD_Lib.KD.text"] = SimpleNamespace(BERT2LSTM=None, get_essentials=None)

import torch
import torch.nn.functional as F
from KD_Lib.KD import VanillaKD
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
data = TensorDataset(torch.randn(64, 20), torch.arange(64) % 10)
loader = DataLoader(data, batch_size=16)
modes = []


class Student(nn.Sequential):
    def forward(self, x):
        if torch.is_grad_enabled():  # a training step
            modes.append(self.training)
        return super().forward(x)


teacher = nn.Linear(20, 10)
layers = nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10)
student = Student(*layers)
optimizers = [torch.optim.SGD(net.parameters(), 0.01) for net in (teacher, student)]
distiller = VanillaKD(teacher, student, loader, loader, *optimizers)
distiller.train_student(epochs=3, plot_losses=False, save_model=False)
epochs = [set(modes[start : start + 4]) for start in (0, 4, 8)]
print(f"KD-Lib 0.0.32, training mode in epochs 1, 2, 3: {epochs}")

teacher_logits, targets = 4 * torch.randn(16, 10), torch.arange(16) % 10
logits = torch.randn(16, 10, requires_grad=True)
distiller.distil_weight, T = 1.0, distiller.temp
theirs = distiller.calculate_kd_loss(logits, teacher_logits, targets)
p, q = (teacher_logits / T).softmax(1), (logits / T).log_softmax(1)
kl = T**2 * F.kl_div(q, p, reduction="batchmean")
mse = T**2 * F.mse_loss(q.exp(), p)
norms = [torch.autograd.grad(loss, logits)[0].norm().item() for loss in (theirs, kl)]
print(f"T {T:g}: gradient {norms[0]:.5f}, that of T² · KL {norms[1]:.5f}")
assert epochs == [{True}, {False}, {False}], "changed"
assert torch.allclose(theirs, mse) and round(norms[1] / norms[0]) == 50, "changed"
PYTHON
