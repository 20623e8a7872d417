#!/usr/bin/env bash
# openvino 2026.4.1: one expects ov.convert_model(model) to read a PyTorch model and to
# leave it as it was, as torch.export does. It switches the caller's own model to eval
# mode, and does not switch it back. Whoever converts in the middle of training (to
# measure the int8 size after each epoch, say) trains on without dropout and with frozen
# batch statistics. The gradients still flow, so nothing looks wrong.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import openvino
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Dropout(0.5))
pictures = torch.randn(4, 3, 8, 8)


def trains():
    """Whether (the model says so, dropout is at work, the batch statistics move)."""
    before = model[1].running_mean.clone()
    first, second = model(pictures), model(pictures)
    assert first.requires_grad
    return model.training, not torch.equal(first, second), not torch.equal(before, model[1].running_mean)


found = {}
model.train()
found["before"] = trains()
torch.export.export(model, (pictures,))
found["after torch.export"] = trains()
openvino.convert_model(model, example_input=pictures)
found["after openvino"] = trains()
print("openvino", openvino.__version__, "torch", torch.__version__)
for when, (mode, dropout, statistics) in found.items():
    print(f"  {when}: training={mode}, dropout works: {dropout}, statistics move: {statistics}")
assert found["before"] == found["after torch.export"] == (True, True, True)
assert found["after openvino"] == (False, False, False), "this has changed"
PYTHON
