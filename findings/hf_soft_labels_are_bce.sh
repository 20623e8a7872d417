#!/usr/bin/env bash
# transformers 5.24.0: ...ForImageClassification, given labels, documents a cross-entropy
# for more than one class. One expects that of soft labels (mixup, a teacher's answers),
# too, as F.cross_entropy has it. Labels of floats turn it into ten yes-or-no questions,
# binary_cross_entropy_with_logits, without a word: its minimum for a teacher's 0.90 is a
# softmax of 0.99. And the model remembers: the kind of the first labels it ever meets is
# written to its config. After one look at soft labels it refuses class numbers; it is
# saved so, and a pipeline that loads it gives ten scores that do not sum to 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 torch==2.14.1 \
    torchvision==0.29.1 numpy==2.4.6 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image

hf.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
torch.manual_seed(0)
print("transformers", hf.__version__)
model = hf.ResNetForImageClassification(hf.ResNetConfig(
    num_labels=10, embedding_size=8, hidden_sizes=[8], depths=[1])).eval()
images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
soft = F.one_hot(labels, 10) * (0.9 - 0.1 / 9) + 0.1 / 9
hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("model")


def scores():
    model.save_pretrained("model")
    pipe = hf.pipeline("image-classification", "model", device="cpu")
    return sum(s["score"] for s in pipe(Image.new("RGB", (32, 32)), top_k=10))


before = scores()
with torch.no_grad():
    output = model(pixel_values=images, labels=soft)
ce = F.cross_entropy(output.logits, soft).item()
bce = F.binary_cross_entropy_with_logits(output.logits, soft).item()
print(f"soft labels: loss {output.loss:.4f}; cross-entropy {ce:.4f}, binary {bce:.4f}")
assert abs(output.loss - bce) < 1e-5 < abs(ce - bce), "this has changed"
best = soft[0].logit().requires_grad_()
slope, = torch.autograd.grad(F.binary_cross_entropy_with_logits(best, soft[0]), best)
said = best.softmax(0).max().item()
print(f"teacher {soft.max():.2f}; softmax at the minimum of the binary loss {said:.2f}")
assert slope.abs().max() < 1e-6 and said > 0.98, "this has changed"
try:
    model(pixel_values=images, labels=labels)
    raise SystemExit("this has changed")
except ValueError as error:
    print("class numbers after that:", str(error)[:36], "…")
after = scores()
kept = hf.AutoConfig.from_pretrained("model").problem_type
print(f"saved as {kept}; sum of a pipeline's ten scores {before:.2f}, then {after:.2f}")
assert kept == "multi_label_classification", "this has changed"
assert abs(before - 1) < 1e-3 and after > 2, "this has changed"
PYTHON
