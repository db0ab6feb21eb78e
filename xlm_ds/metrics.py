"""What a run writes down while it trains: one text line per interval, metrics.jsonl, TensorBoard, a progress bar.

metrics.jsonl has one object a line, each with "kind" ("train" or "valid") and "update"; losses are in bits per masked
token, tokens_per_second counts all tokens, not the masked ones alone.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from xlm_ds.batches import MaskedBatch
from xlm_ds.dictionary import PAD
from xlm_ds.log import logger

BITS_PER_NAT = 1 / math.log(2)


class LossMeter:
    """Sums of losses and counts of targets per language, kept on the device until they are read."""

    def __init__(self, languages: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, languages, dtype=torch.float64, device=device)

    def add(self, batch: MaskedBatch, losses: Tensor) -> None:
        """`losses` (B*K,): nats per target."""
        per_row = losses.numel() // batch.languages.numel()
        language = batch.languages.repeat_interleave(per_row)
        self._sums[0].index_add_(0, language, losses.detach().double())
        self._sums[1].index_add_(0, language, (batch.targets != PAD).double())

    def take(self) -> Tensor:
        """(2, L): sums of nats and counts since the last call, on the CPU."""
        taken = self._sums.cpu().clone()
        self._sums.zero_()
        return taken


def loss_figures(sums: Tensor, languages: Sequence[str]) -> dict[str, Any]:
    """Losses in bits and perplexity from (2, L) sums of nats and counts."""
    nats, counts = sums
    loss = float(nats.sum() / counts.sum())
    per_language = {
        name: float(nats[i] / counts[i]) * BITS_PER_NAT
        for i, name in enumerate(languages)
        if counts[i] > 0
    }
    return {
        "loss": loss * BITS_PER_NAT,
        "perplexity": math.exp(min(loss, 700.0)),  # beyond which a double overflows
        "loss_per_language": per_language,
    }


class RunLog:
    """The run's files of figures, in a `save_dir` that is there; on ranks other than 0 it does nothing."""

    def __init__(
        self, save_dir: Path, tensorboard: Path, *, active: bool, updates: int, start: int
    ) -> None:
        self._active = active
        if not active:
            return
        self._file = (save_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(tensorboard), purge_step=start + 1)
        self._bar = tqdm(
            total=updates or None, initial=start, unit="update", disable=not sys.stderr.isatty()
        )

    def advance(self) -> None:
        if self._active:
            self._bar.update()

    def write(self, kind: str, update: int, figures: Mapping[str, Any]) -> None:
        if not self._active:
            return
        line = {"kind": kind, "update": update, **figures}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        logger.info(_text(line))
        for name, value in _scalars(figures):
            self._board.add_scalar(f"{kind}/{name}", value, update)

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._board.close()
            self._bar.close()


class Stopwatch:
    """Tokens per second since the last reading."""

    def __init__(self) -> None:
        self._start, self._tokens = time.monotonic(), 0

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def restart(self) -> None:
        self._start, self._tokens = time.monotonic(), 0

    def take(self) -> float:
        rate = self._tokens / max(time.monotonic() - self._start, 1e-9)
        self.restart()
        return rate


def _text(line: Mapping[str, Any]) -> str:
    parts = []
    for key, value in line.items():
        if isinstance(value, Mapping):
            parts += [f"{name} {_number(number)}" for name, number in value.items()]
        else:
            parts.append(f"{key} {_number(value)}" if key != "kind" else str(value))
    return " | ".join(parts)


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _scalars(figures: Mapping[str, Any]) -> list[tuple[str, float]]:
    result: list[tuple[str, float]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            result += [(f"{name}/{key}", float(number)) for key, number in value.items()]
        elif isinstance(value, (int, float)):
            result.append((name, float(value)))
    return result
