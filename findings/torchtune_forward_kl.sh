#!/usr/bin/env bash
# torchtune 0.6.1: one expects ForwardKLLoss of two equal answers to be 0, and
# SymmetricKLLoss to be the same when student and teacher change places. ReverseKLLoss is
# a KL divergence; ForwardKLLoss is the cross-entropy with the teacher's probabilities: KL
# plus the teacher's entropy. Its gradient is that of KL, its value is not: it cannot tell
# how far a student is from its teacher. SymmetricKLLoss, the mean of the two, is neither 0
# for equal answers nor symmetric.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6 torchtune==0.6.1 \
    torchao==0.10.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F
from torchtune.modules.loss import ForwardKLLoss, ReverseKLLoss, SymmetricKLLoss

torch.manual_seed(0)
student, teacher = 3 * torch.randn(2, 6, 5)
labels = torch.zeros(6, dtype=torch.int64)  # only -100 would count: left out
q, p = student.log_softmax(1), teacher.log_softmax(1)
forward = F.kl_div(q, p, reduction="batchmean", log_target=True)
reverse = F.kl_div(p, q, reduction="batchmean", log_target=True)
entropy = -(p.exp() * p).sum(1).mean()
print(f"KL(teacher|student) {forward:.4f}, KL(student|teacher) {reverse:.4f}")

found = {}
for loss in (ForwardKLLoss(), ReverseKLLoss(), SymmetricKLLoss()):
    there, back = loss(student, teacher, labels), loss(teacher, student, labels)
    equal = loss(teacher, teacher, labels)
    found[type(loss).__name__] = there, back, equal
    name = type(loss).__name__
    print(f"{name}: {there:.4f}, changed places {back:.4f}, equal answers {equal:.4f}")
assert torch.allclose(found["ReverseKLLoss"][0], reverse)
assert torch.allclose(found["ForwardKLLoss"][0], forward + entropy), "changed"
assert torch.allclose(found["ForwardKLLoss"][2], entropy), "changed"
there, back, equal = found["SymmetricKLLoss"]
assert equal > 0.1 and (there - back).abs() > 0.01, "changed"
PYTHON
