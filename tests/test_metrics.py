"""Figures of a run: its time adds up, its speed is that of useful work, and a run that learns nothing is told so."""

import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from xlm_ds.architectures import shape_from_config
from xlm_ds.config import ModelConfig, OptimizationConfig
from xlm_ds.metrics import (
    PARTS,
    SlowHosts,
    Stopwatch,
    UnigramWatch,
    below_unigram,
    loss_figures,
    unigram_levels,
)

SHAPE = shape_from_config(ModelConfig(), vocab_size=95_000, languages=5, tokens_per_sample=256)


# ------------------------------------------------------------------------------------ time and speed


class Clock:
    """The host's time, and that of a device that is `behind` it; only waiting for an event is told on the host."""

    def __init__(self) -> None:
        self.now, self.behind, self.waits = 100.0, 0.0, 0

    def event(clock, *, enable_timing: bool) -> Any:
        assert enable_timing

        class Event:
            at = math.nan

            def record(self) -> None:
                self.at = clock.now + clock.behind

            def query(self) -> bool:
                return self.at <= clock.now

            def synchronize(self) -> None:
                clock.waits += 1
                clock.now = max(clock.now, self.at)

            def elapsed_time(self, other: "Event") -> float:
                return 1000 * (other.at - self.at)

        return Event()


