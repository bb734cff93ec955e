"""A ViT-B/16 from a safetensors file with timm: the counterpart of `examples/parts.rs load`.

    python load.py FILE --threads 2
"""
import argparse
import os
import time

import timm
import torch
from safetensors.torch import load_file

from timing import Seconds, peak_rss_mb, print_line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # So that what is set up once, libtorch's threads among it, is there.
    torch.ones(1 << 20) + 1.0
    before = peak_rss_mb()
    start = time.perf_counter()
    model = timm.create_model("vit_base_patch16_224")
    created = time.perf_counter()
    model.load_state_dict(load_file(args.file))
    end = time.perf_counter()
    print_line(Seconds([end - start]), part="load", threads=args.threads, create_model_s=created - start,
               file_mb=os.path.getsize(args.file) / 1e6, grown_rss_mb=peak_rss_mb() - before,
               peak_rss_mb=peak_rss_mb())


if __name__ == "__main__":
    main()
