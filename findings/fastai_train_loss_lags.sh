#!/usr/bin/env bash
# fastai 2.8.12 prints train_loss and valid_loss side by side, once an epoch. One expects
# train_loss to be the mean over that epoch's batches. It is a running average with a
# memory of about 50 batches (0.98 a batch) that begins with fit(), not with the epoch: at
# 10 batches an epoch, most of it is of earlier epochs. Here training and validation see
# the same images, without dropout: in the end train_loss is three times valid_loss, which
# looks like underfitting, or like a validation set that is easier. It is neither.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q fastai==2.8.12 torch==2.14.1 torchvision==0.29.1 \
    numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import random

import fastai
import torch
from fastai.basics import SGD, Callback, DataLoader, DataLoaders, Learner
from sklearn.datasets import load_digits

torch.set_num_threads(1)
random.seed(0)  # fastai shuffles by it
torch.manual_seed(0)
print("fastai", fastai.__version__)
pixels, labels = load_digits(return_X_y=True)
data = [(torch.tensor(x).float() / 16, int(y)) for x, y in zip(pixels, labels)][:640]
loaders = DataLoaders(DataLoader(data, bs=64, shuffle=True), DataLoader(data, bs=64))
losses = []


class Keep(Callback):
    def after_loss(self):
        if self.training:
            losses.append(self.learn.loss.item())


network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(),
                              torch.nn.Linear(64, 10))
learner = Learner(loaders, network, loss_func=torch.nn.CrossEntropyLoss(),
                  opt_func=SGD, lr=0.5, cbs=Keep())
learner.logger = lambda row: None
learner.fit(8)
for epoch, (train_loss, valid_loss) in enumerate(learner.recorder.values):
    end = 10 * epoch + 10
    mean = sum(losses[end - 10:end]) / 10
    weights = [0.98 ** (end - 1 - batch) for batch in range(end)]
    running = sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)
    print(f"epoch {epoch}: mean of its 10 batches {mean:.3f}, train_loss"
          f" {train_loss:.3f}, valid_loss {valid_loss:.3f}")
    assert abs(train_loss - running) < 1e-3, "this has changed"
    if epoch > 1:
        assert train_loss > 1.2 * mean, "this has changed"
assert train_loss > 2 * max(mean, valid_loss), "this has changed"
assert abs(mean / valid_loss - 1) < 0.5, "this has changed"
PYTHON
