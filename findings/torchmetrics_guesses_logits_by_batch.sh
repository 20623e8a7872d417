#!/usr/bin/env bash
# torchmetrics 1.9.0: BinaryAUROC takes logits or probabilities, and guesses which. One expects
# one answer for the whole data set. It guesses for each batch anew: a batch whose numbers
# all happen to lie between 0 and 1 is taken for probabilities as it stands, any other
# gets a sigmoid. So the same logits give another AUROC in batches than at once, and
# another with the batches in another size, though an AUROC has to do with order only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchmetrics==1.9.0 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torchmetrics
from torchmetrics.classification import BinaryAUROC

print("torchmetrics", torchmetrics.__version__)
generator = torch.Generator().manual_seed(0)
targets = torch.randint(2, (4096,), generator=generator)
logits = 0.8 * targets + 0.5 * torch.randn(4096, generator=generator)
positive, negative = logits[targets == 1], logits[targets == 0]
by_hand = (positive[:, None] > negative).float().mean().item()
print(f"by hand: {by_hand:.4f}")
found = {}
for size in (4096, 8, 4, 2):
    metric = BinaryAUROC()
    for places in torch.arange(4096).split(size):
        metric.update(logits[places], targets[places])
    found[size] = metric.compute().item()
    print(f"batches of {size}: {found[size]:.4f}")
assert abs(found[4096] - by_hand) < 1e-4, "this has changed"
for large, small in ((4096, 8), (8, 4), (4, 2)):
    assert found[large] - found[small] > 0.001, "this has changed"
probabilities = logits.sigmoid()
metric = BinaryAUROC()
for places in torch.arange(4096).split(2):
    metric.update(probabilities[places], targets[places])
print(f"probabilities, in batches of 2: {metric.compute():.4f}")
assert abs(metric.compute() - by_hand) < 1e-4, "this has changed"
PYTHON
