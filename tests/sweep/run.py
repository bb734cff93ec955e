"""Opens every checkpoint of the sweep with the crate and compares its features with those of the library that wrote it.

    python run.py --opener target/release/examples/open_features --report FILE.md [--only PATTERN] [--jobs 1]

A result is `right` (the largest difference is at most 2e-5 of the largest feature), `refused` (an error that says
why), or `wrong`: other features, or no answer. FILE.json beside the report has every result. Each case is written
into a temporary folder, opened and deleted. The exit status is 1 if anything is wrong.
"""
import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

from case import Options
from make_files import cases, make

TOLERANCE = 2e-5
STATES = ("right", "refused", "wrong", "not made")


def check(name, opener, options):
    """The results of one case, one a variant."""
    [case] = [case for case in CASES if case.name == name]
    with tempfile.TemporaryDirectory(prefix="sweep") as folder:
        folder = Path(folder)
        result = {"case": case.name, "family": case.family}
        try:
            made = make(case, folder, options)
        except Exception as error:
            traceback.print_exc()
            return [{**result, "variant": "", "state": "not made", "reason": f"{type(error).__name__}: {error}"}]
        outputs = load_file(folder / "x.safetensors")
        results = [{**result, "variant": variant, **compare(opener, folder, source, outputs, made.right),
                    "facts": made.facts} for variant, source in made.sources.items()]
        return [{**result, "differs": differences(result)} for result in results]


def compare(opener, folder, source, outputs, right):
    run = subprocess.run([opener, folder / source, folder / "x.safetensors"], capture_output=True, text=True)
    try:
        ours = json.loads(run.stdout)
    except ValueError:
        return {"state": "wrong", "reason": f"no answer, status {run.returncode}: {run.stderr[-500:]}"}
    if not ours["ok"]:
        return {"state": "refused", "reason": ours["error"].replace(f"{folder}/", ""), "stage": ours["stage"]}
    if any(feature is None for feature in ours["features"]):
        return {"state": "wrong", "reason": "features that are no numbers", "ours": ours["choices"]}
    features = torch.tensor(ours["features"])
    errors = {name: float((features - y.flatten()).abs().max() / y.abs().max())
              for name, y in outputs.items() if name != "x" and y.numel() == features.numel()}
    of_right = {name: errors[name] for name in right if name in errors}
    best = min(of_right, key=of_right.get, default=None)
    found = {"ours": ours["choices"], "errors": errors, "output": best}
    if best is not None and of_right[best] <= TOLERANCE:
        return {"state": "right", **found}
    reason = f"{of_right[best]:.1e} from {best}" if best else f"{features.numel()} features, not those of {right[0]}"
    others = [name for name, error in errors.items() if error <= TOLERANCE]
    return {"state": "wrong", "reason": reason + (f", but it is {others[0]}" if others else ""), **found}


def activation(text):
    """One name for an activation that the crate or a library spells in its own way, if there is one in the text."""
    known = {"quick": "QuickGELU", "tanh": "tanh GELU", "newgelu": "tanh GELU", "swi": "SwiGLU", "silu": "SwiGLU",
             "relu": "ReLU", "gelu": "GELU"}
    return next((name for mark, name in known.items() if mark in text.lower()), None)


def differences(result):
    """Which of the things that a file may not tell the crate took otherwise than the library, for a wrong result."""
    ours, facts = result.get("ours", ""), result["facts"]
    if result["state"] != "wrong" or not ours:
        return []
    taken = {key: re.search(rf"{key}=(\S+)", ours) for key in ("heads", "eps")}
    found = []
    if taken["heads"] and int(taken["heads"][1]) != facts.get("heads"):
        found.append("heads")
    if taken["eps"] and float(taken["eps"][1]) not in facts.get("eps", [float(taken["eps"][1])]):
        found.append("eps")
    theirs = activation(facts.get("activation", ""))
    if activation(ours.split(maxsplit=1)[-1]) and theirs and activation(ours) != theirs:
        found.append("activation")
    pools = {"token": "class", "avg": "average"}
    pool = facts.get("pool") or facts.get("tower", {}).get("pool_type")
    if pool and result["output"] and pools.get(pool, pool) not in ours.lower():
        found.append("pooling")
    return found or ["other outputs, or another structure"]


def report(results):
    """Counts a family and variant, then every result that is not right."""
    counts = {key: collections.defaultdict(collections.Counter) for key in ("library", "family")}
    for result in results:
        result["library"] = result["case"].split("/")[0]
        for key, count in counts.items():
            count[result[key], result["variant"]][result["state"]] += 1
    lines = []
    for key in counts:
        lines += [f"| {key} | variant | " + " | ".join(STATES) + " |", "|---|---|" + "---:|" * len(STATES)]
        for (name, variant), count in counts[key].items():
            lines.append(f"| {name} | {variant} | " + " | ".join(str(count[state]) for state in STATES) + " |")
        lines.append("")
    for state in ("wrong", "not made", "refused"):
        listed = [result for result in results if result["state"] == state]
        if not listed:
            continue
        lines += [f"## {state.capitalize()}", "",
                  "| case | variant | reason | differs in | taken by the crate | in the library |",
                  "|---|---|---|---|---|---|"]
        for result in listed:
            reason = " ".join(result["reason"].split()).replace("|", "\\|")
            facts = ", ".join(f"{key} {value}" for key, value in result.get("facts", {}).items())
            differs = ", ".join(result.get("differs", []))
            lines.append(f"| {result['case']} | {result['variant']} | {reason} | {differs} "
                         f"| {result.get('ours', '')} | {facts} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def save(results, file):
    file.write_text("# The sweep\n\nWritten by `tests/sweep/run.py`.\n\n" + report(results))
    file.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


def start(only, threads):
    """In each worker."""
    global CASES
    CASES = cases(only)
    torch.set_num_threads(threads)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--opener", required=True, help="the built example open_features")
    parser.add_argument("--report", type=Path, required=True, help="a Markdown file; the results go to .json beside it")
    parser.add_argument("--only", default="", help="a regular expression that is searched in the names")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="true depth below 100 M parameters")
    args = parser.parse_args()
    names = [case.name for case in cases(args.only)]
    options, opener = Options(args.depth, args.full), os.path.abspath(args.opener)
    threads, began, results = max(1, (os.cpu_count() or 1) // args.jobs), time.time(), {}
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), start,
                                                (args.only, threads)) as pool:
        waiting = {pool.submit(check, name, opener, options): name for name in names}
        for done in concurrent.futures.as_completed(waiting):
            results[waiting[done]] = done.result()
            for result in done.result():
                reason = result.get("reason", "")[:150]
                print(f"{time.time() - began:6.0f} s  {len(results)}/{len(names)}  {result['state']:8} "
                      f"{result['case']} {result['variant']}  {reason}", flush=True)
            if len(results) % 20 == 0 or len(results) == len(names):
                in_order = [result for name in names for result in results.get(name, [])]
                save(in_order, args.report)
    sys.exit(any(result["state"] == "wrong" for case in results.values() for result in case))


if __name__ == "__main__":
    main()
