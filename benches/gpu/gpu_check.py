"""The GPU kit's one command: the suite, the ratios against PyTorch, launches, memory and the data path as one table.

    python gpu_check.py [--device cuda|cpu] [--quick] [--out FOLDER] [--only suite,ratios,captured,launches,data]

PYTHON has torch of the minor version that the kit was built against (`libtorch-version`); nothing else is needed. Where
timm is absent the peer is the plain ViT of `stand_in`. What cannot be run is a row of the table with its reason, and
the exit status is 1 if a row failed. `--device cpu --quick` runs every part with tiny settings, to check the kit itself.
"""
import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peer"))

import launches  # noqa: E402
import ratios  # noqa: E402
import suite  # noqa: E402
from kit import Kit, Refused  # noqa: E402
from table import write  # noqa: E402

PARTS = {"suite": suite.rows, "ratios": ratios.rows, "captured": ratios.captured_rows, "launches": launches.rows,
         "data": ratios.data_rows}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny settings, which check the kit and measure nothing")
    parser.add_argument("--python", default=sys.executable, help="the Python that has torch [default: this one]")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of table.md, results.json and logs")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side of a ratio")
    parser.add_argument("--only", default=",".join(PARTS), help="parts with commas between")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(PARTS)
    if unknown or args.rounds < 1:
        parser.error(f"--only: no part {', '.join(unknown)}" if unknown else "--rounds: at least 1")
    return args


def main():
    args = parse_args()
    args.out = args.out.resolve()
    try:
        kit = Kit(HERE, args)
    except Refused as refused:
        sys.exit(f"gpu-check: {refused}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for part in args.only.split(","):
        for row in PARTS[part](kit):
            rows.append({"part": part, **row})
            print(f"{part}: {row['case']}: {row['status']} {row.get('note', '')}", flush=True)
            # After every row, so that a run that is cut off leaves what it has.
            write(kit, rows)
    print("\n" + (args.out / "table.md").read_text())
    sys.exit(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    main()
