#!/usr/bin/env bash
# trl 1.16.0: the loss of its distillation trainer, generalized_jsd_loss, has a beta
# "between 0 and 1": at 0 it is the forward, at 1 the reverse KL divergence, and in
# between it is said to interpolate. One expects beta = 0.01 to be near beta = 0. It
# jumps: the loss at 0.01 is a hundredth of that at 0, and at 0.001 a thousandth; at 1 it
# jumps back up. Whoever tries 0, 0.1, 0.5, 0.9 and 1 with a fixed weight beside another
# loss also changes that weight, up to 17-fold. The paper's formula does so, too: divided
# by beta, or by 1 - beta, it would tend to the two KL divergences.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q trl==1.16.0 transformers==5.24.0 torch==2.14.1 \
    numpy==2.4.6
TRL_EXPERIMENTAL_SILENCE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from trl.experimental.gkd import GKDTrainer

torch.manual_seed(0)
student = (2 * torch.randn(4, 16, 50)).double().requires_grad_()
teacher = 2 * torch.randn(4, 16, 50).double()
tokens = torch.zeros(4, 16, dtype=torch.long)  # every one of them counts

print("trl 1.16.0: beta, loss, length of its gradient")
found = {}
for beta in (0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1):
    loss = GKDTrainer.generalized_jsd_loss(student, teacher, tokens, beta=beta)
    (slope,) = torch.autograd.grad(loss, student)
    found[beta] = loss.item(), slope.norm().item()
    print(f"{beta}: {found[beta][0]:.4f} {found[beta][1]:.5f}")
q, p = student.log_softmax(-1), teacher.log_softmax(-1)
forward = (p.exp() * (p - q)).sum(-1).mean().item()
reverse = (q.exp() * (q - p)).sum(-1).mean().item()
assert abs(found[0][0] - forward) < 1e-9 and abs(found[1][0] - reverse) < 1e-9
for end, near, far in ((0, 0.001, 0.01), (1, 0.999, 0.99)):
    for loss_or_slope in (0, 1):
        assert found[near][loss_or_slope] < 0.0015 * found[end][loss_or_slope], "changed"
        assert found[far][loss_or_slope] < 0.015 * found[end][loss_or_slope], "changed"
    assert abs(found[near][0] / 0.001 / found[end][0] - 1) < 0.05, "changed"
assert found[0][0] > 15 * found[0.1][0] and found[0][0] > 7 * found[0.5][0], "changed"
PYTHON
