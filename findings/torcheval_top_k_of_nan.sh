#!/usr/bin/env bash
# torcheval 0.0.7, MulticlassAccuracy(k=5): the share of images whose class is among the
# five best. From a network that has diverged and answers nan, one expects 0, nan or an
# error; from one that gives ten classes the same score, 50 %. Both have 100 %: it counts
# the classes that are *above* the right one, and nothing is above nan. With k=1 the same
# answers have about 10 %, since that way is another (argmax). HitRate has 100 % even for
# k=1, and ReciprocalRank is 1. So to keep the network with the best top-5 accuracy is to
# keep the one that broke.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torcheval==0.0.7 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from torcheval.metrics import HitRate, MulticlassAccuracy, ReciprocalRank

torch.set_num_threads(1)
print("torcheval", version("torcheval"))
generator = torch.Generator().manual_seed(0)
images = torch.randn(2000, 20, generator=generator)
scores = images @ torch.randn(20, 10, generator=generator)
labels = (scores + 5 * torch.randn(2000, 10, generator=generator)).argmax(1)


def trained(rate):
    torch.manual_seed(0)
    network = torch.nn.Linear(20, 10)
    optimizer = torch.optim.SGD(network.parameters(), rate)
    for _ in range(100):
        optimizer.zero_grad()
        logarithms = network(images).softmax(1).log()
        loss = -(torch.nn.functional.one_hot(labels) * logarithms).sum(1).mean()
        loss.backward()
        optimizer.step()
    return network(images).detach()


def by(metric, answers):
    return round(metric.update(answers, labels).compute().float().mean().item(), 3)


answers = {"trained": trained(0.2), "diverged": trained(500)}
answers["all alike"] = torch.zeros(2000, 10)
assert answers["diverged"].isnan().all()
found = {}
for name, logits in answers.items():
    tops = [by(MulticlassAccuracy(k=k), logits) for k in (1, 2, 5)]
    others = [by(HitRate(k=1), logits), by(ReciprocalRank(), logits)]
    found[name] = tops + others
    print(f"{name}: top 1 {tops[0]:.1%}, top 2 {tops[1]:.1%}, top 5 {tops[2]:.1%};")
    print(f"  HitRate(k=1) {others[0]:.1%}, ReciprocalRank {others[1]}")
for broken in ("diverged", "all alike"):
    assert found[broken][0] < 0.15 and found[broken][1:] == [1] * 4, "this has changed"
top_1, top_2, top_5, hits, _ = found["trained"]
assert 0.3 < top_1 == hits < top_2 < top_5 < 0.98, "this has changed"
PYTHON
