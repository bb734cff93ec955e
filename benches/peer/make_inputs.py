"""Writes what the cases `load` and `data` read: a ViT-B/16 of random weights and a folder of photo-like JPEGs.

    python make_inputs.py FOLDER [--images 512]

Gives FOLDER/vit_base_patch16_224.safetensors (346 MB) and FOLDER/photos/{list.txt,0000.jpg,..}: 500x375 (a quarter of
them upright), quality 90, 4:2:0. A photo's spectrum falls with the frequency; so does that of this noise, which makes
files of the size that photos have (about 50 kB). What is there already is kept.
"""
import argparse
from pathlib import Path

import numpy as np
import timm
from PIL import Image
from safetensors.torch import save_file


def photo(rng, rows, columns):
    """[rows, columns, 3] u8: one noise of 1/f for the light, weaker ones for the colours."""
    frequency = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None])
    frequency[0, 0] = np.inf

    def noise():
        spectrum = np.fft.rfft2(rng.standard_normal((rows, columns))) / frequency**1.1
        plane = np.fft.irfft2(spectrum, s=(rows, columns))
        return plane / plane.std()

    light = noise()
    planes = [light + 0.4 * noise() for _ in range(3)]
    return np.clip(127 + 50 * np.stack(planes, axis=2), 0, 255).astype(np.uint8)


def write_photos(folder, count):
    if (folder / "list.txt").exists() and len((folder / "list.txt").read_text().split()) == 2 * count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        size = (500, 375) if index % 4 == 3 else (375, 500)
        Image.fromarray(photo(rng, *size)).save(folder / f"{index:04}.jpg", quality=90)
    # Last, as it says that the folder is whole.
    (folder / "list.txt").write_text("".join(f"{index:04}.jpg {index % 10}\n" for index in range(count)))


def write_backbone(file):
    if file.exists():
        return
    part = file.with_suffix(".part")
    save_file(timm.create_model("vit_base_patch16_224").state_dict(), part)
    part.rename(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=512)
    args = parser.parse_args()
    write_photos(args.folder / "photos", args.images)
    write_backbone(args.folder / "vit_base_patch16_224.safetensors")
