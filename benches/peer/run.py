"""Runs the crate and its peer in turn, case by case, and writes the ratios: what `make bench-peer` calls.

    python run.py --peer PYTHON --bin target/release/examples --inputs FOLDER [--rounds 3] [--cases train-8,eval-8]

Needs nothing but Python; PYTHON is the peer's, with the packages of requirements.txt. A round runs each case once on
either side, the two changing places from round to round, each in a process of its own. results.json and RESULTS.md
beside this file get the cases that were run; those that were not keep what they had, with their own date.
"""
import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
THREADS = "2"


@dataclass
class Case:
    """Two commands that each print a line of JSON, and the ratio of one of its numbers that is aimed at."""
    name: str
    what: str
    ours: list
    peer: list
    target: float = None
    # Processes of either side a round, where one process times one call.
    repeats: int = 1
    key: str = "median_s"


def step(name, what, batch, rounds, target=None, mode="train", peer_mode=None, extra=()):
    options = ["--batch", str(batch), "--rounds", str(rounds), *extra]
    return Case(name, what, ["throughput", "--mode", mode, *options],
                ["step.py", "--mode", peer_mode or mode, *options], target)


def recomputed(name, batch, rounds):
    options = ["--mode", "train", "--batch", str(batch), "--rounds", str(rounds)]
    return Case(name, f"training step, blocks computed again in backward, batch {batch}",
                ["throughput", *options, "--recompute"], ["step.py", *options])


def held(name, what, target, *options):
    return Case(name, what, ["parts", "activations", *options], ["activations.py"], target, key="saved_mb_per_image")


FLAT = ["--drop-path", "0"]
PHOTOS, BACKBONE = "{inputs}/photos", "{inputs}/vit_base_patch16_224.safetensors"
CASES = [
    step("train-8", "training step, batch 8", 8, 5, 0.85),
    step("train-32", "training step, batch 32", 32, 2, 0.85),
    step("train-8-flat", "the same without drop path, batch 8", 8, 5, extra=FLAT),
    step("train-32-flat", "the same without drop path, batch 32", 32, 2, extra=FLAT),
    recomputed("train-8-recompute", 8, 5),
    recomputed("train-32-recompute", 32, 2),
    held("activations", "held between forward and backward, an image", 0.75),
    held("activations-recompute", "the same with blocks computed again", 0.25, "--recompute"),
    step("eval-8", "evaluation against the adapted peer, batch 8", 8, 5, 0.92, "eval"),
    step("eval-32", "evaluation against the adapted peer, batch 32", 32, 3, 0.92, "eval"),
    step("eval-8-plain", "adapted, against the unadapted timm ViT, batch 8", 8, 5, 0.95, "eval", "plain-eval"),
    step("eval-32-plain", "adapted, against the unadapted timm ViT, batch 32", 32, 3, 0.95, "eval", "plain-eval"),
    Case("bypass", "one bypass added in, forward and backward, [16, 197, 768]", ["parts", "bypass"], ["bypass.py"], 0.6),
    Case("load", "opening a ViT-B/16 of 346 MB", ["parts", "load", BACKBONE], ["load.py", BACKBONE], 0.5, repeats=3),
    Case("data", "JPEG files to batches of 224x224", ["parts", "data", PHOTOS], ["data.py", PHOTOS], 0.5),
]


GPU = ["--device", "cuda", "--precision", "autocast-bf16"]
# Instead of the above with --cuda.
CUDA_CASES = [
    step("cuda-train-32", "training step on a GPU, autocast to bf16, batch 32", 32, 20, extra=GPU),
    step("cuda-train-64", "training step on a GPU, autocast to bf16, batch 64", 64, 20, extra=GPU),
    step("cuda-eval-64", "evaluation on a GPU, autocast to bf16, batch 64", 64, 20, mode="eval", extra=GPU),
    step("cuda-eval-64-plain", "adapted, against the unadapted timm ViT on a GPU, batch 64", 64, 20, mode="eval",
         peer_mode="plain-eval", extra=GPU),
]


