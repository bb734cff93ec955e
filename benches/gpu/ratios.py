"""Steps of ours and of the eager and the compiled peer in turn, and the data path, as rows."""
import statistics

from cases import step
from kit import PRECISIONS

SIDES = {"ours": "ours", "peer": "eager", "compiled": "compiled"}


def rows(kit):
    quick = kit.args.quick
    for precision in PRECISIONS:
        for mode in ("train", "eval"):
            for batch in [1] if quick else [8, 64, 256]:
                case = f"{mode}, {precision}, batch {batch}"
                if precision == "tf32" and kit.args.device == "cpu":
                    yield {"case": case, "status": "left out", "note": "a CPU has no TF32"}
                else:
                    # With --quick one model is compiled: on a CPU that takes a minute.
                    compiled = not quick or (precision, mode) == ("f32", "train")
                    yield ratio(kit, case, precision, mode, batch, compiled)


def captured_rows(kit):
    """Steps of `fit` without draws, launched one operator at a time and replayed from a CUDA graph."""
    for precision in PRECISIONS:
        for batch in [1] if kit.args.quick else [8, 64]:
            for name, graph in (("fit", []), ("fit, captured", ["--cuda-graph"])):
                case = f"{name}, {precision}, batch {batch}"
                if kit.args.device == "cpu" and (graph or precision == "tf32"):
                    yield {"case": case, "status": "left out", "note": "a CPU has no TF32 and no CUDA graphs"}
                    continue
                flag, extra = PRECISIONS[precision]
                options = ["--mode", "fit", "--batch", str(batch), "--rounds", "1" if kit.args.quick else "20",
                           "--device", kit.args.device, "--precision", flag, *graph]
                yield in_turn(kit, case, {"ours": kit.command("ours", "throughput", options)}, extra, "median_s", [])


def ratio(kit, name, precision, mode, batch, compiled):
    flag, extra = PRECISIONS[precision]
    rounds = 1 if kit.args.quick else max(5, 160 // batch)
    case = step(name, name, batch, rounds, mode=mode, extra=["--device", kit.args.device, "--precision", flag])
    commands = {side: kit.command(side, program, options) for side, (program, *options) in case.sides().items()}
    notes = []
    if not compiled:
        del commands["compiled"]
        notes.append("compiled: left out by --quick")
    return in_turn(kit, name, commands, extra, "median_s", notes)


def in_turn(kit, name, commands, extra, key, notes):
    """The medians over the rounds; the sides change places from round to round."""
    lines, reasons = {side: [] for side in commands}, {}
    for index in range(1 if kit.args.quick else kit.args.rounds):
        turn = index % len(commands)
        for side in ([*commands] * 2)[turn:turn + len(commands)]:
            if side not in reasons:
                line = kit.line(commands[side], extra)
                if "reason" in line:
                    reasons[side] = line["reason"]
                else:
                    lines[side].append(line)
    row = {"case": name, "status": "failed" if reasons else "ok"}
    for side, reason in reasons.items():
        notes.append(f"{SIDES[side]}: {reason}")
    for side, found in lines.items():
        if found and side not in reasons:
            row[SIDES[side]] = statistics.median(line[key] for line in found)
            row[f"{SIDES[side]}_rounds"] = [line[key] for line in found]
            memory = [line["memory_mb"] for line in found if line.get("memory_mb") is not None]
            if memory:
                row[f"{SIDES[side]}_memory_mb"] = max(memory)
    return {**row, "unit": key, "note": "; ".join(notes)}


MAKE = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from make_inputs import write_photos; " \
       "write_photos(Path(sys.argv[2]), int(sys.argv[3])); print('{}')"


def data_rows(kit):
    """JPEG files to batches on the CPU: ours, and torchvision's loader, which needs timm's packages too."""
    photos, count = kit.args.out / "photos", 16 if kit.args.quick else 512
    made = kit.line([kit.args.python, "-c", MAKE, str(kit.folder / "peer"), str(photos), str(count)])
    name = f"{count} JPEG files to batches"
    if "reason" in made:
        yield {"case": name, "status": "left out", "note": f"the files cannot be made: {made['reason']}"}
        return
    threads = min(kit.machine["cores"], 16)
    options = ["--rounds", "1" if kit.args.quick else "3", "--threads", str(threads)]
    commands = {"ours": kit.command("ours", "parts", ["data", str(photos), *options]),
                "peer": kit.command("peer", "data.py", [str(photos), *options])}
    row = in_turn(kit, name, commands, {}, "median_s", [f"{threads} threads"])
    # It runs on the CPU, whatever the device.
    yield {name: value for name, value in row.items() if not name.endswith("memory_mb")}
