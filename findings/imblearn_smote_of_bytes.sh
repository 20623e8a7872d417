#!/usr/bin/env bash
# imbalanced-learn 0.14.2: SMOTE makes new samples of a rare class, each on the line
# between two neighbours. So one expects each pixel of a new image to lie between those of
# two images. For images in uint8, as they come from a file, the difference of neighbours
# is taken in uint8: 3 - 4 is 255, and a random part of 255 is added. Without a word, new
# images of digits, whose scale ends at 16, have pixels up to 255, a quarter of the pixels
# are outside what the class ever shows, and a classifier gains next to nothing from them;
# from the same numbers in float64 it gains 25 points. BorderlineSMOTE does the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q imbalanced-learn==0.14.2 scikit-learn==1.9.1 \
    scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
import imblearn
import numpy as np
from imblearn.over_sampling import SMOTE, BorderlineSMOTE
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

print("imbalanced-learn", imblearn.__version__)
digits, classes = load_digits(return_X_y=True)
assert digits.min() == 0 and digits.max() == 16 and (digits == digits.round()).all()
test_eights = digits[1000:][classes[1000:] == 8]
digits, classes = digits[:1000], classes[:1000]
keep = (classes != 8) | (np.cumsum(classes == 8) <= 15)
digits, classes = digits[keep], classes[keep]
eights = digits[classes == 8]


def share_found(images, labels):
    """Of new eights, by the five nearest images, always measured in float64."""
    nearest = KNeighborsClassifier(5).fit(images.astype("float64"), labels)
    return (nearest.predict(test_eights) == 8).mean()


alone = share_found(digits, classes)
print(f"{len(eights)} eights among {len(digits)} digits, pixels from 0 to 16:",
      f"{alone:.0%} of other eights are found")
for method in (SMOTE, BorderlineSMOTE):
    found = {}
    for kind in ("float64", "uint8"):
        images = digits.astype(kind)
        more, labels = method(random_state=0).fit_resample(images, classes)
        assert (more[: len(images)] == images).all() and more.dtype == kind
        new = more[len(images):][labels[len(images):] == 8].astype("float64")
        outside = ((new < eights.min(0)) | (new > eights.max(0))).mean()
        found[kind] = outside, new.max(), share_found(more, labels)
        print(f"{method.__name__}, {kind}: {len(new)} new eights, brightest pixel",
              f"{new.max():.0f},\n  {outside:.0%} outside the range of the eights;",
              f"{found[kind][2]:.0%} are found")
    assert found["float64"][0] == 0 and found["float64"][1] <= 16, "this has changed"
    assert found["uint8"][0] > 0.15 and found["uint8"][1] > 200, "this has changed"
    assert found["float64"][2] - alone > 0.2, "this has changed"
    assert abs(found["uint8"][2] - alone) < 0.05, "this has changed"
PYTHON
