"""Kernels of a step: the peer's by torch.profiler, ours by nsys where it is installed, as rows."""
import csv
import io
import shutil
import subprocess

from kit import PRECISIONS, last_line

BATCH = 8
REFERENCE = "root/tests/integration/accelerator/launches.md has the operators of ours for each method"


def rows(kit):
    for mode in ("train", "eval"):
        flag, extra = PRECISIONS["f32"]
        batch = 1 if kit.args.quick else BATCH
        options = ["--mode", mode, "--batch", str(batch), "--device", kit.args.device]
        row, notes = {"case": f"{mode}, f32, batch {batch}", "status": "ok", "unit": "launches"}, []
        line = kit.line([kit.args.python, str(kit.folder / "profiled.py"), *options], extra)
        if "reason" in line:
            row["status"] = "failed"
            notes.append(f"eager: {line['reason']}")
        else:
            row["eager"] = line["launches"]
            notes.append(f"eager: {line['what']}")
        ours = counted(kit, [*options, "--precision", flag], extra)
        if "reason" in ours:
            notes.append(f"ours: {ours['reason']}; {REFERENCE}")
            row["status"] = "failed" if ours["failed"] else row["status"]
        else:
            row["ours"] = ours["launches"]
        yield {**row, "note": "; ".join(notes)}


def counted(kit, options, extra):
    """Our kernels of one step: those of a run of 10 steps without those of one of 5, a fifth of them."""
    if kit.args.device == "cpu":
        return {"reason": "a CPU launches no kernels", "failed": False}
    if shutil.which("nsys") is None:
        return {"reason": "nsys is not installed", "failed": False}
    try:
        few, many = (kernels(kit, [*options, "--rounds", str(rounds)], extra) for rounds in (5, 10))
        return {"launches": (many - few) / 5}
    except (OSError, RuntimeError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        return {"reason": f"nsys: {error!r}"[:300], "failed": True}


def kernels(kit, options, extra):
    report = kit.args.out / "launches.nsys-rep"

    def run(command):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=kit.environment(extra))
        if done.returncode != 0:
            raise RuntimeError(last_line(done.stderr or done.stdout))
        return done.stdout

    run(["nsys", "profile", "--trace=cuda", "--force-overwrite=true", f"--output={report}",
         *kit.command("ours", "throughput", options)])
    text = run(["nsys", "stats", "--report", "cuda_gpu_kern_sum", "--format", "csv", "--force-export=true", str(report)])
    # Other lines come before the header.
    table = text[text.index("Time (%)"):]
    return sum(int(line["Instances"]) for line in csv.DictReader(io.StringIO(table)) if line.get("Instances"))
