"""What a run's folder tells: its figures by update, its configuration, its data and what has happened to it.

    run = read_run(Path("checkpoints/mlm"))
    run.of("valid")[-1]["loss_per_language"]["de"]          # bits
    run.hours_at(1000)                                      # of computing, stops left out

All of it is read from files that the run has written for itself; nothing of it is needed to be there but metrics.jsonl.
"""

import itertools
import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from xlm_ds.files import load_json_object
from xlm_ds.flags import load_toml
from xlm_ds.log import InputError, logger

Record = dict[str, Any]
_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) \| (\w+) \| xlm_ds \| (.*)")
_TOLD = re.compile(r"going on from |stopped by |done: |validation is another ")  # of INFO's lines


class Event(NamedTuple):
    """Something that has happened to a run, as its log tells it."""

    time: str
    level: str
    text: str


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run that has begun; `records` by kind and update, each update once."""

    folder: Path
    records: tuple[Record, ...]
    configuration: Mapping[str, Any]  # of config.toml, its sections opened; {} if it is not there
    manifest: Mapping[str, Any]  # of the last checkpoint; {} if there is none
    ended: Mapping[
        str, Any
    ]  # of ended.json; {} while the run goes on, or if it ended without a word
    events: tuple[Event, ...]
    tested: Mapping[
        str, Mapping[str, Any]
    ]  # by file: what evaluate or finetune has written of a split

    def of(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def hours_at(self, update: int) -> float:
        """Hours of computing up to an update that is a line of training, or the next such line."""
        updates, hours = self._hours
        return hours[min(bisect_left(updates, update), len(hours) - 1)] if hours else 0.0

    @cached_property
    def _hours(self) -> tuple[list[int], list[float]]:
        """Updates that have a line of training, and the hours until them."""
        lines = [r for r in self.of("train") if "seconds" in r]
        hours = itertools.accumulate(sum(r["seconds"].values()) / 3600 for r in lines)
        return [r["update"] for r in lines], list(hours)

    def streams(self) -> list[str]:
        """Languages and pairs that figures are of, in the order of the run's first line."""
        names = [name for r in self.records for name in r.get("loss_per_language", ())]
        return list(dict.fromkeys(names))

    def unigram_level(self, record: Record, name: str) -> float | None:
        """Of a language or pair: bits a token that shows the mask; None of a record that does not compare with it."""
        below = record.get("below_unigram_per_language", {}).get(name)
        if below is None or below >= 100:  # percent
            return None
        level: float = record["loss_at_mask_per_language"][name] - math.log2(1 - below / 100)
        return level


def read_run(folder: Path) -> RunFolder:
    """Raises InputError if it is not a run's folder."""
    last = folder / "checkpoint_last" / "manifest.json"
    records = read_metrics(folder)
    told = [*_events(folder / "train.log"), *_events(folder / "supervise.log")]
    return RunFolder(
        folder=folder,
        records=tuple(records),
        configuration=_configuration(folder / "config.toml"),
        manifest=_if_whole(load_json_object, last),
        ended=_if_whole(load_json_object, folder / "ended.json"),
        events=(*_skipped(records), *sorted(told, key=lambda event: event.time)),
        tested=dict(_tests(folder)),
    )


def read_metrics(run: Path) -> list[Record]:
    """The lines of metrics.jsonl. A run that went back to a checkpoint wrote some updates twice: the later count."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{path}: not found; give the --save-dir of a run")
    latest: dict[tuple[str, int], Record] = {}
    newest = -1
    for number, line in enumerate(_lines(path), start=1):
        try:
            record = json.loads(line)
            kind, update = record["kind"], record["update"] + 0  # a number
            if kind == "train":
                if update <= newest:  # it has gone back, and what it had come to is no more
                    latest = {key: r for key, r in latest.items() if key[1] < update}
                newest = update
            latest[kind, update] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            # A loss of power leaves half a line; the figures before and after it are good.
            logger.info(f"{path}, line {number}: left out, not a line of metrics: {error}")
    return sorted(latest.values(), key=lambda record: record["update"])


def _configuration(path: Path) -> dict[str, Any]:
    sections = [s for s in _if_whole(load_toml, path).values() if isinstance(s, dict)]
    return {key: value for section in sections for key, value in section.items()}


def _if_whole(load: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    """{} of a file that is not there, or damaged: a page has the rest."""
    try:
        return load(path) if path.exists() else {}
    except InputError as error:
        logger.info(f"left out: {error}")
        return {}


def _lines(path: Path) -> list[str]:
    """A loss of power leaves bytes that are no text."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _events(log: Path) -> list[Event]:
    """Begins, ends, resumptions, warnings and faults; the same again counts once."""
    if not log.exists():
        return []
    found: list[Event] = []
    follows = False  # whether lines that are none of the log belong to the event before
    for line in _lines(log):
        match = _LOG_LINE.fullmatch(line)
        if match:
            follows = match[2] != "INFO"
            if follows or _TOLD.match(match[3]):
                found.append(Event(match[1], match[2].lower(), match[3]))
        elif follows and line.strip() and not line.startswith(" "):
            # A fault has lines of its own, and of a traceback the last counts: those between begin with blanks.
            said = found[-1].text.partition(": Traceback")[0].rstrip(":")
            found[-1] = found[-1]._replace(text=f"{said}: {line}")
    return list(dict.fromkeys(found))


def _skipped(records: Sequence[Record]) -> Iterator[Event]:
    """Lines of training by which more updates had been skipped than by the line before; they bear no time."""
    before = 0
    for record in records:
        count = record.get("skipped_updates", 0) if record["kind"] == "train" else before
        if count > before:
            more = count - before
            text = f"{more} skipped by update {record['update']:,}, as the gradient was not finite; {count} in all"
            yield Event("", "warning", text)
        before = max(before, count)


def _tests(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted([*folder.glob("checkpoint*-*.json"), *folder.glob("test.json")]):
        try:
            content = load_json_object(path)
            wanted = {
                "language",
                "masked_tokens",
                "loss",
                "perplexity",
                "accuracy",
                "perplexity_at_mask",
            }
            wanted |= {"unigram_perplexity", "below_unigram"}
            are_scores = all(wanted <= set(row) for row in content.get("scores", ()))
            tested = content.get("languages", {}).values()
            if not are_scores or not all({"examples", "accuracy"} <= set(row) for row in tested):
                raise ValueError("no scores of evaluate or finetune")
            yield path.name, content
        except (ValueError, AttributeError, TypeError) as error:  # InputError is a ValueError
            logger.info(f"{path}: left out: {error}")
