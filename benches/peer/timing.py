"""What the peer programs share: timing rounds, peak memory, one line of JSON in the form of `examples/throughput.rs`."""
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch


# Calls of a compiled model that are not counted: the first compiles, and another shape of a gradient may compile again.
COMPILED_WARMUPS = 3


@dataclass
class Seconds:
    rounds: list

    @property
    def median(self):
        return statistics.median(self.rounds)

    @property
    def min(self):
        return min(self.rounds)


def time_rounds(rounds, call, warmups=1):
    """Seconds of each of `rounds` calls after `warmups` calls that are not counted."""
    for _ in range(warmups):
        call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Seconds(seconds)


def compiled_or_reason(call):
    """Calls a compiled function once. Where it cannot be compiled, prints a line of JSON with the reason and exits."""
    try:
        call()
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).split("Set TORCHDYNAMO")[0].split())
        print(json.dumps({"not_compiled": f"{type(error).__name__}: {reason[:300]}"}))
        sys.exit()


def peak_rss_mb():
    """The highest resident memory of this process so far, in MB (10^6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def print_line(seconds, **fields):
    print(json.dumps({"median_s": seconds.median, "min_s": seconds.min, **fields}))
