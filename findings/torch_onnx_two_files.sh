#!/usr/bin/env bash
# torch 2.14.1, torch.onnx.export(…, dynamo=True): the ONNX format allows 2 GB in one
# file, and 10,000 times smaller a network still leaves two: the weights of a network of
# 25,000 parameters go to `network.onnx.data`. Whoever takes `network.onnx` elsewhere
# has a network without weights, which does not load. With external_data=False it is one
# file, which does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os
from pathlib import Path

import onnx
import torch
from torch import nn

network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(64 * 36, 10)).eval()
images = (torch.randn(1, 3, 8, 8),)
found = {}
for name, options in {"usual": {}, "one": {"external_data": False}}.items():
    Path(name).mkdir()
    file = f"{name}/network.onnx"
    torch.onnx.export(network, images, file, dynamo=True, verbose=False, **options)
    sizes = {path.name: path.stat().st_size for path in sorted(Path(name).iterdir())}
    Path(name, "elsewhere").mkdir()
    os.replace(file, f"{name}/elsewhere/network.onnx")
    try:
        onnx.load(f"{name}/elsewhere/network.onnx")
        found[name] = (list(sizes), "loads elsewhere")
    except Exception as error:
        found[name] = (list(sizes), type(error).__name__)
    print(name, sizes, found[name][1])
assert found == {
    "usual": (["network.onnx", "network.onnx.data"], "ValidationError"),
    "one": (["network.onnx"], "loads elsewhere"),
}, f"changed: {found}"
print(f"torch {torch.__version__}, onnx {onnx.__version__}: as described")
PYTHON
