"""What a run writes down while it trains: a line per interval, metrics.jsonl, TensorBoard, a progress bar, a trace.

metrics.jsonl has one object a line, each with "kind" (train, valid, retrieve) and "update". Losses are in bits a masked
token, loss_at_mask of those alone that show <mask>, below_unigram in percent of their perplexity; tokens_per_second,
tflops and mfu count all tokens, not the masked ones alone, in all seconds of the interval but those of validation and
checkpoint.
"""

import contextlib
import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from xlm_ds import _core
from xlm_ds.architectures import ModelShape, useful_flops
from xlm_ds.batches import MaskedBatch, shows_mask
from xlm_ds.config import LearningConfig
from xlm_ds.devices import this_gpu
from xlm_ds.dictionary import PAD
from xlm_ds.files import Appended
from xlm_ds.log import InputError, logger
from xlm_ds.model import unigram_log_probabilities
from xlm_ds.streams import Stream

BITS_PER_NAT = 1 / math.log(2)


# ------------------------------------------------------------------------------------------ losses


NO_SAMPLE = torch.iinfo(torch.int64).max


class LossMeter:
    """Sums of losses and counts of targets per stream, kept on the device until they are read.

    A loss that is not finite is in neither; the first sample that had one is remembered.
    """

    def __init__(self, streams: Sequence[tuple[int, ...]], device: torch.device) -> None:
        """`streams`: the language ids of each, one or two."""
        size = 1 + max(max(languages) for languages in streams)
        # By first and second language; the last column is of rows without a second.
        self._stream_of = torch.full((size, size + 1), -1, device=device)
        for number, (language, *second) in enumerate(streams):
            self._stream_of[language, second[0] if second else -1] = number
        self._sums = torch.zeros(4, len(streams), dtype=torch.float64, device=device)
        self._bad_sample = torch.tensor(NO_SAMPLE, device=device)

    def add(self, batch: MaskedBatch, losses: Tensor, first: int) -> None:
        """`losses` (B*K,): nats per target of the samples `first`, `first` + 1, …"""
        rows = batch.languages.numel()
        second = -torch.ones_like(batch.languages)
        if batch.second_languages is not None:
            second = batch.second_languages
        stream = self._stream_of[batch.languages, second]
        stream = stream.repeat_interleave(losses.numel() // rows)
        finite = losses.detach().isfinite()
        nats = losses.detach().where(finite, 0.0)
        real = (batch.targets != PAD) & finite
        at_mask = shows_mask(batch) & finite
        figures = torch.stack([nats, real, nats * at_mask, at_mask]).double()
        self._sums.index_add_(1, stream, figures)
        sample = torch.arange(first, first + rows, device=finite.device)
        bad = sample.where(~finite.view(rows, -1).all(1), NO_SAMPLE).min()
        self._bad_sample = torch.minimum(self._bad_sample, bad)

    def take(self) -> Tensor:
        """(4, S): sums of nats and counts since the last call, on the CPU, then of the targets that show <mask>."""
        taken = self._sums.cpu().clone()
        self._sums.zero_()
        return taken

    def forget_bad_sample(self) -> None:
        self._bad_sample.fill_(NO_SAMPLE)

    def bad_sample(self) -> int:
        """The first whose loss was not finite, or NO_SAMPLE. Reads the device."""
        return int(self._bad_sample)


def unigram_levels(train: Sequence[Stream], valid: Sequence[Stream]) -> tuple[Tensor, Tensor]:
    """(S,) float64 each: nats per token of a stream's training and validation text, by the frequencies of the first.

    The same as `evaluate` compares with: a model that knows the language of a word and nothing of the others.
    """
    levels = []
    for streams in zip(train, valid, strict=True):
        counts = np.stack([stream.counts() for stream in streams], axis=1)  # (halves, 2, V)
        nats = np.zeros(2)
        for half in counts:
            log_p = unigram_log_probabilities(half[:1], language_probabilities=np.ones(1))
            nats -= half.astype(np.float64) @ log_p
        levels.append(nats / counts.sum(axis=(0, 2)))
    of_train, of_valid = torch.from_numpy(np.stack(levels, axis=1))
    return of_train, of_valid


def loss_figures(sums: Tensor, streams: Sequence[str], levels: Tensor) -> dict[str, Any]:
    """Losses in bits and perplexity from LossMeter's sums (4, S), and from the unigram levels (S,) in nats.

    Nothing without a count.

    The level is the mean over the same targets as the loss at <mask>: the streams are weighted as they were drawn.
    Where a word is shown itself a model needs to know nothing but that: 4 bits less for one that copies.
    """
    nats, counts, nats_at_mask, at_mask = sums
    if counts.sum() == 0:  # all updates of the interval were skipped
        return {}
    loss = float(nats.sum() / counts.sum())
    per_language = {
        name: float(nats[i] / counts[i]) * BITS_PER_NAT
        for i, name in enumerate(streams)
        if counts[i] > 0
    }
    figures: dict[str, Any] = {
        "loss": loss * BITS_PER_NAT,
        "perplexity": math.exp(min(loss, 700.0)),  # beyond which a double overflows
    }
    if at_mask.sum() > 0:
        figures["loss_at_mask"] = float(nats_at_mask.sum() / at_mask.sum()) * BITS_PER_NAT
        figures["below_unigram"] = below_unigram(sums, levels)
        there = [(name, i) for i, name in enumerate(streams) if at_mask[i] > 0]
        figures["loss_at_mask_per_language"] = {
            name: float(nats_at_mask[i] / at_mask[i]) * BITS_PER_NAT for name, i in there
        }
        figures["below_unigram_per_language"] = {
            name: below_unigram(sums[:, i, None], levels[i, None]) for name, i in there
        }
    return {**figures, "loss_per_language": per_language}


def below_unigram(sums: Tensor, levels: Tensor) -> float:
    """Percent by which the perplexity at <mask> is below the unigram level (negative: above it)."""
    _, _, nats, counts = sums
    return 100 * -math.expm1(min(float((nats - counts * levels).sum() / counts.sum()), 700.0))


class UnigramWatch:
    """The unigram levels (S,) of what is trained on and of validation, and one warning to a run that stays at them."""

    UPDATES = 2000  # after the warm-up
    PERCENT = 5.0  # below the unigram level, and still at it
    TARGETS = (
        20_000  # looked at together: at 3 bits of deviation each, 1.5 % of the perplexity is chance
    )

    def __init__(
        self,
        train: Sequence[Stream],
        valid: Sequence[Stream],
        optimization: LearningConfig,
        batch_tokens: int,
    ) -> None:
        self.train, self.valid = unigram_levels(train, valid)
        self._names = [stream.name for stream in train]
        self._optimization = optimization
        self._batch_tokens = batch_tokens
        self._sums = torch.zeros(4, len(train), dtype=torch.float64)
        self._has_warned = False
        self._recent: list[Tensor] = []  # sums of the last intervals, of TARGETS together

    def definition(self) -> str:
        """What below_unigram means."""
        levels = zip(self._names, self.train.exp().tolist(), strict=True)
        return (
            "below_unigram: percent of perplexity at <mask> below the unigram level, which a model has that knows how "
            "often each language has each word, and nothing else; that level is a perplexity of "
            + ", ".join(f"{name} {level:.5g}" for name, level in levels)
        )

    def watch(self, sums: Tensor, update: int) -> None:
        """`sums` (4, S): nats and counts of an interval that ends at this update."""
        self._recent.append(sums.clone())
        while sum(float(s[3].sum()) for s in self._recent[1:]) >= self.TARGETS:
            del self._recent[0]
        if self._has_warned or update < self._optimization.warmup_updates + self.UPDATES:
            return
        self._sums += sums
        if self._sums[3].sum() < self.TARGETS:
            return
        below = below_unigram(self._sums, self.train)
        self._sums.zero_()
        if below < self.PERCENT:
            self._has_warned = True
            logger.warning(self._warning(update, below))

    def at_end(self, update: int) -> None:
        """The same of a run that ends at the level before it could be warned."""
        sums = sum(self._recent, torch.zeros_like(self._sums))
        if self._has_warned or update <= self._optimization.warmup_updates:
            return
        if (
            sums[3].sum() >= self.TARGETS
            and (below := below_unigram(sums, self.train)) < self.PERCENT
        ):
            logger.warning(self._warning(update, below))

    def _warning(self, update: int, below: float) -> str:
        side = f"{below:.1f} % below" if below >= 0 else f"{-below:.0f} % above"
        return (
            f"after {update} updates the training perplexity at <mask> is {side} what the frequencies of words alone "
            "give: the model does not use the words around a mask yet. What usually mends it: a larger batch (now "
            f"{self._batch_tokens} tokens an update: --update-freq, --max-tokens), a warm-up (--warmup-updates, now "
            f"{self._optimization.warmup_updates}), another --lr (now {self._optimization.lr:g}), or more updates"
        )


# ------------------------------------------------------------------------------------ time and speed

PARTS = (
    "data",
    "forward_backward",
    "optimizer",
    "communication",
    "validation",
    "checkpoint",
    "other",
)

OUTSIDE_TRAINING = ("validation", "checkpoint")
WORK = ("data", "forward_backward", "optimizer")  # what a rank does by itself


class Stopwatch:
    """Where the wall time goes, and how fast it is: figures since they were last taken.

    Time belongs to the part entered last, so that the parts add up to all of it. On CUDA the marks are events on the
    stream: what the device waits for counts, not what the host, which runs ahead, is doing. Nothing but `take` waits.
    """

    def __init__(
        self,
        shape: ModelShape,
        tokens_per_sample: int,
        device: torch.device,
        world_size: int,
        dtype: str,
    ) -> None:
        self._shape, self._tokens_per_sample = shape, tokens_per_sample
        self._on_cuda = device.type == "cuda"
        self._device_name, self._peak = "a CPU", 0.0  # TFLOP/s; 0 if not known
        if self._on_cuda:
            properties = torch.cuda.get_device_properties(device)
            self._device_name = properties.name
            if speed := this_gpu(properties.name, properties.total_memory).speed:
                self._peak = speed.peak(dtype) / 1e12
        self._world_size, self._dtype = world_size, dtype
        self._marks: deque[tuple[str, Any]] = deque([("other", self._now())])
        self._whole = dict.fromkeys(PARTS, 0.0)
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._tokens, self._flops = 0, 0.0

    def definition(self, mask_ratio: float) -> str:
        """What its figures mean."""
        flops = self._useful_flops(1, mask_ratio) / self._tokens_per_sample
        figures = (
            f"MFU: tflops ÷ {self._peak:g}, the dense {self._dtype} peak of {self._device_name}"
            if self._peak
            else f"no MFU, as the peak of {self._device_name} is not known"
        )
        return (
            "tflops: useful TFLOP/s of a rank, three times the forward matrix products of the layers, of attention in "
            "full, and of the head at masked positions only, without lookups, norms, softmax and what is computed "
            f"twice: {flops / 1e6:.4g} million operations a token; {figures}; seconds: wall time by what it went to"
        )

    def enter(self, part: str) -> str:
        """From now on time belongs to `part`; returns the part that it has belonged to.

        Communication of validation and of a checkpoint stays theirs.
        """
        before = self._marks[-1][0]
        if part == "communication" and before in OUTSIDE_TRAINING:
            part = before
        self._marks.append((part, self._now()))
        self._count_passed()
        return before

    def count(self, samples: int, mask_ratio: float) -> None:
        """Samples of all ranks that have been trained on."""
        self.count_tokens(
            samples * self._tokens_per_sample, self._useful_flops(samples, mask_ratio)
        )

    def count_tokens(self, tokens: int, flops: float) -> None:
        """The same, of samples that are not all as long."""
        self._tokens += tokens
        self._flops += flops

    def take(self) -> dict[str, Any]:
        """Figures of the time and the tokens since the last call. Waits for the device."""
        seconds = self._all_seconds()
        training = sum(s for part, s in seconds.items() if part not in OUTSIDE_TRAINING)
        tflops = self._flops / 1e12 / self._world_size / training
        figures = {"tokens_per_second": self._tokens / training, "tflops": tflops}
        if self._peak:
            figures["mfu"] = tflops / self._peak
        self._restart()
        return {**figures, "seconds": seconds}

    def shares(self) -> str:
        """Where all the time since the start has gone."""
        seconds = {part: self._whole[part] + more for part, more in self._all_seconds().items()}
        total = sum(seconds.values())
        shares = ", ".join(f"{part} {share / total:.1%}" for part, share in seconds.items())
        return f"{total:.1f} seconds: {shares}"

    def _useful_flops(self, samples: int, mask_ratio: float) -> float:
        tokens = self._tokens_per_sample
        masked = _core.masked_count(mask_ratio, tokens - 1)
        return useful_flops(self._shape, rows=samples, tokens=tokens, masked=masked)

    def _all_seconds(self) -> dict[str, float]:
        self.enter("other")
        if self._on_cuda:
            self._marks[-1][1].synchronize()
            self._count_passed()
        return self._seconds

    def _restart(self) -> None:
        for part, seconds in self._seconds.items():
            self._whole[part] += seconds
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._tokens, self._flops = 0, 0.0

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _count_passed(self) -> None:
        while len(self._marks) > 1 and (not self._on_cuda or self._marks[1][1].query()):
            part, begin = self._marks.popleft()
            end = self._marks[0][1]
            self._seconds[part] += begin.elapsed_time(end) / 1e3 if self._on_cuda else end - begin


class SlowHosts:
    """One warning for each host whose ranks work much longer on an update than those of the others."""

    TIMES = 1.5
    IN_A_ROW = 3  # comparisons, each
    SECONDS = (
        5.0  # of the slowest host's work, so that a moment's load is not taken for a slow host
    )

    def __init__(self, hosts: Sequence[str]) -> None:
        """`hosts`: each rank's."""
        self._hosts = hosts
        self._seconds = np.zeros(len(hosts))
        self._in_a_row = dict.fromkeys(hosts, 0)

    def watch(self, seconds: Sequence[float]) -> None:
        """What each rank has worked since the last call."""
        self._seconds += seconds
        of_host = {
            host: float(
                np.median([s for s, h in zip(self._seconds, self._hosts, strict=True) if h == host])
            )
            for host in self._in_a_row
        }
        if len(of_host) < 2 or max(of_host.values()) < self.SECONDS:
            return
        self._seconds[:] = 0
        for host, own in of_host.items():
            others = float(np.median([s for other, s in of_host.items() if other != host]))
            self._in_a_row[host] = self._in_a_row[host] + 1 if own > self.TIMES * others else 0
            if self._in_a_row[host] == self.IN_A_ROW:
                logger.warning(
                    f"{host} is slow: its ranks work {own / others:.1f} times as long on an update as those of "
                    "the other hosts, which wait for them; look for another process, a hot or throttled device, or "
                    "memory that swaps"
                )


# ------------------------------------------------------------------------------------------- files


class RunLog:
    """The run's files of figures, in a `save_dir` that is there; on ranks other than 0 it does nothing.

    `monitor` is given all figures too. `profile`: updates in the trace, which begins after TRACE_AFTER of this process.
    """

    TRACE_AFTER = (
        4  # by then all is compiled and allocated; the profiler warms up in the last of them
    )

    def __init__(
        self,
        save_dir: Path,
        tensorboard: Path,
        *,
        active: bool,
        updates: int,
        start: int,
        profile: int,
        monitor: Callable[[Mapping[str, float]], None],
    ) -> None:
        self._active = active
        if not active:
            return
        trace = save_dir / "trace.json"
        if profile and trace.is_dir():
            raise InputError(f"{trace} is a folder, where --profile writes its trace; move it away")
        (save_dir / "metrics.jsonl").touch()
        self._file = Appended(save_dir / "metrics.jsonl")
        self._board: SummaryWriter | None = SummaryWriter(str(tensorboard), purge_step=start + 1)
        self._bar = tqdm(
            total=updates or None, initial=start, unit="update", disable=not sys.stderr.isatty()
        )
        self._monitor = monitor
        self._excepthook = threading.excepthook
        threading.excepthook = self._thread_ended
        self._profiler = _profiler(trace, profile) if profile else None

    def _thread_ended(self, args: threading.ExceptHookArgs) -> None:
        """A traceback, but not of TensorBoard's thread on a disk that fails: `write` says that in a sentence."""
        of_board = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_board and isinstance(args.exc_value, OSError)):
            self._excepthook(args)

    def advance(self) -> None:
        """After each update."""
        if self._active:
            self._bar.update()
            if self._profiler:
                self._profiler.step()

    def write(self, kind: str, update: int, figures: Mapping[str, Any]) -> None:
        if not self._active:
            return
        line = {"kind": kind, "update": update, **figures}
        logger.info(_text(line))
        scalars = {f"{kind}/{name}": value for name, value in _scalars(figures)}
        self._file.append(json.dumps(line, ensure_ascii=False) + "\n")
        if self._board:
            try:
                for name, value in scalars.items():
                    self._board.add_scalar(name, value, update)
            except OSError as error:  # of its thread, which has ended by it
                logger.warning(f"cannot write {self._board.log_dir}: {error}; going on without")
                self._board = None
        self._monitor(scalars)

    def close(self) -> None:
        if self._active:
            if self._board:
                with contextlib.suppress(OSError):  # said by `write`
                    self._board.close()
            threading.excepthook = self._excepthook
            self._bar.close()
            if self._profiler:
                is_empty = self._profiler.step_num <= self.TRACE_AFTER
                if is_empty:
                    self._profiler.on_trace_ready = None
                self._profiler.stop()
                if is_empty:
                    logger.info(
                        f"no trace: there were no updates after the first {self.TRACE_AFTER}"
                    )


def _profiler(path: Path, updates: int) -> torch.profiler.profile:
    """Started; its step is called after each update."""

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(path))
        traced = profiler.step_num - RunLog.TRACE_AFTER
        logger.info(
            f"wrote {path}, a trace of {traced} updates: open it at https://ui.perfetto.dev or chrome://tracing"
        )

    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(
            wait=RunLog.TRACE_AFTER - 1, warmup=1, active=updates, repeat=1
        ),
        on_trace_ready=write,
    )
    profiler.start()
    return profiler


_NOT_IN_TEXT = ("loss_at_mask_per_language",)  # a line has two of such lists already


def _text(line: Mapping[str, Any]) -> str:
    parts = []
    for key, value in line.items():
        if key in _NOT_IN_TEXT:
            continue
        if isinstance(value, Mapping):
            inner = ", ".join(f"{name} {_number(number)}" for name, number in value.items())
            parts.append(f"{key} {inner}")
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
