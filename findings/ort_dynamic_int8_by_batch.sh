#!/usr/bin/env bash
# onnxruntime 1.32.0, quantize_dynamic: one expects a network without batch normalisation
# to answer each image by itself, in int8 as in float32. The int8 network measures the
# range of the numbers over the whole batch, and rounds all images to steps of that. So
# an answer depends on what else is in the batch: alone, an image gets other logits than
# among its neighbours. One image that somebody forgot to divide by 255 makes the network
# wrong on many of the *others*; asked one by one, or in float32, they keep their answers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 onnxscript==0.7.2 \
    torch==2.14.1 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from sklearn.datasets import load_digits
from torch.nn import Linear, ReLU

logging.disable(logging.WARNING)
torch.set_num_threads(1)
torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
pixels = (pixels / 16).astype(np.float32)
x, y = torch.tensor(pixels[:1000]), torch.tensor(labels[:1000])
network = torch.nn.Sequential(Linear(64, 64), ReLU(), Linear(64, 64), ReLU(),
                              Linear(64, 10))
optimizer = torch.optim.Adam(network.parameters(), 0.01)
for _ in range(150):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(network(x), y).backward()
    optimizer.step()
torch.onnx.export(network.eval(), (x[:2],), "float32", input_names=["x"], verbose=False,
                  external_data=False, dynamo=True,
                  dynamic_shapes=({0: torch.export.Dim("batch")},))
quantize_dynamic("float32", "int8")
clean, truth = pixels[1000:], labels[1000:]
spoilt = clean.copy()
spoilt[0] *= 255
print("onnxruntime", onnxruntime.__version__)
print(f"accuracy on {len(clean) - 1} images: one by one, in one batch,")
print("  in one batch with an image that is 255 times as bright")
for name in ("float32", "int8"):
    session = onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])
    ways = np.split(clean, len(clean)), [clean], [spoilt]
    answers = [np.concatenate([session.run(None, {"x": batch})[0] for batch in batches])
               for batches in ways]
    alone, batch, bad = ((a.argmax(1) == truth)[1:].mean() for a in answers)
    shift = abs(answers[0] - answers[1]).max() / answers[1].std()
    print(f"{name}: {alone:.1%}, {batch:.1%}, {bad:.1%}; the first two sets of logits"
          f"\n  differ by up to {shift:.3f} of the logits' standard deviation")
    if name == "float32":
        assert shift < 1e-4 and alone == batch == bad, "this has changed"
    else:
        assert shift > 0.01 and abs(alone - batch) < 0.02, "this has changed"
        assert bad < batch - 0.1, "this has changed"
PYTHON
