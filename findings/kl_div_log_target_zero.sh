#!/usr/bin/env bash
# torch 2.14.1: F.kl_div's two ways to give the target disagree where the target is 0.
# Probabilities (log_target=False) count a class of probability 0 as 0, as the definition
# wants, although the documented target * (target.log() - input) would be nan. Their
# logarithms (log_target=True), meant to be the safer way, give nan for the same target.
# So a teacher whose logits mask a class with -inf, or are so far apart that a probability
# underflows before the logarithm is taken, works with one and fails with the other.
# torch.distributions.kl_divergence gives the right value in both forms.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

student = torch.tensor([[1.0, 0.5, -1.0]], requires_grad=True)
q = student.log_softmax(1)
found = {}
for name, teacher in (
    ("masked", torch.tensor([[2.0, 1.0, -torch.inf]])),
    ("far apart", torch.tensor([[2.0, 1.0, -200.0]])),
):
    p = teacher.softmax(1)
    two = p[:, :2]  # the third class has probability 0
    right = (two * (two.log() - q[:, :2])).sum()
    by_distributions = kl_divergence(Categorical(probs=p), Categorical(logits=q))[0]
    by_logits = kl_divergence(Categorical(logits=teacher), Categorical(logits=q))[0]
    values = {
        "log_target=False": F.kl_div(q, p, reduction="batchmean"),
        "log_target=True": F.kl_div(q, p.log(), reduction="batchmean", log_target=True),
        "distributions": by_distributions,
        "distributions, logits": by_logits,
    }
    for way, value in values.items():
        is_right = torch.isclose(value, right).item()
        found[name, way] = "nan" if value.isnan() else "right" if is_right else "wrong"
(gradient,) = torch.autograd.grad(F.kl_div(q, p, reduction="batchmean"), student)
print(f"torch {torch.__version__}: {found}; gradient (probabilities): {gradient.tolist()}")
for (name, way), value in found.items():
    assert value == ("nan" if way == "log_target=True" else "right"), "changed"
assert gradient.isfinite().all(), "changed"
PYTHON
