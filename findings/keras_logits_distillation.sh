#!/usr/bin/env bash
# Keras 3.15.1: `keras.distillation.LogitsDistillation(temperature=3.0)` stands in its own
# documentation as "Basic logits distillation with KL divergence". It takes no softmax and
# no T². Its default loss, the string "kl_divergence", becomes a function, and only an
# instance of the class `keras.losses.KLDivergence` is treated as KL. So the raw logits / T
# are read as probabilities, which Keras clips to 1e-7 … 1: logits below 0 are all alike,
# and so are those above T. So answers that differ a lot can have the loss 0, as those
# below, which agree only in what is sure: what distillation should teach is lost. With
# `loss=keras.losses.KLDivergence()`, it is T² · KL of the softened answers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 jax==0.10.2 numpy==2.4.6
cd "$folder"
KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PYTHON'
import keras
import numpy as np

teacher = np.array([[9.0, -1.0, -7.0]], dtype="float32")  # its second choice is clear
students = {
    "as the teacher": teacher,
    "the second choice is another": teacher[:, [0, 2, 1]],
    "sure of nothing else": np.array([[4.0, -30.0, -30.0]], dtype="float32"),
}


def softened(logits, temperature):
    powers = np.exp(logits / temperature)
    return powers / powers.sum()


T, found = 3.0, {}
default = keras.distillation.LogitsDistillation(temperature=T)
instance = keras.losses.KLDivergence()
as_class = keras.distillation.LogitsDistillation(temperature=T, loss=instance)
p = softened(teacher, T)
for name, student in students.items():
    kl = T**2 * (p * np.log(p / softened(student, T))).sum()
    losses = [loss.compute_loss(teacher, student) for loss in (default, as_class)]
    found[name] = *(round(float(loss), 3) for loss in losses), round(float(kl), 3)
print(f"Keras {keras.__version__} (default, KLDivergence(), T² · KL by hand): {found}")
for by_default, by_class, by_hand in found.values():
    assert by_default == 0.0 and abs(by_class - by_hand) < 0.01, "changed"
assert [by_hand > 0.1 for _, _, by_hand in found.values()] == [False, True, True]
PYTHON
