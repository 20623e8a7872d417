#!/usr/bin/env bash
# speechbrain 1.1.2, kldiv_loss(log_probabilities, targets, label_smoothing=…): to turn
# on a little label smoothing, one expects, changes the loss a little. Two other things
# change, for a classifier: images of class 0 no longer count (0 is taken for padding,
# unless pad_idx says otherwise), and reduction="mean", the default, is a *sum* over the
# batch. So a smoothing of 0.000001 makes the loss of 64 images 56 times as large, and a
# network learns nothing from class 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q speechbrain==1.1.2 torch==2.14.1 \
    torchaudio==2.11.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from speechbrain.nnet.losses import kldiv_loss

torch.manual_seed(0)
logits = torch.randn(64, 10, requires_grad=True)
targets = torch.arange(64) % 10


def loss_of(smoothing, **settings):
    """The loss, and of how many images of each class it has a gradient."""
    log_probabilities = logits.log_softmax(1)
    loss = kldiv_loss(log_probabilities, targets, label_smoothing=smoothing, **settings)
    [gradient] = torch.autograd.grad(loss, logits)
    counts = targets[gradient.norm(dim=1) > 1e-4].bincount(minlength=10)
    return loss.item(), counts.tolist()


plain, smoothed = loss_of(0.0), loss_of(1e-6)
mended = loss_of(1e-6, pad_idx=-1, reduction="batchmean")
print("no smoothing, mean:", *plain)
print("smoothing of 1e-6, mean:", *smoothed)
print("smoothing of 1e-6, batchmean, pad_idx=-1:", *mended)
assert plain[1][0] == 7 and smoothed[1][0] == 0, "this has changed"
assert smoothed[1][1:] == plain[1][1:], "this has changed"
assert 50 < smoothed[0] / plain[0] < 64, "this has changed"
assert abs(mended[0] - plain[0]) < 0.01 and mended[1] == plain[1], "this has changed"
PYTHON
