"""A run as one page, or several compared: loss, speed, data, tests and what has happened, from the runs' own files.

python -m xlm_ds.report checkpoints/mlm                    # checkpoints/mlm/report.html, which needs no network
python -m xlm_ds.report run1 run2 --output both.html       # also where their configurations differ
python -m xlm_ds.report run --watch                        # written again while the run goes on
python -m xlm_ds.report run --output curves.png            # the loss alone
"""

import dataclasses
import io
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xlm_ds import __version__
from xlm_ds.config import ReportConfig
from xlm_ds.files import load_json_object, replacing
from xlm_ds.flags import parse
from xlm_ds.log import EXIT_OK, InputError, logger, run_stage
from xlm_ds.order import mixed_weights
from xlm_ds.run_folder import Record, RunFolder, read_run
from xlm_ds.steps import Steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = (".png", ".pdf", ".svg")
WATCH_SECONDS = 30.0
COLOURS = (
    *("#3b82c4", "#e07b39", "#3a9d5d", "#d1495b", "#8d6cc3"),
    *("#a9743a", "#d66fae", "#2fa8b5", "#b5a642", "#6b8e23"),
)
OTHERS = "#8a8f98"  # the colour of more streams than there are colours
_INK = "#012345"  # stands for the page's own text colour, light or dark

Point = tuple[float, float]


class Line(NamedTuple):
    label: str
    points: Sequence[Point]
    colour: str
    style: str = "-"


class Chart(NamedTuple):
    title: str
    svg: str


class Table(NamedTuple):
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """A heading of the page."""

    title: str
    state: str
    charts: Sequence[Chart]
    tables: Sequence[Table]
    events: Sequence[Any] = ()


# ------------------------------------------------------------------------------------------- page