def run_once(command):
    """The last line that the command prints, as JSON."""
    # Large blocks to and from the kernel one by one, so that memory held is memory used; it slows both sides down.
    held = {"MALLOC_MMAP_THRESHOLD_": "65536"} if any("activations" in part for part in command) else {}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **held})
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def run_side(command, case):
    """One round of one side: of several processes, the one of the median."""
    lines = [run_once(command) for _ in range(case.repeats)]
    return sorted(lines, key=lambda line: line[case.key])[case.repeats // 2]


def run_case(case, args, places):
    fill = [argument.format(inputs=args.inputs) for argument in case.ours]
    ours = [str(args.bin / fill[0]), *fill[1:], "--threads", THREADS]
    fill = [argument.format(inputs=args.inputs) for argument in case.peer]
    peer = [args.peer, str(HERE / fill[0]), *fill[1:], "--threads", THREADS]
    sides = [("ours", ours), ("peer", peer)]
    return {side: run_side(command, case) for side, command in (sides if places else sides[::-1])}


def summary(case, rounds):
    """What is kept of a case: medians, the ratio of each round, memory, and what only one side prints."""
    ours, peer = ([line[side] for line in rounds] for side in ("ours", "peer"))
    median = lambda lines, key: statistics.median(line[key] for line in lines)
    entry = {"what": case.what, "target": case.target, "ours": median(ours, case.key), "peer": median(peer, case.key)}
    entry["ratio"] = entry["ours"] / entry["peer"]
    entry["round_ratios"] = [line["ours"][case.key] / line["peer"][case.key] for line in rounds]
    for side, lines in (("ours", ours), ("peer", peer)):
        for key in ("peak_rss_mb", "grown_rss_mb", "times_bound", "bound_s", "file_mb", "images_per_s"):
            if all(line.get(key) is not None for line in lines):
                entry[f"{side}_{key}"] = median(lines, key)
    return entry


def show(case, value):
    return f"{1e3 * value:.1f} ms" if case.key == "median_s" else f"{value:.1f} MB"


def machine(args):
    """The processor, its cores, and the libtorch of either side."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        cpu = found.group(1) if found else cpu
    version = [args.peer, "-c", "import torch; print(torch.__version__)"]
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": int(THREADS), "libtorch": args.libtorch,
            "peer_torch": subprocess.run(version, stdout=subprocess.PIPE, text=True, check=True).stdout.strip(),
            "load_average": round(os.getloadavg()[0], 2)}


def notes(entry):
    """Memory and bounds, where a case has them."""
    parts = []
    if "ours_times_bound" in entry:
        parts.append(f"{entry['ours_times_bound']:.1f} times the bound ({1e3 * entry['ours_bound_s']:.1f} ms)")
    if "ours_grown_rss_mb" in entry:
        parts.append("memory {ours_grown_rss_mb:.0f} against {peer_grown_rss_mb:.0f} MB, file {ours_file_mb:.0f} MB".format(**entry))
    elif "ours_images_per_s" in entry and entry["what"].startswith("JPEG"):
        parts.append("{ours_images_per_s:.0f} against {peer_images_per_s:.0f} images/s".format(**entry))
    else:
        parts.append("peak {ours_peak_rss_mb:.0f} against {peer_peak_rss_mb:.0f} MB".format(**entry))
    return ", ".join(parts)


def table(results):
    """results.json as Markdown."""
    lines = ["| case | | ours | peer | ratio | at most | each round | |", "|---|---|---|---|---|---|---|---|"]
    for case in CASES + CUDA_CASES:
        entry = results.get(case.name)
        if entry is None:
            continue
        target = "" if entry["target"] is None else f"{entry['target']:.2f}"
        ratios = " ".join(f"{ratio:.3f}" for ratio in entry["round_ratios"])
        lines.append(f"| {case.name} | {entry['what']} | {show(case, entry['ours'])} | {show(case, entry['peer'])} "
                     f"| **{entry['ratio']:.3f}** | {target} | {ratios} | {notes(entry)} |")
    lines.append("")
    for header in dict.fromkeys(header_of(entry) for entry in results.values()):
        names = [name for name, entry in results.items() if header_of(entry) == header]
        lines.append(f"- {', '.join(names)}: {header}")
    return "\n".join(lines) + "\n"


def header_of(entry):
    return ("{date}, {cpu}, {cores} cores, {threads} threads, libtorch {libtorch} against PyTorch {peer_torch}, "
            "load average {load_average} at the start").format(date=entry["date"], **entry["machine"])


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="the peer's Python")
    parser.add_argument("--bin", type=Path, required=True, help="folder of the built examples")
    parser.add_argument("--inputs", type=Path, required=True, help="where make_inputs.py writes")
    parser.add_argument("--libtorch", default="unknown", help="version of the libtorch that the examples use")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cuda", action="store_true", help="the cases for a GPU")
    parser.add_argument("--cases", default="", help="names with commas between; all if empty")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and RESULTS.md")
    args = parser.parse_args()
    cases = CUDA_CASES if args.cuda else CASES
    known = [case.name for case in cases]
    wanted = [name for name in args.cases.split(",") if name] or known
    unknown = [name for name in wanted if name not in known]
    if unknown or args.rounds < 1:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(known)}" if unknown else "--rounds: at least 1")
    return args, [case for case in cases if case.name in wanted]


def main():
    args, cases = parse_args()
    where, today = machine(args), datetime.date.today().isoformat()
    if any("inputs" in argument for case in cases for argument in case.ours):
        subprocess.run([args.peer, str(HERE / "make_inputs.py"), str(args.inputs)], check=True)
        # Into the page cache.
        for file in args.inputs.rglob("*.*"):
            file.read_bytes()
    rounds = {case.name: [] for case in cases}
    for index in range(args.rounds):
        for case in cases:
            line = run_case(case, args, index % 2 == 0)
            rounds[case.name].append(line)
            ours, peer = line["ours"][case.key], line["peer"][case.key]
            print(f"round {index + 1}  {case.name:21} ours {show(case, ours):>11}  peer {show(case, peer):>11}  "
                  f"ratio {ours / peer:.3f}", flush=True)
    file = args.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for case in cases:
        results[case.name] = {**summary(case, rounds[case.name]), "date": today, "machine": where}
    results = {case.name: results[case.name] for case in CASES + CUDA_CASES if case.name in results}
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (args.out / "RESULTS.md").write_text("# The crate against PyTorch\n\nWritten by `make bench-peer`.\n\n" + text)
    print("\n" + text, end="")


if __name__ == "__main__":
    main()
