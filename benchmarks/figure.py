"""The ratios of the three benchmarks as one picture, from what they wrote; and its caption, for benchmarks/README.md.

python benchmarks/figure.py [--results benchmarks/results] [--output docs/images/ratios.svg]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import harness
import matplotlib.pyplot as plt

TITLES = {
    "binarize": "binarize: split text to ids",
    "bpe": "BPE: tokenised text to ids",
    "loader": "load: masked batches",
}
# In between, so that GitHub's light and dark backgrounds both show it: contrast 4.5 and 4.3.
TEXT, BAR = "#6e7781", "#2f81f7"
ROW_INCHES = 0.26


def load_results(folder: Path) -> dict[str, Any]:
    """By name; what was not run is missing."""
    paths = {name: folder / f"{name}.json" for name in TITLES}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }


def peers(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of others who do the work, the slowest first."""
    rows = [
        row
        for row in result["contenders"]
        if not row["name"].startswith("xlm_ds")
        and row["name"] not in (harness.LINE_COUNT, harness.SCAN)
    ]
    return sorted(rows, key=lambda row: -row["ratio"]["median"])


def draw(results: dict[str, Any], output: Path) -> None:
    groups = {name: peers(result) for name, result in results.items()}
    sizes = [len(rows) for rows in groups.values()]
    plt.rcParams |= {"svg.fonttype": "none", "font.size": 9, "text.color": TEXT}
    figure, axes = plt.subplots(
        len(groups),
        1,
        sharex=True,
        squeeze=False,
        figsize=(8, ROW_INCHES * (sum(sizes) + 2.5 * len(sizes))),
        gridspec_kw={"height_ratios": sizes},
        layout="constrained",
    )
    for axis, (name, rows) in zip(axes[:, 0], groups.items(), strict=True):
        draw_group(axis, TITLES[name], rows)
    axes[-1, 0].set_xlabel("times as fast as, per CPU-second (line: least to most of the rounds)")
    axes[-1, 0].xaxis.label.set_color(TEXT)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Neither the date nor random ids: an equal picture is an equal file.
    plt.rcParams["svg.hashsalt"] = "xlm_ds"
    figure.savefig(output, transparent=True, metadata={"Date": None})


def draw_group(axis: Any, title: str, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    medians = [row["ratio"]["median"] for row in rows]
    axis.barh(places, [median - 1 for median in medians], left=1, color=BAR, height=0.6)
    axis.hlines(
        places,
        [row["ratio"]["min"] for row in rows],
        [row["ratio"]["max"] for row in rows],
        color=TEXT,
    )
    for place, row in zip(places, rows, strict=True):
        axis.text(
            max(row["ratio"]["max"], 1) * 1.08,
            place,
            f"{row['ratio']['median']:.3g} x",
            va="center",
        )
    axis.set_yticks(places, [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.minorticks_off()
    axis.set_title(title, loc="left", fontsize=9, color=TEXT, weight="bold")
    axis.axvline(1, color=TEXT, linewidth=0.8)
    axis.tick_params(colors=TEXT)
    axis.tick_params(axis="y", length=0)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(TEXT)
    axis.margins(x=0.12)


def caption(results: dict[str, Any]) -> str:
    """One line: machine, date and versions of the runs, several where they differ."""
    facts: dict[str, None] = {}
    for result in results.values():
        machine = result["machine"]
        facts[f"{machine['processor']}, {machine['cores']} cores, {machine['date']}"] = None
        facts[f"Python {machine['python']}"] = None
    for result in results.values():
        facts |= {f"{name} {version}": None for name, version in result["versions"].items()}
    return ", ".join(facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    output = harness.ROOT / "docs" / "images" / "ratios.svg"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    results = load_results(arguments.results)
    if not results:
        parser.error(f"{arguments.results}: no results; run the benchmarks first")
    draw(results, arguments.output)
    print(caption(results))


if __name__ == "__main__":
    main()
