#!/usr/bin/env bash
# thop 0.1.1 and torchinfo 1.8.0: to count a model's multiply-adds, one expects, leaves
# the model as it was. Both set it to eval, and then give the whole of it the mode of its
# outermost module. So a teacher in eval, inside a wrapper that trains a student, is in
# train mode afterwards: in the next steps its batch normalisation uses the batch, its
# answers change, and its running averages move, although its parameters have no
# gradients. (ptflops 0.7.5 leaves all in eval: the student then trains without dropout.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q thop==0.1.1.post2209072238 torchinfo==1.8.0 \
    ptflops==0.7.5 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from ptflops import get_model_complexity_info
from thop import profile
from torch import nn
from torchinfo import summary


def block():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))


class Distiller(nn.Module):
    """A student, which is trained, and a teacher, which is frozen and in eval."""

    def __init__(self):
        super().__init__()
        self.student = block()
        self.teacher = block().eval().requires_grad_(False)

    def forward(self, images):
        with torch.no_grad():
            target = self.teacher(images)
        return nn.functional.mse_loss(self.student(images), target)


SHAPE = (3, 8, 8)
counters = {
    "nothing": lambda model: None,
    "thop": lambda model: profile(model, (torch.zeros(2, *SHAPE),), verbose=False),
    "torchinfo": lambda model: summary(model, (2, *SHAPE), verbose=0),
    "ptflops": lambda model: get_model_complexity_info(
        model, SHAPE, as_strings=False, print_per_layer_stat=False
    ),
}
print("thop 0.1.1, torchinfo 1.8.0, ptflops 0.7.5: student and teacher in train mode?")
found = {}
for name, counter in counters.items():
    torch.manual_seed(0)
    model, images = Distiller(), torch.randn(16, *SHAPE) + 1
    before = model.teacher(images)
    counter(model)
    modes = model.student.training, model.teacher.training
    counted = int(model.teacher[1].num_batches_tracked)
    change = (model.teacher(images) - before).abs().max().item()
    moved = int(model.teacher[1].num_batches_tracked) - counted
    found[name] = modes, change > 0.1, moved
    print(f"{name}: {modes}, the teacher's answers differ by {change:.2f}, moved {moved}")
assert found["nothing"] == ((True, False), False, 0)
assert found["thop"] == ((True, True), True, 1), "changed"
assert found["torchinfo"] == ((True, True), True, 1), "changed"
assert found["ptflops"] == ((False, False), False, 0), "changed"
PYTHON
