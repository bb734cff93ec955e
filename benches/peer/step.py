"""A training step or an evaluation of the peer on random images: the counterpart of `examples/throughput.rs`.

    python step.py --mode train|eval|plain-eval --batch 8 --rounds 5 --threads 2 [--drop-path 0.1] [--compile]
        [--backbone-preset vit_base_patch16_224] [--image-size 384] [--classes 1000]
        [--device cuda --precision autocast-bf16]
"""
import argparse

import torch
import torch.nn.functional as F

from convpass_timm import adapted, plain
from timing import COMPILED_WARMUPS, compiled_or_reason, peak_rss_mb, print_line, time_rounds


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["train", "eval", "plain-eval"], default="train")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--backbone-preset", default="vit_base_patch16_224", help="a name in timm")
    parser.add_argument("--image-size", type=int, help="side of the images in pixels; the model's if absent")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the model, in its default mode")
    parser.add_argument("--precision", choices=["f32", "autocast-bf16"], default="f32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = args.device
    autocast = torch.autocast(device, torch.bfloat16, enabled=args.precision == "autocast-bf16")
    which = (args.backbone_preset, args.classes, args.image_size)
    model = plain(*which) if args.mode == "plain-eval" else adapted(args.drop_path, *which)
    images = torch.randn(args.batch, 3, *model.patch_embed.img_size, device=device)
    labels = torch.zeros(args.batch, dtype=torch.long, device=device)
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

    call, warmups = train if args.mode == "train" else evaluate, 1
    if args.compile:
        model, warmups = torch.compile(model), COMPILED_WARMUPS
        compiled_or_reason(call)
    seconds = time_rounds(args.rounds, call, warmups)
    print_line(seconds, mode=args.mode, batch=args.batch, compiled=args.compile, threads=torch.get_num_threads(),
               images_per_s=args.batch / seconds.median, peak_rss_mb=peak_rss_mb())


if __name__ == "__main__":
    main()
