"""One bypass added into a residual stream, forward and backward: the counterpart of `examples/parts.rs bypass`.

    python bypass.py --batch 16 --rounds 50 --threads 2 [--compile]

The loss that backward starts from is timed alone (`loss_s`) and taken off, as there.
"""
import argparse

import torch

from convpass_timm import Bypass
from timing import COMPILED_WARMUPS, compiled_or_reason, peak_rss_mb, print_line, Seconds, time_rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the sum, in its default mode")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bypass, s = Bypass(768).train(), 1.0
    tokens = torch.randn(args.batch, 197, 768)
    weights = torch.randn(args.batch, 197, 768).flatten()
    variables = list(bypass.parameters())

    def gradients(branch, variables):
        leaf = tokens.detach().requires_grad_()
        loss = branch(leaf).flatten().dot(weights)
        torch.autograd.grad(loss, [*variables, leaf])

    add, warmups = lambda x: x + bypass(x) * s, 1
    if args.compile:
        add, warmups = torch.compile(add), COMPILED_WARMUPS
        compiled_or_reason(lambda: gradients(add, variables))
    whole = time_rounds(args.rounds, lambda: gradients(add, variables), warmups)
    loss = time_rounds(args.rounds, lambda: gradients(lambda x: x, []))
    net = Seconds([seconds - loss.median for seconds in whole.rounds])
    print_line(net, part="bypass", batch=args.batch, threads=args.threads, compiled=args.compile, loss_s=loss.median,
               peak_rss_mb=peak_rss_mb())


if __name__ == "__main__":
    main()
