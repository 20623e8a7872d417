#!/usr/bin/env bash
# optax 0.2.8 on jax 0.10.2, softmax_cross_entropy_with_integer_labels: for a label of -1
# (not labelled, as in scikit-learn's semi-supervised methods), one expects an error, as
# PyTorch gives, or no loss. It is read as an index from the end: the network learns that
# all photographs without labels are of the last class. A label of C, one too many, gives
# nan. With one_hot and softmax_cross_entropy, both count nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q optax==0.2.8 jax==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
import optax

logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])  # two images, three classes


def integer(label):
    labels = jnp.full(2, label)
    return np.array(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def one_hot(label):
    labels = jax.nn.one_hot(jnp.full(2, label), 3)
    return np.array(optax.softmax_cross_entropy(logits, labels))


for label in (2, -1, 3):
    print(f"label {label}: integer {integer(label)}, one_hot {one_hot(label)}")
assert np.allclose(integer(2), one_hot(2))
assert np.array_equal(integer(-1), integer(2)), "this has changed"
assert np.isnan(integer(3)).all(), "this has changed"
assert not one_hot(-1).any() and not one_hot(3).any(), "this has changed"
PYTHON
