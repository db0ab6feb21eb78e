"""A run as one page, or several compared: loss, speed, data, tests and what has happened, from the runs' own files.

python -m xlm_ds.report checkpoints/mlm                    # checkpoints/mlm/report.html, which needs no network
python -m xlm_ds.report run1 run2 --output both.html       # also where their configurations differ
python -m xlm_ds.report run --watch                        # written again while the run goes on
python -m xlm_ds.report run --output curves.png            # the loss alone
"""

import contextlib
import dataclasses
import io
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xlm_ds import __version__
from xlm_ds.config import ReportConfig
from xlm_ds.files import load_json_object, replacing
from xlm_ds.flags import parse
from xlm_ds.log import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    InputError,
    logger,
    run_stage,
    sentence_of,
    silent,
)
from xlm_ds.order import Order, build_order
from xlm_ds.run_folder import RunFolder, read_run
from xlm_ds.steps import Steps
from xlm_ds.streams import stored_split

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = (".png", ".pdf", ".svg")
WATCH_SECONDS = 30
FOR_GOOD = (
    EXIT_OK,
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
)  # supervise starts a run again that ended otherwise
_ID = re.compile(r'\bid="|url\(#|href="#')
LARGEST = 500.0  # bits, of what is drawn beside its perplexity
COLOURS = (
    *("#3b82c4", "#e07b39", "#3a9d5d", "#d1495b", "#8d6cc3"),
    *("#a9743a", "#d66fae", "#2fa8b5", "#b5a642", "#6b8e23"),
)
OTHERS = "#8a8f98"  # the colour of more streams than there are colours
# They stand for the page's own colours of text and cards, light or dark.
_INK, _CARD = "#012345", "#012346"

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


