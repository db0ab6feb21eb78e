"""Draws a run's curves: loss per language over updates, validation, the unigram level, learning rate.

python -m xlm_ds.report checkpoints/mlm --output curves.png
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xlm_ds.config import ReportConfig
from xlm_ds.flags import parse
from xlm_ds.log import EXIT_OK, InputError, logger, run_stage


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. A run that was resumed wrote some updates twice: the later line counts."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{path}: not found; give the --save-dir of a run")
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            latest[record["kind"], record["update"]] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            # A loss of power leaves half a line; the figures before and after it are good.
            logger.info(f"{path}, line {number}: left out, not a line of metrics: {error}")
    return [latest[key] for key in sorted(latest)]


def draw_curves(records: Sequence[dict[str, Any]], output: Path) -> None:
    """A PNG of bits per masked token, or of finetune per example (dots: validation), and the learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    training = [r for r in records if r["kind"] == "train"]
    validation = [r for r in records if r["kind"] == "valid"]
    languages = sorted({name for r in training + validation for name in r["loss_per_language"]})
    for index, language in enumerate(languages):
        for rows, style, label in ((training, "-", language), (validation, "o", None)):
            points = [
                (r["update"], r["loss_per_language"][language])
                for r in rows
                if language in r["loss_per_language"]
            ]
            if points:
                losses.plot(*zip(*points, strict=True), style, color=f"C{index}", label=label)
    if levels := unigram_levels(training):
        losses.plot(*zip(*levels, strict=True), ":", color="gray", label="unigram")
    unit = "example" if any("accuracy" in r for r in validation) else "masked token"
    losses.set_ylabel(f"bits per {unit}\n(dots: validation)")
    losses.grid(visible=True, alpha=0.3)
    losses.legend(ncols=max(len(languages) // 2, 1))
    rates.plot([r["update"] for r in training], [r["lr"] for r in training], color="black")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("update")
    rates.grid(visible=True, alpha=0.3)
    figure.savefig(output, dpi=120)


def unigram_levels(records: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Update and bits per token, of the records that have them."""
    return [
        (r["update"], r["loss_at_mask"] - math.log2(1 - r["below_unigram"] / 100))
        for r in records
        if "loss_at_mask" in r
    ]


def main(argv: Sequence[str]) -> int:
    config = parse(ReportConfig, argv, description=__doc__)
    output = config.output or config.run / "curves.png"
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--output {output}: expected a name that ends in .png, .pdf or .svg")
    draw_curves(read_metrics(config.run), output)
    logger.info(f"drew {output}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_stage("report", main))
