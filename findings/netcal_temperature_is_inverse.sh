#!/usr/bin/env bash
# netcal 1.4.0: its TemperatureScaling documents q = softmax(s / T), "with the temperature
# T", as Guo et al. (2017) define it. One expects the fitted attribute `temperature` to be
# that T. It is 1 / T: the factor by which the logits are multiplied. An overconfident
# network, which needs T = 2.5, gets `temperature` 0.4; who divides logits by it makes the
# network 6.25 times too sure. `transform`, of the same object, calibrates as it should.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q netcal==1.4.0 torch==2.14.1 pyro-ppl==1.9.1 \
    numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from netcal.scaling import TemperatureScaling

TRUE = 2.5  # what an overconfident network's logits should be divided by
chance = np.random.default_rng(0)


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


calibrated = chance.normal(scale=1.5, size=(20_000, 10))  # logits whose softmax is right
labels = (softmax(calibrated).cumsum(1) < chance.random((20_000, 1))).sum(1)
logits = TRUE * calibrated


def nll(probabilities):
    return -np.log(probabilities[np.arange(len(labels)), labels]).mean()


scaling = TemperatureScaling()
scaling.fit(softmax(logits), labels)
value = float(np.squeeze(scaling.temperature))
losses = {
    "as it is": nll(softmax(logits)),
    "transform": nll(scaling.transform(softmax(logits))),
    "logits / temperature": nll(softmax(logits / value)),
    "logits · temperature": nll(softmax(logits * value)),
}
print(f"netcal 1.4.0: T is {TRUE}, .temperature says {value:.2f}; NLL:")
print({name: round(float(loss), 3) for name, loss in losses.items()})
assert abs(value - 1 / TRUE) < 0.02, "changed"
assert abs(losses["logits · temperature"] - losses["transform"]) < 1e-3
assert losses["transform"] < losses["as it is"] < losses["logits / temperature"]
PYTHON