def page(runs: Sequence[RunFolder], *, refresh: int | None = None) -> str:
    """The HTML; `refresh`: seconds after which a browser loads it again."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xlm_ds", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    names = names_of(runs)
    parts = [comparison(runs, names)] if len(runs) > 1 else []
    parts += [part_of(run, name) for run, name in zip(runs, names, strict=True)]
    return environment.get_template("report.html").render(
        title=" and ".join(names),
        parts=[with_own_ids(part, number) for number, part in enumerate(parts)],
        refresh=refresh,
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def with_own_ids(part: Part, number: int) -> Part:
    """matplotlib gives the parts of every picture the same ids, of which a page may have one each."""
    charts = [
        chart._replace(svg=_ID.sub(rf"\g<0>c{number}-{place}-", chart.svg))
        for place, chart in enumerate(part.charts)
    ]
    return dataclasses.replace(part, charts=charts)


def names_of(runs: Sequence[RunFolder]) -> list[str]:
    """The names of their folders, with as many above them as tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of_run[-depth:]) for of_run in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def comparison(runs: Sequence[RunFolder], names: Sequence[str]) -> Part:
    """Of several runs: their validation in one picture, and where their configurations differ."""
    charts = [
        *drawn(Drawing("Validation loss over updates", valid_lines(runs, names), "bits")),
        *drawn(
            Drawing(
                "Validation loss over hours",
                valid_lines(runs, names, by_hour=True),
                "bits",
                "hours of computing",
            )
        ),
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
    heads = ["", *names]
    streams = {name: run.streams() for run, name in zip(runs, names, strict=True)}
    note = ""
    if len({tuple(of_run) for of_run in streams.values()}) > 1:
        of_each = "; ".join(f"{name}: {', '.join(of_run)}" for name, of_run in streams.items())
        note = f"not of the same texts, and so not to be compared as they stand: {of_each}"
    tables = [
        Table("Last validation", heads, figures, note),
        Table("Different in their configurations", heads, rows, "" if rows else "nothing"),
    ]
    return Part("Comparison", "", charts, tables)


def valid_lines(
    runs: Sequence[RunFolder], names: Sequence[str], *, by_hour: bool = False
) -> list[Line]:
    """The validation losses of each run."""
    colours = colours_of(names)
    return [
        Line(
            name,
            [
                (run.hours_at(r["update"]) if by_hour else r["update"], r["loss"])
                for r in run.of("valid")
            ],
            colours[name],
            "o-",
        )
        for run, name in zip(runs, names, strict=True)
    ]


def part_of(run: RunFolder, name: str) -> Part:
    tables = [
        *validation_table(run),
        *test_tables(run),
        *retrieval_table(run),
        *data_table(run),
        *configuration_table(run),
    ]
    return Part(name, state_of(run), charts_of(run), tables, run.events)


def state_of(run: RunFolder) -> str:
    update = max((r["update"] for r in run.records), default=0)
    ended = run.ended.get("what", "going on, or ended without a word")
    hours = run.hours_at(update)
    return f"{run.folder}: update {update:,}, {hours:.2f} hours of computing; {ended}"


# ----------------------------------------------------------------------------------------- charts


class Drawing(NamedTuple):
    """What a chart is made of; what is beyond `most`, or not finite, is not drawn: a run may have diverged."""

    title: str
    lines: Sequence[Line]
    unit: str
    x: str = "update"
    perplexity: bool = False
    most: float = math.inf


def drawings_of(run: RunFolder) -> list[Drawing]:
    train = run.of("train")
    what, bits = what_is_drawn(run), has_masks(run)
    return [
        Drawing(f"{what} over updates", loss_lines(run, float), "bits", "update", bits, LARGEST),
        Drawing(
            "The same over hours", loss_lines(run, run.hours_at), "bits", "hours of computing", bits, LARGEST
        ),
        Drawing(BELOW, per_name(run, "below_unigram_per_language"), "% of perplexity", most=1000),
        Drawing("Accuracy in validation", per_name(run, "accuracy_per_language"), "%"),
        Drawing("Retrieval, margin", per_name(run, "margin", kind="retrieve"), "%"),
        *(
            Drawing(title, [Line("", [(r["update"], r[key]) for r in train if key in r], COLOURS[0])], "")
            for title, key in (
                ("Learning rate", "lr"),
                ("Norm of the gradient", "gradient_norm"),
                ("Tokens per second", "tokens_per_second"),
                ("Skipped updates so far", "skipped_updates"),
            )
        ),
    ]  # fmt: skip


def charts_of(run: RunFolder) -> list[Chart]:
    charts = [chart for drawing in drawings_of(run) for chart in drawn(drawing)]
    return charts + time_chart(run)


AT_MASK = "loss_at_mask_per_language"
BELOW = "Validation below the unigram level (of frequencies of words alone)"


def loss_key(run: RunFolder) -> str:
    """Where `<mask>` is shown, as the unigram level is; of a fine-tuning, which has no masks, the loss."""
    return AT_MASK if any(AT_MASK in r for r in run.records) else "loss_per_language"


def has_masks(run: RunFolder) -> bool:
    """A pretraining; a fine-tuning's losses are of labels, of which there is no perplexity of words."""
    return not any("accuracy_per_language" in r for r in run.records)


def what_is_drawn(run: RunFolder) -> str:
    if loss_key(run) == AT_MASK:
        return "Loss at <mask> (dots: validation, dotted: unigram level)"
    return "Loss (dots: validation)"


def loss_lines(run: RunFolder, x: Callable[[int], float]) -> list[Line]:
    """Of each language training as a line, validation as dots, and dotted its own unigram level; `x` of an update."""
    key = loss_key(run)
    lines: list[Line] = []
    for name, colour in colours_of(run.streams()).items():
        for kind, style in (("train", "-"), ("valid", "o")):
            points = [
                (x(r["update"]), r[key][name]) for r in run.of(kind) if name in r.get(key, ())
            ]
            named = any(line.label == name for line in lines)
            lines.append(Line("" if named or not points else name, points, colour, style))
        levels = [
            (x(r["update"]), level)
            for r in run.of("train")
            if (level := run.unigram_level(r, name)) is not None
        ]
        if levels and colour != OTHERS:
            lines.append(Line("", levels, colour, ":"))
    return lines


def per_name(run: RunFolder, key: str, kind: str = "valid") -> list[Line]:
    records = [r for r in run.of(kind) if key in r]
    names = list(dict.fromkeys(name for r in records for name in r[key]))
    colours = colours_of(list(dict.fromkeys([*run.streams(), *names])))
    return [
        Line(
            name,
            [(r["update"], r[key][name]) for r in records if name in r[key]],
            colours[name],
            "o-",
        )
        for name in names
    ]


def time_shares(run: RunFolder) -> dict[str, list[Point]]:
    """By what it went to: percent of the wall time of each line of training."""
    lines = [r for r in run.of("train") if sum(r.get("seconds", {}).values()) > 0]
    return {
        kind: [
            (r["update"], 100 * r["seconds"].get(kind, 0.0) / sum(r["seconds"].values()))
            for r in lines
        ]
        for kind in (lines[0]["seconds"] if lines else ())
    }


def time_chart(run: RunFolder) -> list[Chart]:
    shares = time_shares(run)
    if not shares:
        return []
    updates = [x for x, _ in next(iter(shares.values()))]
    heights = [[y for _, y in points] for points in shares.values()]
    if len(updates) == 1:  # which would be an area without a width
        updates, heights = [0.0, *updates], [[y, y] for (y,) in heights]

    def draw(axes: "Axes") -> None:
        axes.stackplot(updates, heights, labels=list(shares), colors=COLOURS)
        axes.set_ylim(0, 100)
        axes.figure.legend(loc="outside lower center", ncols=4, fontsize=8)

    return [_chart("Where the time goes", draw, "% of wall time", "update")]


def drawn(drawing: Drawing) -> list[Chart]:
    """A chart of the lines that have points, or none."""
    lines = shown_lines(drawing)
    if not lines:
        return []

    def draw(axes: "Axes") -> None:
        _plot(axes, lines)
        if drawing.perplexity:
            right = axes.secondary_yaxis("right", functions=(_perplexity, _bits))
            right.set_ylabel("perplexity", color=_INK)
            right.tick_params(colors=_INK)
            right.spines["right"].set_color(_INK)
            right.spines["right"].set_alpha(0.4)
            right.set_yticks(_round_perplexities(axes.get_ylim()))

    return [_chart(drawing.title, draw, drawing.unit, drawing.x)]


def shown_lines(drawing: Drawing) -> list[Line]:
    """Those with points."""
    lines = [
        line._replace(points=[(x, y) for x, y in line.points if abs(y) < drawing.most])
        for line in drawing.lines
    ]
    return [line for line in lines if line.points]


def _plot(axes: "Axes", lines: Sequence[Line]) -> None:
    """With a legend of those that have a colour of their own; the others are one entry."""
    others = len({line.label for line in lines if line.label and line.colour == OTHERS})
    for line in lines:
        label = line.label
        if label and line.colour == OTHERS:
            label, others = (f"{others} others" if others else ""), 0
        # A line of one point would not be seen.
        style = "o" if len(line.points) == 1 and line.style == "-" else line.style
        x_y = zip(*line.points, strict=True)
        axes.plot(
            *x_y, style, color=line.colour, label=_as_text(label), linewidth=1.2, markersize=3
        )
    if axes.get_legend_handles_labels()[1]:
        axes.legend(ncols=2, fontsize=8)


def _as_text(label: str) -> str | None:
    """matplotlib reads $…$ as a formula, and leaves out what begins with _."""
    return label.replace("$", r"\$").replace("_", " _", int(label.startswith("_"))) or None


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
    return Chart(
        title, svg[svg.index("<svg") :].replace(_INK, "currentColor").replace(_CARD, "var(--card)")
    )


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
    for legend in filter(None, (axes.get_legend(), *axes.figure.legends)):
        legend.get_frame().set(facecolor=_CARD, alpha=0.8)
        for text in legend.get_texts():
            text.set_color(_INK)
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
            if math.isfinite(r["loss_per_language"].get(name, math.nan))
        ]
        best, update = min(values, default=(math.nan, 0))
        bits = last["loss_per_language"][name]
        row = [name, f"{bits:.3f}", f"{best:.3f}", f"{update:,}"]
        if has_masks(run):
            row.insert(2, f"{2**bits:.1f}" if not bits > LARGEST else f"2^{bits:.0f}")
        if "accuracy_per_language" in last:
            row.append(f"{last['accuracy_per_language'][name]:.1f}")
        if AT_MASK in last:
            at_mask, below = last[AT_MASK].get(name), last["below_unigram_per_language"].get(name)
            row += [f"{at_mask:.3f}", _percent(below)] if at_mask is not None else ["", ""]
        rows.append(row)
    head = ["", "bits", *(["perplexity"] if has_masks(run) else []), "best bits", "at update"]
    note = f"update {last['update']:,}; of all: {last['loss']:.3f} bits"
    if "accuracy_per_language" in last:
        head.append("accuracy %")
    if AT_MASK in last:
        head += ["bits at <mask>", "below unigram level, %"]
    if "below_unigram" in last:
        below = last["below_unigram"]
        side = "above" if below < 0 else "below"
        note += f", {_percent(abs(below))} % of perplexity {side} the unigram level"
    return [Table("Validation", head, rows, note)]


