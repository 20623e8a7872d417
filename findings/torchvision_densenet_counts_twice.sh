#!/usr/bin/env bash
# torchvision 0.29.1, densenet121(memory_efficient=True): "Much more memory efficient, but
# slower". One expects the same training. The gradients are the same; but what saves memory
# is a second forward pass of a part of the network, during backward, and its batch
# normalisation counts that one, too. There, the running averages move twice a step, as with
# a momentum of 0.19 in place of 0.1, in 58 of 121 such layers; so the network in
# evaluation mode is another one. torch.utils.checkpoint, which does it, keeps the
# random numbers of dropout, but not these averages.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torchvision
from torch import nn
from torchvision.models import densenet121

print("torchvision", torchvision.__version__)
torch.set_num_threads(1)
images = 1 + torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
counts, gradients, means, answers = [], [], [], []
for saves_memory in (False, True):
    torch.manual_seed(0)
    network = densenet121(memory_efficient=saves_memory, num_classes=10).train()
    network(images).square().sum().backward()
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    steps = [int(layer.num_batches_tracked) for layer in layers]
    counts.append([steps.count(number) for number in (1, 2)])
    gradients.append(network.classifier.weight.grad)
    means.append(network.features.denseblock1.denselayer1.norm1.running_mean.mean())
    answers.append(network.eval()(images).softmax(1))
    once, twice = counts[-1]
    print(f"memory_efficient={saves_memory}, one step: {once} layers counted 1 batch,",
          f"{twice} counted 2; a running mean is {means[-1]:.4f}")
change = (answers[0] - answers[1]).abs().max()
print(f"largest difference of probabilities in evaluation mode: {change:.3f}")
assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5), "this has changed"
assert counts == [[121, 0], [63, 58]], "this has changed"
assert abs(means[1] / means[0] - 1.9) < 0.01, "this has changed"
PYTHON
