#!/usr/bin/env bash
# scikit-learn 1.9.1: one expects top_k_accuracy_score with k=1 to be the accuracy. Where
# two classes have the same score, it takes the *last* of them, and argmax the first. Ties
# are no rarity: bfloat16 has a precision of eight bits. Here, the same made-up
# logits, of about 6, give two accuracies; a network that says the same about every class is
# right about the last one only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import sklearn
from sklearn.metrics import accuracy_score, top_k_accuracy_score


def to_bfloat16(values):
    """Rounded to eight bits, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32)


rng = np.random.default_rng(0)
labels = rng.integers(10, size=20_000)
logits = 6 + rng.normal(size=(20_000, 10))
logits[np.arange(20_000), labels] += 1
logits = to_bfloat16(logits)
best = logits.max(1, keepdims=True)
tied = ((logits == best).sum(1) > 1).mean()
classes = np.arange(10)
top_1 = top_k_accuracy_score(labels, logits, k=1, labels=classes)
first = accuracy_score(labels, logits.argmax(1))
last = accuracy_score(labels, 9 - logits[:, ::-1].argmax(1))
print("scikit-learn", sklearn.__version__)
print(f"tied at the top: {tied:.2%} of 20,000 answers in bfloat16")
print(f"top 1: {top_1:.3%}; argmax: {first:.3%}; the last of the best: {last:.3%}")
assert tied > 0.005 and top_1 == last != first, "this has changed"
equal = np.zeros((3, 3))
for label in range(3):
    found = top_k_accuracy_score([label] * 3, equal, k=1, labels=range(3))
    print(f"all scores equal, label {label} of 0 to 2: top 1 {found:.0f}")
    assert found == (label == 2), "this has changed"
PYTHON
