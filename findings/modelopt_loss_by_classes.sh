#!/usr/bin/env bash
# NVIDIA modelopt 0.47.0: LogitsDistillationLoss names the paper of Hinton et al. (2015).
# One expects T² times the KL divergence, averaged over the images. Its default divides by
# the number of classes as well: with 10 classes it is a tenth, with 1,000 a thousandth. So
# StaticLossBalancer's "half and half" is mostly the labels, with 1,000 classes only they.
# reduction="batchmean" gives the paper's loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q nvidia-modelopt==0.47.0 torch==2.14.1 numpy==2.4.6 \
    huggingface_hub==2.4.0 requests==2.34.2
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import modelopt.torch.distill as distill
import torch
import torch.nn.functional as F

torch.manual_seed(0)
T = 4.0
half = distill.StaticLossBalancer(kd_loss_weight=0.5)
for classes in (10, 1000):
    student = torch.randn(64, classes, requires_grad=True)
    teacher = 3 * torch.randn(64, classes)
    soft = F.log_softmax(student / T, 1), F.softmax(teacher / T, 1)
    paper = T**2 * F.kl_div(*soft, reduction="batchmean")
    default = distill.LogitsDistillationLoss(temperature=T)(student, teacher)
    labels = F.cross_entropy(student, teacher.argmax(1))
    both = half({"student_loss": labels, "kd": default})
    from_teacher = 0.5 * default / both
    print(f"{classes} classes: {default:.4f}, as in the paper {paper:.4f};", end=" ")
    print(f"the teacher's share of 'half and half': {from_teacher:.1%}")
    assert torch.isclose(classes * default, paper, rtol=1e-4), "this has changed"
    mean = distill.LogitsDistillationLoss(temperature=T, reduction="batchmean")
    assert torch.isclose(mean(student, teacher), paper, rtol=1e-4)
PYTHON
