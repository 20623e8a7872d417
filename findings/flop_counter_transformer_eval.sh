#!/usr/bin/env bash
# torch 2.14.1: one counts the operations of an inference, so with eval() and no_grad().
# FlopCounterMode then counts nothing at all for nn.TransformerEncoderLayer: 0 operations,
# since PyTorch takes a fast path there, one fused operator that the counter does not
# know. In training mode, the very same layer counts in full; in eval() with gradients on,
# all but the attention itself. Of torchvision 0.29.1's vit_b_16, a third is missing.
# With gradients on and sdpa_kernel(SDPBackend.MATH), the count is the one by hand.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vit_b_16


def multiply_adds(network, inputs, training, gradients):
    network.train(training)
    with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
        network(inputs)
    return counter.get_total_flops() // 2


tokens, width, hidden = 10, 32, 64
attention = 2 * tokens * tokens * width
by_hand = 4 * tokens * width**2 + attention + 2 * tokens * width * hidden
layer = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True)
inputs = torch.rand(1, tokens, width)
found = {
    "train": multiply_adds(layer, inputs, True, False),
    "eval, gradients": multiply_adds(layer, inputs, False, True),
    "eval, no_grad": multiply_adds(layer, inputs, False, False),
}
with sdpa_kernel(SDPBackend.MATH):
    found["eval, gradients, MATH"] = multiply_adds(layer, inputs, False, True)
print(f"torch 2.14.1, a transformer layer: by hand {by_hand}, counted {found}")

tokens, width, hidden = 197, 768, 3072
block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
vit_by_hand = 12 * block + 196 * 768 * 768 + 768 * 1000
counted = multiply_adds(vit_b_16(), torch.rand(1, 3, 224, 224), False, False)
print(f"vit_b_16: by hand {vit_by_hand / 1e9:.1f} billion, counted {counted / 1e9:.1f}")
assert found == {
    "train": by_hand,
    "eval, gradients": by_hand - attention,
    "eval, no_grad": 0,
    "eval, gradients, MATH": by_hand,
}, "changed"
assert counted < 0.7 * vit_by_hand, "changed"
PYTHON