@pytest.fixture(params=["cpu", "cuda"])
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Clock, Any]:
    """A clock to be set by hand, and the device whose stopwatches go by it."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    h100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    return clock, torch.device(request.param, 0)


def test_parts_add_up_to_the_wall_time(clock: tuple[Clock, Any]) -> None:
    time, device = clock
    stopwatch = Stopwatch(SHAPE, 256, device, world_size=2, dtype="fp32")
    assert "561.7 million" in stopwatch.definition(0.15)
    for _ in range(2):
        begin = time.now
        for part, seconds in (("data", 1.0), ("forward_backward", 4.0), ("optimizer", 2.0)):
            stopwatch.enter(part)
            time.now += seconds
        assert stopwatch.enter("communication") == "optimizer"
        time.now += 0.5
        stopwatch.enter("validation")
        time.now += 3.0
        assert stopwatch.enter(stopwatch.enter("communication")) == "validation"
        time.now += 2.0
        stopwatch.enter("other")
        time.now += 0.5
        stopwatch.count(samples=64, mask_ratio=0.15)
        figures = stopwatch.take()
        assert tuple(figures["seconds"]) == PARTS
        assert sum(figures["seconds"].values()) == pytest.approx(time.now - begin)
        assert [figures["seconds"][part] for part in PARTS] == [1, 4, 2, 0.5, 5, 0, 0.5]
        assert figures["tokens_per_second"] == pytest.approx(64 * 256 / 8), (
            "validation is no training"
        )
        assert figures["tflops"] == pytest.approx(64 * 256 / 8 * 561.7e6 / 1e12 / 2, rel=1e-4)
        if device.type == "cuda":
            assert figures["mfu"] == pytest.approx(figures["tflops"] / 67)  # in fp32
    time.now += 4
    assert stopwatch.shares().startswith("30.0 seconds: data 6.7%, forward_backward 26.7%")


@pytest.mark.parametrize("clock", ["cuda"], indirect=True)
def test_only_take_waits_for_the_device(clock: tuple[Clock, Any]) -> None:
    """The host is done at once; the device is three seconds behind and then has to wait for data."""
    time, device = clock
    stopwatch = Stopwatch(SHAPE, 256, device, world_size=1, dtype="bf16")
    for _ in range(3):
        stopwatch.enter("data")
        stopwatch.enter("forward_backward")
        time.behind += 1.0
    assert time.waits == 0
    seconds = stopwatch.take()["seconds"]
    assert time.waits == 1
    assert (seconds["data"], seconds["forward_backward"]) == (0, 3)
    time.behind = 0.0
    stopwatch.enter("data")
    time.now += 2.0
    stopwatch.enter("forward_backward")
    assert stopwatch.take()["seconds"]["data"] == 2


# ------------------------------------------------------------------------------------------ losses


class Counted:
    def __init__(self, language: str, *counts: int) -> None:
        self.name = language
        self._counts = np.array([counts], dtype=np.uint64)

    def counts(self) -> Any:
        return self._counts


def test_unigram_levels_are_cross_entropies_with_the_training_text() -> None:
    train = [Counted("a", 9, 0, 89), Counted("b", 1, 1, 1)]
    valid = [Counted("a", 1, 1, 0), Counted("b", 5, 0, 0)]
    of_train, of_valid = unigram_levels(train, valid)  # type: ignore[arg-type]
    expected = [-(math.log(10 / 101) + math.log(1 / 101)) / 2, math.log(3)]
    assert of_valid.tolist() == pytest.approx(expected, rel=1e-6)
    expected = [-(9 * math.log(10 / 101) + 89 * math.log(90 / 101)) / 98, math.log(3)]
    assert of_train.tolist() == pytest.approx(expected, rel=1e-6)


def test_languages_weigh_in_the_level_as_they_do_in_the_loss() -> None:
    levels = torch.tensor([2.0, 4.0], dtype=torch.float64)
    counts = torch.tensor([300.0, 100.0], dtype=torch.float64)
    at_the_level = torch.stack([counts * levels, counts]).repeat(2, 1)
    assert below_unigram(at_the_level, levels) == 0
    sums = torch.stack([counts * (levels - 0.1), counts]).repeat(2, 1)
    figures = loss_figures(sums, ["a", "b"], levels)
    assert figures["below_unigram"] == pytest.approx(100 * (1 - math.exp(-0.1)))
    assert figures["perplexity"] == pytest.approx(math.exp(2.4))
    below = {"a": figures["below_unigram"], "b": figures["below_unigram"]}
    assert figures["below_unigram_per_language"] == pytest.approx(below)
    at_mask = {"a": 1.9 / math.log(2), "b": 3.9 / math.log(2)}
    assert figures["loss_at_mask_per_language"] == pytest.approx(at_mask)


def watched(
    nats_below: float, caplog: pytest.LogCaptureFixture, *, updates: range, ends: bool = False
) -> list[str]:
    """The warnings of a run that is so far below the level, in intervals of 4,000 targets."""
    optimization = OptimizationConfig(warmup_updates=1000, lr=3e-4)
    datasets: Any = [Counted("a", 1000, 2000), Counted("b", 0, 500)]
    watch = UnigramWatch(datasets, datasets, optimization, batch_tokens=2048)
    counts = torch.full((2,), 2000.0, dtype=torch.float64)
    caplog.clear()
    with caplog.at_level("WARNING", logger="xlm_ds"):
        for update in updates:
            sums = torch.stack([counts * (watch.train - nats_below), counts]).repeat(2, 1)
            watch.watch(sums, update)
        if ends:
            watch.at_end(updates[-1])
    return [record.message for record in caplog.records]


@pytest.mark.parametrize(("nats_below", "where"), [(0.04, "3.9 % below"), (-0.7, "101 % above")])
def test_a_run_at_the_unigram_level_is_warned_once(
    nats_below: float, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    (warning,) = watched(nats_below, caplog, updates=range(100, 10_000, 100))
    assert (
        f"after 3400 updates the training perplexity at <mask> is {where}" in warning
    )  # 5 intervals of 4,000
    for mend in ("now 2048 tokens an update", "--update-freq", "now 1000", "now 0.0003"):
        assert mend in warning
    assert "\n" not in warning


def test_a_run_that_learns_or_is_young_is_not_warned(caplog: pytest.LogCaptureFixture) -> None:
    assert watched(0.1, caplog, updates=range(100, 10_000, 100)) == []
    assert watched(0.0, caplog, updates=range(1, 3000, 10)) == []


def test_a_young_run_is_warned_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    (warning,) = watched(0.01, caplog, updates=range(100, 2000, 100), ends=True)
    assert warning.startswith("after 1900 updates the training perplexity at <mask> is 1.0 % below")
    assert watched(0.1, caplog, updates=range(100, 2000, 100), ends=True) == []
    assert len(watched(0.0, caplog, updates=range(100, 10_000, 100), ends=True)) == 1


# -------------------------------------------------------------------------------------- slow hosts


def slow_hosts_said(
    caplog: pytest.LogCaptureFixture, hosts: str, *lines: tuple[float, ...]
) -> list[str]:
    watch = SlowHosts(hosts.split())
    with caplog.at_level("WARNING", logger="xlm_ds"):
        for line in lines:
            watch.watch(line)
    return [record.getMessage().partition(" ")[0] for record in caplog.records]


@pytest.mark.parametrize(
    ("hosts", "lines", "said"),
    [
        ("a b", [(10.0, 6.0)] * 9, ["a"]),  # once
        ("a b", [(10.0, 6.0)] * 2, []),
        ("a b", [(10.0, 6.0), (10.0, 6.0), (6.0, 6.0), (10.0, 6.0), (10.0, 6.0)], []),
        ("a b", [(2.0, 1.0)] * 8, []),  # three in a row take 15 seconds of work
        ("a b", [(2.0, 1.0)] * 9, ["a"]),
        ("a b", [(10.0, 7.0)] * 9, []),
        ("a a b b c c", [(6.0, 6.0, 6.0, 6.0, 9.5, 10.0)] * 3, ["c"]),
        ("a a a b b b", [(6.0, 6.0, 60.0, 6.0, 6.0, 6.0)] * 9, []),  # a rank, not its host
        ("a a", [(10.0, 1.0)] * 9, []),
    ],
)
def test_a_host_whose_ranks_work_longer_is_named(
    hosts: str, lines: list[tuple[float, ...]], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert slow_hosts_said(caplog, hosts, *lines) == said
