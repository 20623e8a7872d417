#!/usr/bin/env bash
# torch 2.14.1: among what autocast computes in float32 on a GPU, PyTorch's guide lists
# softmax and log_softmax. One expects the same of torch.autocast("cpu", torch.bfloat16).
# There, both answer in bfloat16, with two to three digits, and only the losses after
# them are computed in float32: of these rounded numbers. So the KL divergence of answers
# from themselves, with the softmax as the target, is not 0, and even negative.
# F.cross_entropy, which takes logits, is as good as in float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
torch.set_num_threads(1)
torch.manual_seed(0)
logits = (3 * torch.randn(512, 10)).bfloat16()  # as a network gives them in autocast
targets = torch.arange(512) % 10


def measure():
    log_p, p = F.log_softmax(logits, 1), F.softmax(logits, 1)
    kl = F.kl_div(log_p, p, reduction="batchmean").item()
    return log_p.dtype, p.dtype, kl, F.cross_entropy(logits, targets).item()


with torch.autocast("cpu", torch.bfloat16):
    log_dtype, dtype, kl, cross_entropy = measure()
logits = logits.float()
exact_kl, exact_cross_entropy = measure()[2:]
print("softmax and log_softmax in autocast:", dtype, log_dtype)
print(f"KL of answers from themselves: {kl:.6f} in autocast, {exact_kl:.6f} without")
print(f"cross-entropy: {cross_entropy:.6f} in autocast, {exact_cross_entropy:.6f} without")
assert dtype == log_dtype == torch.bfloat16, "this has changed"
assert kl < -1e-5 and abs(exact_kl) < 1e-6, "this has changed"
assert abs(cross_entropy - exact_cross_entropy) < 1e-5, "this has changed"
PYTHON
