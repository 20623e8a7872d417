#!/usr/bin/env bash
# transformers 5.24.0, Trainer: one expects 4 batches of 4 images, with
# gradient_accumulation_steps=4, to be (nearly) the step of one batch of 16. For a ViT it
# is. For a ResNet of the same library the step and the logged loss are 4 times as large,
# without a word: Trainer leaves the division to any model whose forward takes **kwargs,
# and this one does not divide. With label_smoothing_factor=0.1 it is right again. A ViT
# with a compute_loss of one's own, as for distillation, gets 4 times the step, too.
# loss_is_scaled_for_ga = False brings the division back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 accelerate==1.15.0 \
    torch==2.14.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F
import transformers as hf

torch.set_num_threads(1)
torch.manual_seed(0)
data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 10} for i in range(16)]
print("transformers", hf.__version__)


def make(name):
    torch.manual_seed(0)
    if name == "ViT":
        return hf.ViTForImageClassification(hf.ViTConfig(
            num_labels=10, image_size=32, num_hidden_layers=1, hidden_size=48))
    return hf.ResNetForImageClassification(hf.ResNetConfig(
        num_labels=10, embedding_size=8, hidden_sizes=[8], depths=[1]))


class Distilling(hf.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **options):
        soft = 0.9 * F.one_hot(inputs["labels"], 10) + 0.01  # in place of a teacher
        return F.cross_entropy(model(inputs["pixel_values"]).logits, soft)


def one_step(name, trainer, parts, scaled=None, **options):
    model = make(name)
    bias = list(model.parameters())[-1]
    before = bias.detach().clone()
    run = trainer(model, hf.TrainingArguments(
        ".", per_device_train_batch_size=16 // parts, gradient_accumulation_steps=parts,
        max_steps=1, optim="sgd", learning_rate=1e-3, max_grad_norm=0, logging_steps=1,
        save_strategy="no", use_cpu=True, disable_tqdm=True, log_level="error",
        **options), train_dataset=data)
    run.remove_callback(hf.PrinterCallback)
    run.loss_is_scaled_for_ga = scaled
    run.train()
    return run.state.log_history[0]["loss"], (bias.detach() - before).norm().item()


for title, ratio, name, trainer, options in (
        ("ViT", 1, "ViT", hf.Trainer, {}), ("ResNet", 4, "ResNet", hf.Trainer, {}),
        ("ResNet, smoothed", 1, "ResNet", hf.Trainer, {"label_smoothing_factor": 0.1}),
        ("ViT, own compute_loss", 4, "ViT", Distilling, {}),
        ("the same, not scaled", 1, "ViT", Distilling, {"scaled": False})):
    loss, step = one_step(name, trainer, 1, **options)
    loss_4, step_4 = one_step(name, trainer, 4, **options)
    print(f"{title}: loss {loss:.2f} at once, {loss_4:.2f} in 4 parts; the step in parts"
          f" is {step_4 / step:.2f} times as large")
    for found in (loss_4 / loss, step_4 / step):
        assert abs(found / ratio - 1) < 0.1, "this has changed"
PYTHON
