"""What run.py keeps of the rounds of a case, and results.json as Markdown."""
import statistics

from cases import CASES, CUDA_CASES, SERVED

ABOUT = """# The crate against PyTorch

Written by `make bench-peer`. `eager` is PyTorch as it is, `compiled` the same under `torch.compile` in its default mode,
without the time of compiling. A ratio is the crate's value divided by the peer's. The target is held against the better
of the two, or against eager where it alone was measured; the ratio of each round is that to the same peer. An empty cell
was not measured, and a line below the table says where a peer could not be compiled.

"""
KEPT = ("peak_rss_mb", "grown_rss_mb", "times_bound", "bound_s", "file_mb", "images_per_s")


def median_of(rounds, side, key):
    return statistics.median(line[side][key] for line in rounds)


def summary(case, rounds, not_compiled):
    """What is kept of a case: medians, ratios, the ratio of each round to the better peer, memory, what one side prints.

    `not_compiled` is the reason why there is no compiled peer, or None.
    """
    sides = [side for side in rounds[0] if all(side in line for line in rounds)]
    entry = {"what": case.what, "target": case.target, **{side: median_of(rounds, side, case.key) for side in sides}}
    best = min(sides[1:], key=entry.get)
    entry["ratio"] = entry["ours"] / entry["peer"]
    if "compiled" in sides:
        entry["ratio_compiled"] = entry["ours"] / entry["compiled"]
    if not_compiled:
        entry["not_compiled"] = not_compiled
    entry["best"], entry["ratio_best"] = best, entry["ours"] / entry[best]
    entry["round_ratios"] = [line["ours"][case.key] / line[best][case.key] for line in rounds]
    for side in sides:
        for key in KEPT:
            if all(line[side].get(key) is not None for line in rounds):
                entry[f"{side}_{key}"] = median_of(rounds, side, key)
    return entry


def show(case, value):
    if value is None:
        return ""
    return f"{1e3 * value:.1f} ms" if case.key == "median_s" else f"{value:.1f} MB"


def show_ratio(ratio):
    return "" if ratio is None else f"{ratio:.3f}"


def notes(entry):
    """Memory and bounds, where a case has them."""
    parts = []
    if "ours_times_bound" in entry:
        parts.append(f"{entry['ours_times_bound']:.1f} times the bound ({1e3 * entry['ours_bound_s']:.1f} ms)")
    if "ours_grown_rss_mb" in entry:
        parts.append("memory {ours_grown_rss_mb:.0f} against {peer_grown_rss_mb:.0f} MB, file {ours_file_mb:.0f} MB"
                     .format(**entry))
    elif "ours_images_per_s" in entry and entry["what"].startswith("JPEG"):
        parts.append("{ours_images_per_s:.0f} against {peer_images_per_s:.0f} images/s".format(**entry))
    else:
        parts.append("peak {ours_peak_rss_mb:.0f} against {peer_peak_rss_mb:.0f} MB".format(**entry))
    return ", ".join(parts)


def main_table(results):
    """A row for each case, then the reasons why a peer is not compiled."""
    lines = ["| case | | ours | eager | compiled | to eager | to compiled | to the better | at most | each round | |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for case in CASES + CUDA_CASES:
        entry = results.get(case.name)
        if entry is None:
            continue
        target = "" if entry["target"] is None else f"{entry['target']:.2f}"
        times = " | ".join(show(case, entry.get(side)) for side in ("ours", "peer", "compiled"))
        ratios = f"{show_ratio(entry['ratio'])} | {show_ratio(entry.get('ratio_compiled'))}"
        each = " ".join(show_ratio(ratio) for ratio in entry["round_ratios"])
        lines.append(f"| {case.name} | {entry['what']} | {times} | {ratios} "
                     f"| **{show_ratio(entry.get('ratio_best', entry['ratio']))}** | {target} | {each} | {notes(entry)} |")
    reasons = [f"- {name} has no compiled peer: {entry['not_compiled']}"
               for name, entry in results.items() if "not_compiled" in entry]
    return lines + [""] + (reasons + [""] if reasons else [])


def served(entry):
    """The better peer's images per second, and which peer it is."""
    if entry is None:
        return ""
    best = entry.get("best", "peer")
    return f"{entry[f'{best}_images_per_s']:.2f} ({'eager' if best == 'peer' else best})"


def serve_table(results):
    """Images per second for each batch that somebody who serves a model asks for."""
    rows = [(batch, results[adapted], results.get(plain)) for batch, adapted, plain in SERVED if adapted in results]
    if not rows:
        return []
    lines = ["## serve", "",
             "Images per second of the adapted ViT-B/16, against the better of the eager and the compiled peer.", "",
             "| batch | ours | adapted peer | ratio of the rates | unadapted timm ViT |", "|---|---|---|---|---|"]
    for batch, entry, plain in rows:
        faster = 1 / entry.get("ratio_best", entry["ratio"])
        ours = f"{entry['ours_images_per_s']:.2f}"
        lines.append(f"| {batch} | {ours} | {served(entry)} | **{faster:.2f}** | {served(plain)} |")
    return lines + [""]


def header_of(entry):
    return ("{date}, {cpu}, {cores} cores, {threads} threads, libtorch {libtorch} against PyTorch {peer_torch}, "
            "load average {load_average} at the start").format(date=entry["date"], **entry["machine"])


def markdown(results):
    """results.json as the text of RESULTS.md."""
    lines = main_table(results) + serve_table(results) + ["## When and where", ""]
    for header in dict.fromkeys(header_of(entry) for entry in results.values()):
        names = [name for name, entry in results.items() if header_of(entry) == header]
        lines.append(f"- {', '.join(names)}: {header}")
    return ABOUT + "\n".join(lines) + "\n"
