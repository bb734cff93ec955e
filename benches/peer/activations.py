"""What a training step of the peer holds between its forward and its backward pass: `parts activations`.

    MALLOC_MMAP_THRESHOLD_=65536 python activations.py --batch 8 --threads 2
"""
import argparse
import json
import os
import statistics

import torch
import torch.nn.functional as F

from convpass_timm import adapted
from timing import peak_rss_mb


def rss_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drop-path", type=float, default=0.1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, 224, 224)
    labels = torch.zeros(args.batch, dtype=torch.long)
    model = adapted(args.drop_path).train()
    growths = []
    for _ in range(6):
        before = rss_mb()
        loss = F.cross_entropy(model(images), labels)
        growths.append((rss_mb() - before) / args.batch)
        loss.backward()
        del loss
    # The first round sets things up.
    print(json.dumps({"saved_mb_per_image": statistics.median(growths[1:]), "peak_rss_mb": peak_rss_mb(),
                      "batch": args.batch, "threads": args.threads}))


if __name__ == "__main__":
    main()
