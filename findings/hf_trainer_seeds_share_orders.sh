#!/usr/bin/env bash
# transformers 5.24.0 with accelerate 1.15.0: to tell chance from effect, one trains with
# TrainingArguments(seed=0), 1 and 2, and expects independent shuffles. The order of an
# epoch is drawn from seed + epoch: the second epoch of seed 0 has the very order of the
# first epoch of seed 1, and so on. In 10 epochs, three neighbouring seeds draw 12 orders,
# not 30; the seeds 0, 1000 and 2000 draw 30. torch 2.14.1's DistributedSampler does it as
# well, and torch.manual_seed does not reach it: without a seed of its own, all runs have
# the same 10 orders.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 accelerate==1.15.0 \
    torch==2.14.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import transformers as hf
from torch.utils.data import DistributedSampler

torch.set_num_threads(1)
print("transformers", hf.__version__, "torch", torch.__version__)
data = [{"x": torch.tensor([float(number)]), "labels": 0} for number in range(64)]


class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 2), []

    def forward(self, x, labels):
        self.seen += x[:, 0].int().tolist()
        return {"loss": torch.nn.functional.cross_entropy(self.layer(x), labels)}


def trainer(seed):
    model = Student()
    run = hf.Trainer(model, hf.TrainingArguments(
        ".", seed=seed, num_train_epochs=10, per_device_train_batch_size=32,
        save_strategy="no", use_cpu=True, disable_tqdm=True, log_level="error"),
        train_dataset=data)
    run.remove_callback(hf.PrinterCallback)
    run.train()
    return [tuple(model.seen[start:start + 64]) for start in range(0, 640, 64)]


def sampler(first_seed, **options):
    torch.manual_seed(first_seed)
    drawn = DistributedSampler(data, num_replicas=1, rank=0, **options)
    return [drawn.set_epoch(epoch) or tuple(drawn) for epoch in range(10)]


first, second = trainer(0), trainer(1)
same = first[1:] == second[:9]
print("epochs 2 to 10 of seed 0 are epochs 1 to 9 of seed 1:", same)
assert same, "this has changed"
for name, orders, expected in (
        ("Trainer, seeds 0, 1, 2", first + second + trainer(2), 12),
        ("Trainer, seeds 0, 1000, 2000", first + trainer(1000) + trainer(2000), 30),
        ("DistributedSampler(seed=…), 0, 1, 2",
         [o for seed in range(3) for o in sampler(seed, seed=seed)], 12),
        ("DistributedSampler after manual_seed(…), 0, 1, 2",
         [o for seed in range(3) for o in sampler(seed)], 10)):
    print(f"{name}: {len(set(orders))} orders in 30 epochs")
    assert len(set(orders)) == expected, "this has changed"
PYTHON
