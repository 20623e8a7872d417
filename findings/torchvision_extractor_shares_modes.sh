#!/usr/bin/env bash
# torchvision 0.29.1, create_feature_extractor(student, ["layer2"]), to compare a
# student's features with a teacher's: one expects a separate network, or
# one that shares weights. It shares the layers themselves, and so their modes:
# extractor.eval() puts the student's batch normalisation up to layer2 into evaluation
# mode, while student.training stays True. Until the next student.train(), its running
# averages there do not move.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

print("torchvision", torchvision.__version__)
student = torchvision.models.resnet18(num_classes=10).train()
images = torch.rand(4, 3, 64, 64)


def averages_move():
    before = student.bn1.running_mean.clone()
    student(images)
    return not torch.equal(before, student.bn1.running_mean)


assert averages_move()
extractor = create_feature_extractor(student, ["layer2"])
assert extractor.bn1 is student.bn1, "this has changed"
assert averages_move()
extractor.eval()
told = student.training, student.bn1.training, student.layer4[0].bn1.training
print("after extractor.eval(): the student, its bn1, a bn1 of layer4 in training?", told)
print("do the running averages move?", averages_move())
assert told == (True, False, True) and not averages_move(), "this has changed"
student.train()
print("after student.train(), the extractor's layers in training?", extractor.bn1.training)
assert extractor.bn1.training and not extractor.training, "this has changed"
PYTHON
