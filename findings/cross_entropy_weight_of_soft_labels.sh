#!/usr/bin/env bash
# torch 2.14.1: F.cross_entropy takes labels as class numbers, or as probabilities (soft
# labels, mixup, a teacher's answers). One expects labels and the same labels as one-hot
# probabilities to give the same loss. Without `weight` they do. With it they do not: the
# mean of class numbers is divided by the weights of the labels, that of probabilities by
# the number of images. Ten times the weights change the first not at all, the second
# ten-fold. So whoever turns label smoothing by hand on, or mixes in soft labels, also
# changes the size of the gradient; label_smoothing=0.1 with class numbers does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
logits = torch.randn(100, 3, dtype=torch.float64, requires_grad=True)
numbers = torch.arange(100) % 3
one_hot = F.one_hot(numbers, 3).double()
weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
cases = {"no weights": None, "weights": weights, "10 · weights": 10 * weights}
found = {}
print("torch", torch.__version__, "(loss and size of its gradient; numbers, one-hot)")
for name, weight in cases.items():
    pair = []
    for labels in (numbers, one_hot):
        loss = F.cross_entropy(logits, labels, weight=weight)
        [gradient] = torch.autograd.grad(loss, logits)
        pair += [loss.item(), gradient.norm().item()]
    found[name] = pair
    print(f"  {name}: {pair[0]:.3f} {pair[1]:.4f}, {pair[2]:.3f} {pair[3]:.4f}")
same, once, ten = found.values()
assert abs(same[0] - same[2]) < 1e-9
mean_weight = weights[numbers].mean().item()
for at in (0, 1):
    assert abs(once[at + 2] / once[at] - mean_weight) < 1e-9, "this has changed"
    assert abs(ten[at] - once[at]) < 1e-9, "this has changed"
    assert abs(ten[at + 2] - 10 * once[at + 2]) < 1e-9, "this has changed"
smoothed = F.cross_entropy(logits, numbers, weight=weights, label_smoothing=0.1).item()
by_hand = F.cross_entropy(logits, 0.9 * one_hot + 0.1 / 3, weight=weights).item()
print(f"  smoothed, with weights: {smoothed:.3f}, by hand {by_hand:.3f}")
assert abs(by_hand / smoothed - mean_weight) < 1e-9, "this has changed"
PYTHON