def page(runs: Sequence[RunFolder], *, refresh: float | None = None) -> str:
    """The HTML; `refresh`: seconds after which a browser loads it again."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xlm_ds", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    parts = [comparison(runs)] if len(runs) > 1 else []
    parts += [part_of(run) for run in runs]
    names = " and ".join(run.name for run in runs)
    return environment.get_template("report.html").render(
        title=names,
        parts=parts,
        refresh=refresh,
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def comparison(runs: Sequence[RunFolder]) -> Part:
    """Of several runs: their validation in one picture, and where their configurations differ."""
    colours = colours_of([str(number) for number in range(len(runs))])
    by_update, by_hour = (
        [
            Line(
                run.name,
                [(x(run, r), r["loss"]) for r in run.of("valid")],
                colours[str(number)],
                "o-",
            )
            for number, run in enumerate(runs)
        ]
        for x in (_update, _hour)
    )
    charts = [
        *drawn("Validation loss over updates", by_update, "bits", "update"),
        *drawn("Validation loss over hours", by_hour, "bits", "hours of computing"),
    ]
    keys = sorted({key for run in runs for key in run.configuration})
    values = {key: [run.configuration.get(key, "not given") for run in runs] for key in keys}
    rows = [
        [key, *map(_shown, found)]
        for key, found in values.items()
        if any(v != found[0] for v in found)
    ]
    last = [run.of("valid")[-1:] for run in runs]
    figures = [
        ["update", *(str(r[0]["update"]) if r else "none" for r in last)],
        ["validation loss, bits", *(f"{r[0]['loss']:.3f}" if r else "none" for r in last)],
    ]
    heads = ["", *(run.name for run in runs)]
    tables = [
        Table("Last validation", heads, figures),
        Table("Different in their configurations", heads, rows, "" if rows else "nothing"),
    ]
    return Part("Comparison", "", charts, tables)


def part_of(run: RunFolder) -> Part:
    tables = [
        *validation_table(run),
        *test_tables(run),
        *retrieval_table(run),
        *data_table(run),
        *configuration_table(run),
    ]
    return Part(run.name, state_of(run), charts_of(run), tables, run.events)


def state_of(run: RunFolder) -> str:
    update = max((r["update"] for r in run.records), default=0)
    ended = f"{run.ended['what']}" if run.ended else "going on, or ended without a word"
    hours = run.hours_at(update)
    return f"update {update:,}, {hours:.2f} hours of computing; {ended}"


# ----------------------------------------------------------------------------------------- charts


def charts_of(run: RunFolder) -> list[Chart]:
    train = run.of("train")
    by_update, by_hour = loss_lines(run, _update), loss_lines(run, _hour)
    charts = [
        *drawn(f"{what_is_drawn(run)} over updates", by_update, "bits", "update", perplexity=True),
        *drawn("The same over hours", by_hour, "bits", "hours of computing", perplexity=True),
        *drawn(BELOW, per_name(run, "below_unigram_per_language"), "% of perplexity", "update"),
        *drawn("Accuracy in validation", per_name(run, "accuracy_per_language"), "%", "update"),
        *drawn("Retrieval, margin", per_name(run, "margin", kind="retrieve"), "%", "update"),
    ]
    for title, key, unit in (
        ("Learning rate", "lr", ""),
        ("Norm of the gradient", "gradient_norm", ""),
        ("Tokens per second", "tokens_per_second", ""),
    ):
        points = [(_update(run, r), r[key]) for r in train if key in r]
        charts += drawn(title, [Line("", points, COLOURS[0])], unit, "update")
    return charts + time_chart(run)


def _update(run: RunFolder, record: Record) -> float:  # noqa: ARG001
    return float(record["update"])


def _hour(run: RunFolder, record: Record) -> float:
    return run.hours_at(record["update"])


AT_MASK = "loss_at_mask_per_language"
BELOW = "Validation below the unigram level (at 0 no context is used)"


def loss_key(run: RunFolder) -> str:
    """Where `<mask>` is shown, as the unigram level is; of a fine-tuning, which has no masks, the loss."""
    return AT_MASK if any(AT_MASK in r for r in run.records) else "loss_per_language"


def what_is_drawn(run: RunFolder) -> str:
    if loss_key(run) == AT_MASK:
        return "Loss at <mask> (dots: validation, dotted: unigram level)"
    return "Loss (dots: validation)"


def loss_lines(run: RunFolder, x: Callable[[RunFolder, Record], float]) -> list[Line]:
    """Of each language training as a line, validation as dots, and dotted its own unigram level."""
    key = loss_key(run)
    lines: list[Line] = []
    for name, colour in colours_of(run.streams()).items():
        for kind, style in (("train", "-"), ("valid", "o")):
            points = [(x(run, r), r[key][name]) for r in run.of(kind) if name in r.get(key, ())]
            lines.append(Line(name if kind == "train" else "", points, colour, style))
        levels = [
            (x(run, r), level)
            for r in run.of("train")
            if (level := run.unigram_level(r, name)) is not None
        ]
        if levels and colour != OTHERS:
            lines.append(Line("", levels, colour, ":"))
    return lines


def per_name(run: RunFolder, key: str, kind: str = "valid") -> list[Line]:
    records = [r for r in run.of(kind) if key in r]
    colours = colours_of(list(dict.fromkeys(name for r in records for name in r[key])))
    return [
        Line(name, [(r["update"], r[key][name]) for r in records if name in r[key]], colour, "o-")
        for name, colour in colours.items()
    ]


def time_chart(run: RunFolder) -> list[Chart]:
    lines = [r for r in run.of("train") if sum(r.get("seconds", {}).values()) > 0]
    if not lines:
        return []
    kinds = list(lines[0]["seconds"])
    shares = [
        [100 * r["seconds"].get(kind, 0.0) / sum(r["seconds"].values()) for r in lines]
        for kind in kinds
    ]

    def draw(axes: "Axes") -> None:
        axes.stackplot([r["update"] for r in lines], shares, labels=kinds, colors=COLOURS)
        axes.set_ylim(0, 100)
        axes.legend(ncols=2, loc="lower left", framealpha=0.6)

    return [_chart("Where the time goes", draw, "% of wall time", "update")]


def drawn(
    title: str, lines: Sequence[Line], unit: str, x: str, *, perplexity: bool = False
) -> list[Chart]:
    """A chart of the lines that have points, or none."""
    there = [line for line in lines if line.points]
    if not there:
        return []

    def draw(axes: "Axes") -> None:
        for line in there:
            axes.plot(
                *zip(*line.points, strict=True),
                line.style,
                color=line.colour,
                label=line.label or None,
                linewidth=1.2,
                markersize=3,
            )
        named = [line.label for line in there if line.label]
        if named:
            axes.legend(
                ncols=2 if len(named) < 12 else 3,
                fontsize=7 if len(named) > 12 else 8,
                framealpha=0.6,
            )
        if perplexity:
            right = axes.secondary_yaxis("right", functions=(_perplexity, _bits))
            right.set_ylabel("perplexity", color=_INK)
            right.tick_params(colors=_INK)
            right.set_yticks(_round_perplexities(axes.get_ylim()))

    return [_chart(title, draw, unit, x)]


def _perplexity(bits: Any) -> Any:
    return np.exp2(bits)


def _bits(perplexity: Any) -> Any:
    return np.log2(np.maximum(perplexity, 1e-9))


def _round_perplexities(bits: tuple[float, float]) -> list[float]:
    """Six at most, and where the axis has room for three of some kind, no fewer."""
    found: list[float] = []
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), [n / 10 for n in range(10, 100)]):
        steps = [m * 10.0**e for e in range(7) for m in digits]
        found = [value for value in steps if bits[0] <= math.log2(value) <= bits[1]]
        if len(found) > 2:
            break
    return found[:: math.ceil(len(found) / 6) or 1]


def _chart(title: str, draw: Callable[["Axes"], None], unit: str, x: str) -> Chart:
    figure = _figure(4.8, 3.1)
    axes = figure.subplots()
    draw(axes)
    _label(axes, unit, x)
    with io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        svg = file.getvalue()
    return Chart(title, svg[svg.index("<svg") :].replace(_INK, "currentColor"))


def _figure(width: float, height: float) -> "Figure":
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text stays text, so that the page can be searched and a reader be read to.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "xlm_ds", "font.size": 9})
    return Figure(figsize=(width, height), layout="constrained")


def _label(axes: "Axes", unit: str, x: str) -> None:
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(unit, color=_INK)
    axes.tick_params(colors=_INK)
    axes.grid(visible=True, color=_INK, alpha=0.15)
    legend = axes.get_legend()
    for text in legend.get_texts() if legend else ():
        text.set_color(_INK)
    if legend:
        legend.get_frame().set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_color(_INK)
        spine.set_alpha(0.4)


def colours_of(names: Sequence[str]) -> dict[str, str]:
    return {
        name: COLOURS[number] if number < len(COLOURS) else OTHERS
        for number, name in enumerate(names)
    }


# ----------------------------------------------------------------------------------------- tables


def validation_table(run: RunFolder) -> list[Table]:
    records = run.of("valid")
    if not records:
        return []
    last = records[-1]
    rows = []
    for name in last["loss_per_language"]:
        values = [
            (r["loss_per_language"][name], r["update"])
            for r in records
            if name in r["loss_per_language"]
        ]
        best, update = min(values)
        bits = last["loss_per_language"][name]
        row = [name, f"{bits:.3f}", f"{2**bits:.1f}", f"{best:.3f}", f"{update:,}"]
        if "accuracy_per_language" in last:
            row.append(f"{last['accuracy_per_language'][name]:.1f}")
        if AT_MASK in last:
            at_mask, below = last[AT_MASK].get(name), last["below_unigram_per_language"].get(name)
            row += [f"{at_mask:.3f}", f"{below:.1f}"] if at_mask is not None else ["", ""]
        rows.append(row)
    head = ["", "bits", "perplexity", "best bits", "at update"]
    note = f"update {last['update']:,}; of all: {last['loss']:.3f} bits"
    if "accuracy_per_language" in last:
        head.append("accuracy %")
    if AT_MASK in last:
        head += ["bits at <mask>", "below unigram level, %"]
    if "below_unigram" in last:
        note += f", {last['below_unigram']:.1f} % of perplexity below the unigram level"
    return [Table("Validation", head, rows, note)]


def test_tables(run: RunFolder) -> list[Table]:
    """What evaluate and finetune have written of splits."""
    tables = []
    for name, content in run.tested.items():
        if "scores" in content:
            head = [
                "",
                "masked tokens",
                "bits",
                "perplexity",
                "accuracy %",
                "unigram level",
                "below %",
            ]
            rows = [
                [
                    s["language"], f"{s['masked_tokens']:,}", f"{s['loss']:.3f}", f"{s['perplexity']:.1f}",
                    f"{s['accuracy']:.2f}", f"{s['unigram_perplexity']:.1f}", f"{s['below_unigram']:.1f}",
                ]
                for s in content["scores"]
            ]  # fmt: skip
            tables.append(Table(f"Evaluation: {name}", head, rows))
        elif "languages" in content:
            rows = [
                [language, f"{found['examples']:,}", f"{found['accuracy']:.1f}"]
                for language, found in content["languages"].items()
            ]
            tables.append(Table(f"Classification: {name}", ["", "examples", "accuracy %"], rows))
    return tables


def retrieval_table(run: RunFolder) -> list[Table]:
    records = run.of("retrieve")
    if not records:
        return []
    last = records[-1]
    rows = [
        [direction, f"{last['cosine'][direction]:.1f}", f"{value:.1f}"]
        for direction, value in last["margin"].items()
    ]
    note = f"update {last['update']:,}; % of lines whose translation is the nearest"
    return [Table("Retrieval", ["", "cosine", "margin"], rows, note)]


def data_table(run: RunFolder) -> list[Table]:
    """Of each stream: size, unknown words, natural share beside that it is drawn with, and passes so far."""
    blocks: Mapping[str, int] = run.manifest.get("blocks") or {}
    configuration = run.configuration
    if not blocks or "sampling_alpha" not in configuration:
        return []
    samples = run.manifest["progress"]["samples"]
    shares = drawn_shares(blocks, configuration, samples)
    total = sum(blocks.values())
    rows = []
    for name, count in blocks.items():
        tokens, unknown = _tokens_of(Path(configuration["data"]), _pairs_of(name, configuration))
        rows.append([
            name, f"{count:,}", f"{tokens:,}" if tokens else "not known",
            f"{100 * unknown / tokens:.2f}" if tokens else "not known",
            f"{100 * count / total:.1f}", f"{100 * shares[name]:.1f}", f"{samples * shares[name] / count:.2f}",
        ])  # fmt: skip
    head = ["", "blocks or pairs", "tokens", "unknown %", "natural share %", "drawn %", "passes"]
    return [Table("Data", head, rows, f"after {samples:,} samples; shares are of blocks and pairs")]


def drawn_shares(
    blocks: Mapping[str, int], configuration: Mapping[str, Any], sample: int
) -> dict[str, float]:
    """The share of the samples around `sample` that each stream is drawn with."""
    alpha = configuration["sampling_alpha"]
    value = alpha if isinstance(alpha, int | float) else Steps.parse(alpha).at(sample)
    languages = [name for name in blocks if name in configuration["monolingual_langs"]]
    pairs = [name for name in blocks if name not in languages]
    weights = mixed_weights(
        [blocks[name] for name in languages],
        [blocks[name] for name in pairs],
        alpha=value,
        tlm_share=configuration["tlm_share"],
    )
    return {name: w / sum(weights) for name, w in zip([*languages, *pairs], weights, strict=True)}


def _pairs_of(stream: str, configuration: Mapping[str, Any]) -> list[str]:
    """The files of a stream: en, or ar-en.ar and ar-en.en."""
    languages = configuration["monolingual_langs"]
    if stream in languages:
        return [stream]
    sides = itertools.permutations(languages, 2)
    one, other = next((a, b) for a, b in sides if f"{a}-{b}" == stream)
    return [f"{stream}.{one}", f"{stream}.{other}"]


def _tokens_of(data: Path, names: Iterable[str]) -> tuple[int, int]:
    """Tokens and unknown ones, of the records beside the pairs; (0, 0) where the data is not there."""
    records = []
    for name in names:
        path = data / f"train.{name}.json"
        if not path.exists():
            return 0, 0
        records.append(load_json_object(path))
    return sum(r["tokens"] for r in records), sum(r["unknown"] for r in records)


def configuration_table(run: RunFolder) -> list[Table]:
    rows = [[key, _shown(value)] for key, value in run.configuration.items()]
    return [Table("Configuration", ["", ""], rows)] if rows else []


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# ------------------------------------------------------------------------------------------ stage


def picture(run: RunFolder, output: Path) -> None:
    """The losses and nothing else, for a README or a paper; its kind by the name's end."""
    panels = [(what_is_drawn(run), "bits", loss_lines(run, _update))]
    if below := per_name(run, "below_unigram_per_language"):
        panels.append((BELOW, "% of perplexity", below))
    figure = _figure(5.5 * len(panels), 4)
    for axes, (title, unit, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for line in lines:
            if line.points:
                x_y = zip(*line.points, strict=True)
                label = line.label or None
                axes.plot(*x_y, line.style, color=line.colour, label=label, markersize=3)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("update")
        axes.set_ylabel(unit)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(ncols=2)
    figure.savefig(output, dpi=120, metadata={"Date": None} if output.suffix == ".svg" else None)


def write(config: ReportConfig, output: Path) -> bool:
    """Writes the page or the picture; whether a run is still going."""
    runs = [read_run(folder) for folder in config.runs]
    if output.suffix in PICTURES:
        if len(runs) > 1:
            raise InputError(
                f"--output {output}: a picture is of one run; give a name that ends in .html"
            )
        picture(runs[0], output)
    else:
        html = page(runs, refresh=WATCH_SECONDS if config.watch else None)
        with replacing(output) as temporary:
            temporary.write_text(html, encoding="utf-8")
    return not all(run.ended for run in runs)


def main(argv: Sequence[str]) -> int:
    config = parse(ReportConfig, argv, description=__doc__)
    if not config.runs:
        raise InputError("RUNS is missing: give the folder of a run, or of several")
    output = config.output or config.runs[0] / "report.html"
    if output.suffix not in (*PICTURES, ".html"):
        raise InputError(
            f"--output {output}: expected a name that ends in .html, {', '.join(PICTURES)}"
        )
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"--output {output}: not a file in a folder that is there")
    goes_on = write(config, output)
    logger.info(f"wrote {output}")
    while config.watch and goes_on:
        time.sleep(WATCH_SECONDS)
        goes_on = write(config, output)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_stage("report", main))
