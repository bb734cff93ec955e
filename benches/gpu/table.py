"""The rows as results.json and as one table in Markdown."""
import json

HEAD = """# GPU check

{date}, {device}, {cores} cores, torch {torch}, the kit built against libtorch {libtorch} at commit {commit}; the peer is
{peer}.{quick}

A ratio is the time of ours divided by the peer's. `f32` has TF32 off (NVIDIA_TF32_OVERRIDE=0), `tf32` has it on for both
sides (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1), `bf16` is autocast. Memory is the greatest growth of the GPU's memory in use
(on a CPU the peak of the resident memory).

| part | case | ours | eager | compiled | to eager | to compiled | memory: ours, eager, compiled | status | |
|---|---|---|---|---|---|---|---|---|---|
"""


def shown(row, side):
    value = row.get(side)
    if value is None:
        return ""
    return f"{1e3 * value:.2f} ms" if row["unit"] == "median_s" else f"{value:g}"


def ratio(row, side):
    return f"{row['ours'] / row[side]:.3f}" if row.get("ours") and row.get(side) else ""


def memory(row):
    values = [row.get(f"{side}_memory_mb") for side in ("ours", "eager", "compiled")]
    return ", ".join("?" if value is None else f"{value:.0f}" for value in values) + " MB" if any(values) else ""


def line(row):
    cells = [row["part"], row["case"], *(shown(row, side) for side in ("ours", "eager", "compiled")),
             ratio(row, "eager"), ratio(row, "compiled"), memory(row), row["status"], row.get("note", "")]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"


def write(kit, rows):
    quick = " With --quick: the figures mean nothing." if kit.machine["quick"] else ""
    text = HEAD.format(**{**kit.machine, "quick": quick}) + "".join(map(line, rows))
    (kit.args.out / "table.md").write_text(text)
    (kit.args.out / "results.json").write_text(json.dumps({"machine": kit.machine, "rows": rows}, indent=1) + "\n")
