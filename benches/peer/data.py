"""The data path of torchvision: PIL decodes, resizes (bicubic) and normalizes in 2 worker processes; batches of 32.

    python data.py FOLDER --rounds 3 --threads 2
"""
import argparse
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

from timing import peak_rss_mb, print_line, time_rounds


class Photos(torch.utils.data.Dataset):
    """The images of FOLDER/list.txt, lines `path label`."""

    def __init__(self, folder):
        lines = (folder / "list.txt").read_text().splitlines()
        self.entries = [(folder / path, int(label)) for path, label in map(str.split, lines)]
        self.transform = transforms.Compose([
            transforms.Resize((224, 224), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ])

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        path, label = self.entries[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    photos = Photos(args.folder)
    # The workers stay, so that only the first pass, which is not counted, starts them.
    loader = torch.utils.data.DataLoader(
        photos, batch_size=32, num_workers=args.threads, persistent_workers=True)

    def one_pass():
        for _ in loader:
            pass

    seconds = time_rounds(args.rounds, one_pass)
    print_line(seconds, part="data", images=len(photos), threads=args.threads,
               images_per_s=len(photos) / seconds.median, peak_rss_mb=peak_rss_mb())


if __name__ == "__main__":
    main()
