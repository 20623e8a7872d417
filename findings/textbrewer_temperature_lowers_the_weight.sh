#!/usr/bin/env bash
# textbrewer 0.2.1.post1, a toolkit for distillation: DistillationConfig(temperature=4,
# kd_loss_weight=1, hard_label_weight=...). One expects the factor T² of Hinton et al.
# (2015), so that the weights keep their meaning when the temperature changes. There is
# none: from T = 1 to T = 8 the gradient of its kd_ce_loss becomes far smaller, and tuning
# the temperature tunes the teacher's weight.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6 tqdm==4.67.1 \
    tensorboard==2.20.0 setuptools==80.9.0
"$folder/venv/bin/pip" install -q --no-deps textbrewer==0.2.1.post1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from textbrewer import BasicDistiller, DistillationConfig, TrainingConfig
from torch import nn

torch.manual_seed(0)
logits = 3 * torch.randn(64, 10)


class Fixed(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return {"logits": self.logits}


def gradient(T):
    student, teacher = Fixed(torch.zeros(64, 10)), Fixed(logits)
    distiller = BasicDistiller(
        train_config=TrainingConfig(log_dir=None, output_dir="out", device="cpu"),
        distill_config=DistillationConfig(temperature=T, kd_loss_weight=1),
        model_T=teacher,
        model_S=student,
        adaptor_T=lambda batch, outputs: outputs,
        adaptor_S=lambda batch, outputs: outputs,
    )
    loss, _ = distiller.train_on_batch({"images": torch.zeros(64)}, args={})
    loss.backward()
    return student.logits.grad.norm().item()


norms = {T: gradient(T) for T in (1, 2, 4, 8)}
print({T: round(norm, 4) for T, norm in norms.items()})
print(f"from T = 4 to T = 8: {norms[4] / norms[8]:.1f} times smaller")
assert norms[4] / norms[8] > 3, "this has changed"
PYTHON
