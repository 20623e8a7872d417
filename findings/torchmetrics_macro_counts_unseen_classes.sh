#!/usr/bin/env bash
# torchmetrics 1.9.0: Imagenette holds 10 of ImageNet's 1000 classes. Its images are
# shown to a classifier of 1000 classes, and MulticlassAccuracy(num_classes=1000) counts.
# One expects the share of right answers; or, as its default is the average over classes,
# the average over the 10 classes that there are: as scikit-learn's
# balanced_accuracy_score and torcheval give it. But a class that has no image at all
# enters the average, with accuracy 0, as soon as one wrong answer names it. With 88 % of
# the answers right, it reports 2 %. Accuracy(task="multiclass", num_classes=1000), the
# other door to the same metric, has another default and reports 88 %.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchmetrics==1.9.0 torcheval==0.0.7 \
    scikit-learn==1.9.1 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from sklearn.metrics import balanced_accuracy_score
from torcheval.metrics.functional import multiclass_accuracy
from torchmetrics import Accuracy
from torchmetrics.classification import MulticlassAccuracy

CLASSES, IMAGES = 1000, 4000
torch.manual_seed(0)
labels = torch.arange(IMAGES) % 10 * 100  # 10 classes out of 1000, equally often
answers = labels.clone()
wrong = torch.rand(IMAGES) < 0.12
answers[wrong] = torch.randint(CLASSES, (int(wrong.sum()),))  # a wrong one: any class

share = (answers == labels).double().mean().item()
scores = {
    "MulticlassAccuracy": MulticlassAccuracy(CLASSES)(answers, labels).item(),
    "Accuracy": Accuracy(task="multiclass", num_classes=CLASSES)(answers, labels).item(),
    "torcheval macro": multiclass_accuracy(
        answers, labels, average="macro", num_classes=CLASSES
    ).item(),
    "scikit-learn balanced": balanced_accuracy_score(labels, answers),
}
named = len(answers.unique())
print(f"torchmetrics 1.9.0: {share:.1%} right, in 10 classes; {named} classes named;")
print({name: round(score, 4) for name, score in scores.items()})
assert named > 300
for name in ("Accuracy", "torcheval macro", "scikit-learn balanced"):
    assert abs(scores[name] - share) < 1e-5, name
assert abs(scores["MulticlassAccuracy"] - share * 10 / named) < 1e-5, "changed"
assert scores["MulticlassAccuracy"] < 0.03, "changed"
PYTHON
