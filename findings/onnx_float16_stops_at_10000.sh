#!/usr/bin/env bash
# onnxconverter-common 1.16.0, convert_float_to_float16: float16 reaches 65,504, so one
# expects that weights up to there are kept. By default all beyond 10,000 become 10,000
# (max_finite_val), with a warning. In a batch normalisation whose running variance is
# 20,000 or 60,000, the answers are wrong by 41 % and by 145 %, with no nan or inf.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxconverter-common==1.16.0 onnx==1.23.2 \
    onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxconverter_common.float16 import convert_float_to_float16


def build(variance):
    numbers = {"scale": 1, "bias": 0, "mean": 0, "variance": variance}
    weights = [
        numpy_helper.from_array(np.array([value], dtype=np.float32), name)
        for name, value in numbers.items()
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 1, 1])
        for name in ("x", "y")
    )
    node = helper.make_node("BatchNormalization", ["x", *numbers], ["y"])
    graph = helper.make_graph([node], "network", [x], [y], weights)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )


def answer(model):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    [[[[value]]]] = session.run(None, {"x": np.full((1, 1, 1, 1), 300, np.float32)})[0]
    return value


for variance, expected in ((5000, 0.0), (20000, 0.41), (60000, 1.45)):
    model, found = build(variance), {}
    for name, settings in {"default": {}, "65504": {"max_finite_val": 65504.0}}.items():
        half = convert_float_to_float16(model, keep_io_types=True, **settings)
        found[name] = answer(half) / answer(model) - 1
    print(
        f"variance {variance}: off by {found['default']:.0%}, "
        f"with max_finite_val=65504 by {found['65504']:.0%}"
    )
    assert abs(found["default"] - expected) < 0.01, "this has changed"
    assert abs(found["65504"]) < 0.01
PYTHON
