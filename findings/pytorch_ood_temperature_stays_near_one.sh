#!/usr/bin/env bash
# pytorch-ood 0.4.0, TemperatureScaling: its fit takes 50 iterations of L-BFGS for one
# number, so one expects the temperature with the least NLL (its docstring says that the
# optimum is only approximately reached). But its learning rate, 0.01, allows each
# iteration a hundredth of the way: from 1, it comes to about 1.27 where 5 is best, and
# most of the gap in NLL stays. The same step with a line search arrives.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pytorch-ood==0.4.0 torch==2.14.1 \
    torchvision==0.29.1 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F
from pytorch_ood.detector import TemperatureScaling

torch.manual_seed(0)
true_logits = 1.5 * torch.randn(4000, 10)
labels = torch.distributions.Categorical(logits=true_logits).sample()


def search(logits):
    temperature = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([temperature], line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(logits / temperature, labels)
        value.backward()
        return value

    optimizer.step(loss)
    return temperature.item()


print("pytorch-ood 0.4.0: best T, its NLL; T that was fitted, its NLL; NLL at T = 1")
for best in (2.0, 3.0, 5.0):
    logits = best * true_logits  # a network that is too sure: `best` would mend it
    fitted = TemperatureScaling(None).fit_logits(logits, labels).t.item()
    found = search(logits)
    nll = [F.cross_entropy(logits / T, labels).item() for T in (found, fitted, 1)]
    print(f"  {found:.2f}, {nll[0]:.3f}; {fitted:.2f}, {nll[1]:.3f}; {nll[2]:.3f}")
    assert abs(found / best - 1) < 0.05
    assert 1.1 < fitted < 1.3, "this has changed"
    assert nll[1] - nll[0] > 0.5 * (nll[2] - nll[0]), "this has changed"
PYTHON
