#!/usr/bin/env bash
# timm 1.0.31: one expects create_optimizer_v2(weights, "sgd") and (weights, "adamw") to be
# torch.optim.SGD and AdamW with their defaults, but for the momentum. "sgd" uses
# Nesterov's momentum; the usual one is called "momentum". Neither decays any weights, not
# even AdamW, whose default in torch is 0.01.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q timm==1.0.31 torch==2.14.1 torchvision==0.29.1 \
    numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import timm
import torch
from timm.optim import create_optimizer_v2

print("timm", timm.__version__)


def two_steps(make):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = make([weight])
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step()
    return round(weight.item(), 4), optimizer.defaults


found = {}
for name in ("sgd", "momentum", "adamw"):
    value, options = two_steps(lambda weights: create_optimizer_v2(weights, name, lr=0.1))
    found[name] = value, options.get("nesterov"), options["weight_decay"]
    print(f"  {name}: after two steps {value}, Nesterov {options.get('nesterov')},")
    print(f"    weight decay {options['weight_decay']}")
plain, _ = two_steps(lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9))
default = two_steps(torch.optim.AdamW)[1]["weight_decay"]
print(f"torch: SGD with momentum 0.9 {plain}, AdamW's weight decay {default}")
assert found["sgd"][1] and found["sgd"][0] != plain == found["momentum"][0], "changed"
assert found["adamw"][0] == 0.8 and found["adamw"][2] == 0, "this has changed"
assert found["sgd"][2] == 0 and default == 0.01, "this has changed"
PYTHON
