"""Packs what finished students left, without their weights, for another machine.

python .study/keep.py runs            (in bfloat16)
python .study/keep.py runs float32
"""

import lzma
import sys
from io import BytesIO
from pathlib import Path

import torch

STUDY = Path(__file__).resolve().parent.joinpath(*sys.argv[2:])
TAKEN_AWAY = {("Custom CNN", "alone"), ("Custom CNN", "distilled")}  # of the first seed
runs = Path(sys.argv[1])

for path in sorted(runs.glob("**/students/**/*.pt")):
    packed = STUDY / path.relative_to(runs).with_name(f"{path.name}.xz")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    record = saved["record"]
    is_finished = len(saved["seconds"]) == record["epochs"]
    first = record["seeds"][0] if record["keep_weights"] else None
    needs_weights = any(
        network == "teacher" or (seed == first and (network, arm) in TAKEN_AWAY)
        for network, arm, seed in saved["students"]
    )
    if is_finished and not needs_weights and not packed.exists():
        for state in saved["students"].values():
            state.pop("network", None)
        content = BytesIO()
        torch.save(saved, content)
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.write_bytes(lzma.compress(content.getvalue(), preset=9))
        print(packed.relative_to(STUDY), f"{packed.stat().st_size / 1e3:.0f} kB")
