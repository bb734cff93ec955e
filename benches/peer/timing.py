"""What the peer programs share: timing rounds, peak memory, one line of JSON in the form of `examples/throughput.rs`."""
import json
import resource
import statistics
import time
from dataclasses import dataclass


@dataclass
class Seconds:
    rounds: list

    @property
    def median(self):
        return statistics.median(self.rounds)

    @property
    def min(self):
        return min(self.rounds)


def time_rounds(rounds, call):
    """Seconds of each of `rounds` calls after one that is not counted."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Seconds(seconds)


def peak_rss_mb():
    """The highest resident memory of this process so far, in MB (10^6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def print_line(seconds, **fields):
    print(json.dumps({"median_s": seconds.median, "min_s": seconds.min, **fields}))
