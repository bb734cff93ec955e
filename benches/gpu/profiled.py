"""The kernels that a step of the eager peer launches, by torch.profiler; on a CPU the operators that call no other.

    python profiled.py --mode train|eval --batch 8 --device cuda
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent / "peer"))

from convpass_timm import adapted  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["train", "eval"], default="train")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    args = parser.parse_args()
    # Without drop path and labels of its own, so that each step is the same.
    model = adapted(0.0).to(args.device).train(args.mode == "train")
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    labels = torch.zeros(args.batch, dtype=torch.long, device=args.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step():
        if args.mode == "eval":
            with torch.inference_mode():
                model(images)
            return
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def whole():
        step()
        if args.device == "cuda":
            torch.cuda.synchronize()

    whole()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        whole()
    events = profile.events()
    if args.device == "cuda":
        # The calls on the CPU's side; copies and fills are not among them.
        launches = sum("LaunchKernel" in event.name for event in events)
        what = "kernels launched, by torch.profiler"
    else:
        launches = sum(event.name.startswith("aten::") and not event.cpu_children for event in events)
        what = "operators that call no other, views included, by torch.profiler"
    print(json.dumps({"launches": launches, "what": what}))


if __name__ == "__main__":
    main()
