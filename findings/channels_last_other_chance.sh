#!/usr/bin/env bash
# torch 2.14.1, on a CPU: what a seed gives depends on the memory format. The same seed
# draws another dropout mask, another rand_like and other initial weights for a
# channels_last tensor than for a contiguous one of the same shape: dropout and
# rand_like deal the numbers out in the order of memory. (dropout2d is not touched.) So
# a network that is turned to channels_last before its weights are drawn anew, or a run
# that turns it on for speed, is not "the same seed" any more. And nn.init.orthogonal_
# does not take such weights at all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch import nn


def draw(function, memory_format):
    ones = torch.ones(4, 8, 6, 6).to(memory_format=memory_format)
    torch.manual_seed(0)
    return function(ones)


functions = {
    "dropout": lambda ones: F.dropout(ones, 0.5),
    "dropout2d": lambda ones: F.dropout2d(ones, 0.5),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "trunc_normal_": nn.init.trunc_normal_,
}
same = {}
for name, function in functions.items():
    first = draw(function, torch.contiguous_format)
    second = draw(function, torch.channels_last)
    assert torch.equal(first, draw(function, torch.contiguous_format))
    same[name] = torch.equal(first, second)
print(f"torch {torch.__version__}, the same numbers in both formats: {same}")
assert same == {name: name == "dropout2d" for name in functions}, "changed"

draw(nn.init.orthogonal_, torch.contiguous_format)
try:
    draw(nn.init.orthogonal_, torch.channels_last)
except RuntimeError as error:
    print("orthogonal_:", error)
else:
    raise SystemExit("changed: orthogonal_ takes channels_last")
PYTHON
