#!/usr/bin/env bash
# openvino 2026.4.1: one expects a float32 model on a CPU to be computed in float32, as
# ONNX Runtime and PyTorch do. On a CPU that has bfloat16 instructions (Intel AMX or
# AVX-512 BF16, AMD Zen 4 and later) OpenVINO computes it in bfloat16, without a word: its
# inputs and outputs are still float32. So the same file gives other probabilities on a
# server than on a laptop. EXECUTION_MODE_HINT=ACCURACY or INFERENCE_PRECISION_HINT=f32
# brings float32 back. (On a CPU without bfloat16 this script only says so.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import openvino as ov
from openvino import opset13

rng = np.random.default_rng(0)
features = rng.standard_normal((4, 256)).astype(np.float32)
weights = rng.standard_normal((256, 10)).astype(np.float32)
given = opset13.parameter(features.shape, np.float32)
layer = opset13.matmul(given, opset13.constant(weights), False, False)
model, core = ov.Model([layer], [given]), ov.Core()


def largest_error(**settings):
    compiled = core.compile_model(model, "CPU", settings)
    logits = compiled(features)[0]
    assert logits.dtype == np.float32
    error = float(np.abs(logits - features @ weights).max())
    print(f"{settings or 'as it comes'}: largest error of a logit {error:.6f}")
    return error


usual = largest_error()
exact = largest_error(INFERENCE_PRECISION_HINT="f32")
accurate = largest_error(EXECUTION_MODE_HINT="ACCURACY")
assert max(exact, accurate) < 1e-3
if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
    assert usual > 0.01, "changed"
else:
    print("This CPU has no bfloat16.")
    assert usual < 1e-3, "changed"
PYTHON
