#!/usr/bin/env bash
# torchdistill 1.1.5: the loss KDLoss(temperature, alpha) documents
# alpha · CE + (1 − alpha) · T² · KL. One expects that alpha = 0, no labels, is its limit.
# It is not: at alpha = 0 the factor T² is gone, so at T = 4 the loss and its gradient are
# 16 times smaller than at alpha = 0.0001. The same happens with alpha > 0 if `targets`
# are left out: neither (1 − alpha) nor T² is applied.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 \
    torchdistill==1.1.5 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torchdistill.losses.mid_level import KDLoss

generator = torch.Generator().manual_seed(0)
student_logits = torch.randn(8, 10, generator=generator, requires_grad=True)
teacher_logits = 4 * torch.randn(8, 10, generator=generator)
targets = torch.arange(8)
given = {"net": {"output": student_logits}}, {"net": {"output": teacher_logits}}


def measure(alpha, *labels):
    loss = KDLoss("net", "output", "net", "output", temperature=4, alpha=alpha)
    value = loss(*given, *labels)
    [gradient] = torch.autograd.grad(value, student_logits)
    return value.item(), gradient.norm().item()


nearly, zero = measure(0.0001, targets), measure(0, targets)
unlabelled = measure(0.5)
ratios = [round(a / b, 1) for a, b in zip(nearly, zero, strict=True)]
print(f"torchdistill 1.1.5: alpha 0.0001 ÷ alpha 0, loss and gradient: {ratios}")
print(f"alpha 0.5 without targets is alpha 0: {unlabelled == zero}")
assert ratios == [16.0, 16.0] and unlabelled == zero, "changed"
PYTHON
