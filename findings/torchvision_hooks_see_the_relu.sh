#!/usr/bin/env bash
# torchvision 0.29.1, resnet18: a forward hook on bn1, or create_feature_extractor with the
# node "bn1", takes features before the ReLU, as some ways to distil want them. One expects
# the output of the batch normalisation: half of it below 0. While the hook runs, so it is.
# But the ReLU that follows works in place, so what was kept holds no negative number when
# the forward pass is over; the extractor gives out one tensor twice, as "bn1" and as
# "relu". Neither warns. A copy (output.clone()) in the hook is safe.
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
torch.set_num_threads(1)
torch.manual_seed(0)
network = torchvision.models.resnet18().eval()
images, kept = torch.randn(2, 3, 64, 64), {}


def keep(module, given, output):
    kept.update(share=(output < 0).float().mean().item(), itself=output)
    kept["copy"] = output.clone()


network.bn1.register_forward_hook(keep)
extractor = create_feature_extractor(network, ["bn1", "relu"])
with torch.no_grad():
    network(images)
    found = extractor(images)
after = {name: (kept[name] < 0).float().mean().item() for name in ("itself", "copy")}
extracted = (found["bn1"] < 0).float().mean().item()
same = found["bn1"].data_ptr() == found["relu"].data_ptr()
print(f"below 0 while the hook runs: {kept['share']:.0%}; afterwards",
      f"{after['itself']:.0%}, in a copy {after['copy']:.0%}")
print(f"from the extractor's node bn1: {extracted:.0%}; one tensor with node relu: {same}")
assert kept["share"] == after["copy"] > 0.4, "this has changed"
assert after["itself"] == extracted == 0 and same, "this has changed"
PYTHON
