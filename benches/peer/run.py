"""Runs the crate and its peers in turn, case by case, and writes the ratios: what `make bench-peer` calls.

    python run.py --peer PYTHON --bin target/release/examples --inputs FOLDER [--rounds 3] [--cases train-8,eval-8]

Needs nothing but Python; PYTHON is the peer's, with the packages of requirements.txt. A round runs each case once on
every side: the crate, eager PyTorch and, for a model, PyTorch under torch.compile, which needs a C++ compiler. The
sides change places from round to round, and each runs in a process of its own. results.json and RESULTS.md beside this
file get the cases that were run; those that were not keep what they had, with their own date.
"""
import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from cases import CASES, CUDA_CASES
from report import markdown, show, summary

HERE = Path(__file__).resolve().parent
THREADS = "2"


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
    # A peer that cannot be compiled has no such value.
    return sorted(lines, key=lambda line: line.get(case.key, 0))[case.repeats // 2]


def commands_of(case, args):
    """The whole command of each side."""
    commands = {}
    for side, (program, *options) in case.sides().items():
        start = [str(args.bin / program)] if side == "ours" else [args.peer, str(HERE / program)]
        commands[side] = [*start, *(option.format(inputs=args.inputs) for option in options), "--threads", THREADS]
    return commands


def run_case(case, args, index, not_compiled):
    """Round `index` of a case, by side. Adds the case to `not_compiled`, with the reason, if its peer cannot be compiled."""
    commands = commands_of(case, args)
    if case.name in not_compiled:
        del commands["compiled"]
    turn = index % len(commands)
    order = [*commands][turn:] + [*commands][:turn]
    found = {side: run_side(commands[side], case) for side in order}
    lines = {side: found[side] for side in commands}
    if "not_compiled" in lines.get("compiled", {}):
        not_compiled[case.name] = lines.pop("compiled")["not_compiled"]
        print(f"{case.name}: no compiled peer: {not_compiled[case.name]}", flush=True)
    return lines


def print_round(index, case, lines):
    ours = lines["ours"][case.key]
    peers = {"eager" if side == "peer" else side: line[case.key] for side, line in lines.items() if side != "ours"}
    shown = "  ".join(f"{name} {show(case, value):>11} ({ours / value:.3f})" for name, value in peers.items())
    print(f"round {index + 1}  {case.name:21} ours {show(case, ours):>11}  {shown}", flush=True)


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


def write(args, entries):
    """Puts the entries among those of earlier runs, and writes both files."""
    file = args.out / "results.json"
    results = {**(json.loads(file.read_text()) if file.exists() else {}), **entries}
    results = {case.name: results[case.name] for case in CASES + CUDA_CASES if case.name in results}
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "RESULTS.md").write_text(markdown(results))
    print("\n" + markdown(results), end="")


def main():
    args, cases = parse_args()
    where, today = machine(args), datetime.date.today().isoformat()
    if any("inputs" in argument for case in cases for argument in case.ours):
        subprocess.run([args.peer, str(HERE / "make_inputs.py"), str(args.inputs)], check=True)
        # Into the page cache.
        for file in args.inputs.rglob("*.*"):
            file.read_bytes()
    rounds, not_compiled = {case.name: [] for case in cases}, {}
    for index in range(args.rounds):
        for case in cases:
            lines = run_case(case, args, index, not_compiled)
            rounds[case.name].append(lines)
            print_round(index, case, lines)
    entries = {case.name: summary(case, rounds[case.name], not_compiled.get(case.name)) for case in cases}
    write(args, {name: {**entry, "date": today, "machine": where} for name, entry in entries.items()})


if __name__ == "__main__":
    main()
