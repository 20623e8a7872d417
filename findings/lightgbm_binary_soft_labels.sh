#!/usr/bin/env bash
# LightGBM 4.7.0 as a student that learns a teacher's probabilities: its objective
# "binary" takes labels such as 0.2 without an error. One expects it to learn
# them, as XGBoost's binary:logistic does. But it counts every label above 0 as a positive
# one: from a teacher that never says more than 35 %, it learns to answer 100 % to
# everything. Its objective "cross_entropy" learns the probabilities. (CatBoost refuses
# them with Logloss, and learns them with CrossEntropy.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q lightgbm==4.7.0 catboost==1.2.10 \
    xgboost-cpu==3.2.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import catboost
import lightgbm
import numpy as np
import xgboost

random = np.random.default_rng(0)
features = random.normal(size=(4000, 3))
teacher = 0.05 + 0.3 / (1 + np.exp(-features[:, 0]))
assert 0.05 < teacher.min() and teacher.max() < 0.35


def lightgbm_learns(objective):
    settings = {"objective": objective, "verbose": -1, "num_threads": 1}
    data = lightgbm.Dataset(features, label=teacher)
    return lightgbm.train(settings, data, 100).predict(features)


def xgboost_learns(objective):
    data = xgboost.DMatrix(features, label=teacher)
    settings = {"objective": objective, "nthread": 1}
    return xgboost.train(settings, data, 100).predict(data)


def catboost_learns(loss):
    settings = {"loss_function": loss, "verbose": 0, "thread_count": 1}
    settings["allow_writing_files"] = False
    model = catboost.CatBoost(settings).fit(features, teacher)
    return model.predict(features, prediction_type="Probability")[:, 1]


print(f"teacher: {teacher.min():.3f} to {teacher.max():.3f}")
for library, learns, objective, learns_it in (
    (lightgbm, lightgbm_learns, "binary", False),
    (lightgbm, lightgbm_learns, "cross_entropy", True),
    (xgboost, xgboost_learns, "binary:logistic", True),
    (catboost, catboost_learns, "CrossEntropy", True),
):
    answers = learns(objective)
    name = f"{library.__name__} {library.__version__}, {objective}"
    print(f"  {name}: {answers.min():.3f} to {answers.max():.3f}")
    is_near = abs(answers - teacher).max() < 0.03
    assert is_near if learns_it else answers.min() > 0.999, "this has changed"
try:
    catboost_learns("Logloss")
except catboost.CatBoostError as error:
    print("  catboost, Logloss:", str(error).split(": ")[-1])
else:
    raise SystemExit("this has changed")
PYTHON
