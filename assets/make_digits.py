"""Makes digits.png and digits.txt from the `digits.csv.gz` that scikit-learn ships.

    pip install numpy pillow
    pip download --no-deps scikit-learn && unzip scikit_learn-*.whl sklearn/datasets/data/digits.csv.gz
    python make_digits.py sklearn/datasets/data/digits.csv.gz

The sprite is a grid of 42 columns of 8x8 tiles, grey, in the order of the file; the grey value is
round(255 * v / 16) of the file's v in 0..=16. digits.txt has one label character a tile.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

COLUMNS = 42

rows = np.loadtxt(sys.argv[1], delimiter=",").astype(np.int64)
images, labels = rows[:, :64].reshape(-1, 8, 8), rows[:, 64]
assert images.min() == 0 and images.max() == 16 and len(rows) == 1797
sprite = np.zeros((-(-len(rows) // COLUMNS) * 8, COLUMNS * 8), np.uint8)
for i, image in enumerate(images):
    y, x = i // COLUMNS * 8, i % COLUMNS * 8
    sprite[y : y + 8, x : x + 8] = np.round(image * 255 / 16)
folder = Path(__file__).parent
Image.fromarray(sprite).save(folder / "digits.png", optimize=True)
(folder / "digits.txt").write_text("".join(map(str, labels)) + "\n")
