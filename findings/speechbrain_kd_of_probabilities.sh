#!/usr/bin/env bash
# speechbrain 1.1.2, nll_loss_kd(probabilities, targets, lengths): the names, the
# docstring and its example are of probabilities, for student and teacher. One expects
# the loss to be smallest where the student gives the teacher's probabilities. But no
# logarithm is taken: given what it asks for, it is smallest where the student is
# entirely sure of the teacher's first choice, so a student unlearns what distillation
# is to teach. Given the student's *logarithms*, it is the cross-entropy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q speechbrain==1.1.2 torch==2.14.1 \
    torchaudio==2.11.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from speechbrain.nnet.losses import nll_loss_kd

teacher = torch.tensor([[[0.6, 0.3, 0.1]]])  # one utterance, one frame, three classes
assert "student model" in nll_loss_kd.__doc__ and "probabilities" in nll_loss_kd.__doc__


def learn(form):
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(2000):
        optimizer.zero_grad()
        nll_loss_kd(form(logits, dim=2), teacher, torch.ones(1)).backward()
        optimizer.step()
    return logits.detach().softmax(2).flatten()


sure, like_teacher = learn(torch.softmax), learn(torch.log_softmax)
print("teacher:", teacher.flatten().tolist())
print("student, given probabilities:", [round(p, 3) for p in sure.tolist()])
print("student, given logarithms:", [round(p, 3) for p in like_teacher.tolist()])
assert sure[0] > 0.99, "this has changed"
assert torch.allclose(like_teacher, teacher.flatten(), atol=0.01), "this has changed"
PYTHON
