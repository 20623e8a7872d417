#!/usr/bin/env bash
# timm 1.0.31: one expects LogitDistillationTask(student, teacher) to show the batch to
# both, as it is. That depends on the student's name. The task reads mean and std from
# the student's pretrained_cfg, also for a student without pretrained weights, takes it
# that the batch was normalised with these, and normalises anew for the teacher: a
# teacher that is an ordinary module gets ImageNet's mean and std. With a resnet18 the
# teacher sees the batch. With a mobilevit_xxs (mean 0, std 1) a batch that is already
# normalised is normalised a second time: for the teacher only, and without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q timm==1.0.31 torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import timm
import torch
from timm.task import LogitDistillationTask
from torch import nn


class Teacher(nn.Module):
    """A teacher that says class 0 if the picture is brighter than the average, else 1."""
    def forward(self, pictures):
        self.seen = pictures
        light = 10 * pictures.mean((1, 2, 3))
        return torch.stack([light, -light], 1)


pictures = torch.tensor([0.4, 0.3, -0.3, -0.4]).view(4, 1, 1, 1).expand(4, 3, 64, 64)
classes = torch.tensor([0, 0, 1, 1])
imagenet = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in imagenet)
teacher = Teacher()
found = {}
for name in ("resnet18", "mobilenetv3_small_050", "mobilevit_xxs", "tf_efficientnet_lite0"):
    torch.manual_seed(0)
    student = timm.create_model(name, pretrained=False, num_classes=2)
    task = LogitDistillationTask(student, teacher, criterion=nn.CrossEntropyLoss()).train()
    task(pictures, classes)
    right = (teacher(teacher.seen).argmax(1) == classes).float().mean().item()
    found[name] = torch.equal(teacher.seen, pictures), right
    if name == "mobilevit_xxs":
        twice = torch.allclose(teacher.seen, (pictures - mean) / std, atol=1e-5)
alone = (teacher(pictures).argmax(1) == classes).float().mean().item()
print("timm", timm.__version__, "| the teacher's accuracy on the batch:", alone)
for name, (same, right) in found.items():
    print(f"  student {name}: teacher sees the batch as it is: {same}, its accuracy: {right}")
print("  with mobilevit_xxs the batch is normalised a second time:", twice)
assert alone == 1 and twice, "this has changed"
assert found == {"resnet18": (True, 1.0), "mobilenetv3_small_050": (True, 1.0),
                 "mobilevit_xxs": (False, 0.5), "tf_efficientnet_lite0": (False, 1.0)}, "this has changed"
PYTHON