def _percent(value: float) -> str:
    """Of a run that has diverged it may have hundreds of digits."""
    return f"{value:.1f}" if not abs(value) > 1e6 else f"{value:.0e}"


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
                "perplexity at <mask>",
                "unigram level",
                "below %",
            ]
            rows = [
                [
                    s["language"], f"{s['masked_tokens']:,}", f"{s['loss']:.3f}", f"{s['perplexity']:.1f}",
                    f"{s['accuracy']:.2f}", f"{s['perplexity_at_mask']:.1f}", f"{s['unigram_perplexity']:.1f}",
                    f"{s['below_unigram']:.1f}",
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
    samples = run.manifest.get("progress", {}).get("samples", 0)
    languages = [name for name in blocks if name in configuration["monolingual_langs"]]
    names = [*languages, *(name for name in blocks if name not in languages)]
    order = order_of(blocks, names[len(languages) :], configuration)
    shares, passes = order.probabilities(samples), samples_drawn(order, samples)
    total, data = sum(blocks.values()), Path(configuration["data"])
    rows = []
    for number, name in enumerate(names):
        count = blocks[name]
        tokens, unknown = _tokens_of(data, _pairs_of(data, name, configuration))
        rows.append([
            name, f"{count:,}", f"{tokens:,}" if tokens else "not known",
            f"{100 * unknown / tokens:.2f}" if tokens else "not known",
            f"{100 * count / total:.1f}", f"{100 * shares[number]:.1f}", f"{passes[number] / count:.2f}",
        ])  # fmt: skip
    head = ["", "blocks or pairs", "tokens", "unknown %", "natural share %", "drawn %", "passes"]
    note = (
        f"after {samples:,} samples; shares are of blocks and pairs, that drawn is the present one"
    )
    if not data.is_dir():
        note += f"; tokens are not known, as {data} is not there from here"
    return [Table("Data", head, rows, note)]


def order_of(
    blocks: Mapping[str, int], pairs: Sequence[str], configuration: Mapping[str, Any]
) -> Order:
    """The run's, but for the seed."""
    alpha = configuration["sampling_alpha"]
    return build_order(
        [count for name, count in blocks.items() if name not in pairs],
        alpha=alpha if isinstance(alpha, int | float) else Steps.parse(alpha),
        seed=0,
        pair_blocks=[blocks[name] for name in pairs],
        tlm_share=configuration["tlm_share"],
    )


def samples_drawn(order: Order, samples: int) -> NDArray[np.float64]:
    """Of the first `samples`, those of each stream, (S,)."""
    starts = [segment.first_sample for segment in order.segments]
    counts = np.diff(np.minimum([*starts, max(samples, starts[-1])], samples))
    drawn: NDArray[np.float64] = sum(
        (n * order.probabilities(start) for n, start in zip(counts, starts, strict=True)),
        np.zeros(len(order.blocks)),
    )
    return drawn


def _pairs_of(data: Path, stream: str, configuration: Mapping[str, Any]) -> list[str]:
    """The files of a stream: train.en, or train.ar-en.ar and train.ar-en.en."""
    languages = configuration["monolingual_langs"]
    if stream in languages:
        return [f"train.{stream}"]
    sides = next(p for p in itertools.permutations(languages, 2) if "-".join(p) == stream)
    return [f"{stored_split(data, 'train', sides)}.{language}" for language in sides]


def _tokens_of(data: Path, names: Iterable[str]) -> tuple[int, int]:
    """Tokens and unknown ones, of the records beside the pairs; (0, 0) where the data is not there."""
    records = []
    for name in names:
        path = data / f"{name}.json"
        if not path.exists():
            return 0, 0
        records.append(load_json_object(path))
    return sum(r["tokens"] for r in records), sum(r["unknown"] for r in records)


def configuration_table(run: RunFolder) -> list[Table]:
    rows = [[key, _shown(value)] for key, value in run.configuration.items()]
    return [Table("Configuration", ["flag", "value"], rows)] if rows else []


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


# ------------------------------------------------------------------------------------------ stage


def picture(run: RunFolder, output: Path) -> None:
    """The losses and nothing else, for a README or a paper; its kind by the name's end."""
    drawings = drawings_of(run)
    there = [d for d in (drawings[0], drawings[2]) if shown_lines(d)]
    if not there:
        raise InputError(f"{run.folder}: has no losses to draw yet")
    figure = _figure(5.5 * len(there), 4)
    panels = figure.subplots(1, len(there), squeeze=False)[0]
    for axes, drawing in zip(panels, there, strict=True):
        _plot(axes, shown_lines(drawing))
        axes.set_title(drawing.title, fontsize=9)
        axes.set_xlabel(drawing.x)
        axes.set_ylabel(drawing.unit)
        axes.grid(visible=True, alpha=0.3)
    metadata = {"Date": None} if output.suffix == ".svg" else None
    with replacing(output) as temporary:
        figure.savefig(temporary, format=output.suffix[1:], dpi=120, metadata=metadata)


def write(config: ReportConfig, runs: Sequence[RunFolder], output: Path) -> bool:
    """Writes the page or the picture; whether a run is still going, or may be started again."""
    goes_on = not all(run.ended.get("exit_code") in FOR_GOOD for run in runs)
    if output.suffix in PICTURES:
        picture(runs[0], output)
    else:
        html = page(runs, refresh=WATCH_SECONDS if config.watch and goes_on else None)
        with replacing(output) as temporary:
            temporary.write_text(html, encoding="utf-8")
    return goes_on


def output_of(config: ReportConfig) -> Path:
    """--output, or what stands for it; of several runs not the page of the first alone."""
    name = "report.html" if len(config.runs) == 1 else "comparison.html"
    output = config.output or config.runs[0] / name
    if output.suffix not in (*PICTURES, ".html"):
        raise InputError(
            f"--output {output}: expected a name that ends in .html, {', '.join(PICTURES)}"
        )
    if output.suffix in PICTURES and len(config.runs) > 1:
        raise InputError(
            f"--output {output}: a picture is of one run; give a name that ends in .html"
        )
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"--output {output}: not a file in a folder that is there")
    return output


def main(argv: Sequence[str]) -> int:
    config = parse(ReportConfig, argv, description=__doc__)
    runs = [read_run(folder) for folder in config.runs]
    output = output_of(config)
    if not config.watch:
        write(config, runs, output)
        logger.info(f"wrote {output}")
        return EXIT_OK
    goes_on, said = True, ""
    while goes_on:
        try:
            goes_on = write(config, runs, output)
            now = f"wrote {output}"
        except (InputError, OSError) as error:  # nothing to draw yet, a share that is away
            now = f"{sentence_of(error)}; {output} stays as it is"
        if now != said:
            logger.info(now)
        said = now
        if goes_on:
            time.sleep(WATCH_SECONDS)
            with silent(), contextlib.suppress(InputError, OSError):  # said of the files at first
                runs = [read_run(folder) for folder in config.runs]
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_stage("report", main))
