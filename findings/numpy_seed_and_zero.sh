#!/usr/bin/env bash
# numpy 2.4.6: np.random.default_rng([seed, 0]), [seed, 1] and so on, to get a stream of
# random numbers for each repetition, worker or epoch, as numpy's guide to parallel
# streams advises. One expects each list to have a stream of its own. Zeros at the end do
# not count, up to four numbers: [7, 0], [7, 0, 0] and 7 are one stream. Here, a fifth of
# the labels is made wrong by default_rng(seed), and repetition r holds out a fifth of the
# photographs by default_rng([seed, r]): in repetition 0, each held-out label is wrong.
# In the order that the guide prefers, [r, seed], the seed 0 vanishes: [3, 0] is
# default_rng(3). A generator's spawn() gives other streams.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
import numpy as np
from numpy.random import default_rng

PHOTOGRAPHS, SEED = 10_000, 7


def draw(seed):
    return default_rng(seed).random(PHOTOGRAPHS)


print("numpy", np.__version__)
is_wrong = draw(SEED) < 0.2
shares = []
for repetition in range(4):
    is_held_out = draw([SEED, repetition]) < 0.2
    shares.append(is_wrong[is_held_out].mean())
    print(f"repetition {repetition}: {shares[-1]:.1%} of the held-out labels are wrong")
assert shares[0] == 1, "this has changed"
assert all(0.17 < share < 0.23 for share in shares[1:])

first = draw(SEED)
cases = {
    "[7]": [7],
    "[7, 0]": [7, 0],
    "[7, 0, 0, 0]": [7, 0, 0, 0],
    "[7, 0, 0, 0, 0]": [7, 0, 0, 0, 0],
    "[0, 7]": [0, 7],
}
same = {name: bool((draw(seed) == first).all()) for name, seed in cases.items()}
same["its first spawn"] = bool((draw(default_rng(SEED).spawn(1)[0]) == first).all())
for name, is_same in same.items():
    print(f"default_rng(7) and {name}: {'the same' if is_same else 'other'} numbers")
assert list(same.values()) == [True, True, True, False, False, False], "this has changed"

for repetition in range(4):  # [repetition, seed] with the seed 0
    assert (draw([repetition, 0]) == draw(repetition)).all(), "this has changed"
print("with seed 0, [r, 0] is default_rng(r), for r = 0 to 3")
PYTHON
