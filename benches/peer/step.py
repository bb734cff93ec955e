"""A training step or an evaluation of the peer on random images: the counterpart of `examples/throughput.rs`.

    python step.py --mode train|eval|plain-eval --batch 8 --rounds 5 --threads 2 --drop-path 0.1 [--device cuda --precision autocast-bf16]
"""
import argparse

import timm
import torch
import torch.nn.functional as F

from convpass_timm import adapted
from timing import peak_rss_mb, print_line, time_rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["train", "eval", "plain-eval"], default="train")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--precision", choices=["f32", "autocast-bf16"], default="f32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = args.device
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    labels = torch.zeros(args.batch, dtype=torch.long, device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=args.precision == "autocast-bf16")
    if args.mode == "plain-eval":
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    else:
        model = adapted(args.drop_path)
    model.to(device).train(args.mode == "train")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4)

    def finish():
        if device == "cuda":
            torch.cuda.synchronize()

    def train():
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        finish()

    def evaluate():
        with torch.inference_mode(), autocast:
            model(images)
        finish()

    seconds = time_rounds(args.rounds, train if args.mode == "train" else evaluate)
    print_line(seconds, mode=args.mode, batch=args.batch, threads=torch.get_num_threads(),
               images_per_s=args.batch / seconds.median, peak_rss_mb=peak_rss_mb())


if __name__ == "__main__":
    main()
