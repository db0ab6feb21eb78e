"""The training loop's laws: what comes when, same samples however they are divided, resuming as if never stopped."""

import dataclasses
import json
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import xlm_ds.run
from xlm_ds import checkpoint, train
from xlm_ds.config import DataConfig, OptimizationConfig, RunConfig, TrainConfig
from xlm_ds.corpus import open_corpus
from xlm_ds.deepspeed_config import CONFIG_DIRECTORY
from xlm_ds.engine import Engine, Ranks
from xlm_ds.flags import parse
from xlm_ds.geometry import Geometry, batch_geometry, divided
from xlm_ds.lifeline import Ending
from xlm_ds.log import InputError
from xlm_ds.metrics import LossMeter
from xlm_ds.run import run_geometry
from xlm_ds.schedule import lr_at
from xlm_ds.train import what_is_due

SHAPE = [
    "--encoder-layers=2",
    "--encoder-embed-dim=32",
    "--encoder-ffn-embed-dim=64",
    "--encoder-attention-heads=4",
    "--tokens-per-sample=32",
    "--max-tokens=128",
    "--lr=1e-3",
    "--log-interval=1",
]


class NeverStop:
    requested = 0
    why = "a test"

    def watch(self, _: object) -> None:
        pass


def train_here(data: Path, save_dir: Path, ranks: Ranks, *flags: str) -> None:
    """Trains in this process."""
    config = parse(TrainConfig, [str(data), f"--save-dir={save_dir}", *SHAPE, *flags])
    save_dir.mkdir(exist_ok=True)
    ending = Ending(save_dir)
    ending.begin()
    assert train.train(config, ranks, NeverStop(), ending) == 0  # type: ignore[arg-type]


@pytest.fixture
def run(tiny_data: Path, tmp_path: Path, ranks: Ranks) -> Any:
    """Trains in this process; returns the losses written to metrics.jsonl, by update."""

    def start(name: str, *flags: str) -> dict[int, float]:
        train_here(tiny_data, tmp_path / name, ranks, *flags)
        return losses_in(tmp_path / name)

    return start


def records_in(save_dir: Path) -> list[dict[str, Any]]:
    lines = (save_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses_in(save_dir: Path, kind: str = "train") -> dict[int, float]:
    return {r["update"]: r["loss"] for r in records_in(save_dir) if r["kind"] == kind}


def last_weights(save_dir: Path) -> checkpoint.StoredTensors:
    folder = save_dir / checkpoint.LAST
    return checkpoint.load_tensors(folder, checkpoint.read_manifest(folder), "weight")


def test_it_learns(run: Any) -> None:
    flags = ["--max-update=30", "--lr=3e-3", "--lr-scheduler=linear", "--warmup-updates=5"]
    losses = run("a", *flags, "--max-tokens=512", "--init-output-bias=zeros")
    assert losses[1] == pytest.approx(math.log2(600), abs=0.5)
    assert losses[30] < losses[1] - 1
    assert len(losses) == 30


def test_resuming_is_bit_equal_to_never_stopping(run: Any, tmp_path: Path) -> None:
    """With dropout on: its seeds, the order, the masks, Adam and the schedule all come back."""
    whole = run("whole", "--max-update=6", "--warmup-updates=4")
    run("parts", "--max-update=3", "--warmup-updates=4")
    parts = run("parts", "--max-update=6", "--warmup-updates=4")
    assert parts == whole
    a, b = last_weights(tmp_path / "whole"), last_weights(tmp_path / "parts")
    assert all(torch.equal(a[name], b[name]) for name in a)


CHANGING = ["--sampling-alpha=0.7@0,0@2,1.5@5", "--mask-ratio=0.15@0,0.4@4"]


def test_resuming_across_a_change_is_bit_equal_to_never_stopping(run: Any, tmp_path: Path) -> None:
    """One part ends inside the second alpha, and the mask ratio changes in the next."""
    rate = (
        "--lr-scheduler=inverse_sqrt"  # each part ends with a validation, which moves no rate here
    )
    whole = run("whole", "--max-update=7", rate, *CHANGING)
    for updates in (1, 3, 4, 7):
        parts = run("parts", f"--max-update={updates}", rate, *CHANGING)
    assert parts == whole
    a, b = last_weights(tmp_path / "whole"), last_weights(tmp_path / "parts")
    assert all(torch.equal(a[name], b[name]) for name in a)
    plain = run("plain", "--max-update=7", rate)
    assert [plain[u] == whole[u] for u in (1, 2, 3)] == [True, True, False], "nothing changed"


def test_what_changes_is_written_in_samples_and_kept_with_another_batch(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def written() -> DataConfig:
        return parse(TrainConfig, ["--config", str(tmp_path / "a" / "config.toml")]).data

    run("a", "--max-update=2", *CHANGING)  # updates of 4 samples
    first = written()
    assert str(first.sampling_alpha) == "0.7@0,0.0@8samples,1.5@20samples"
    assert str(first.mask_ratio) == "0.15@0,0.4@16samples"
    with caplog.at_level("INFO", logger="xlm_ds"):
        run("a", "--max-update=3", "--update-freq=3", *CHANGING)
        run("a", "--max-update=4", "--update-freq=2", *CHANGING)
    assert written() == first
    assert "mask ratio over the run: 0.15@0,0.4@16samples, now 0.4" in caplog.text
    assert "mask_ratio was" not in caplog.text
    again = ["--config", str(tmp_path / "a" / "config.toml"), f"--save-dir={tmp_path / 'b'}"]
    assert parse(TrainConfig, again).data == first


def test_validation_keeps_the_first_mask_ratio(run: Any, tmp_path: Path) -> None:
    """The curves of a run must compare: with nothing learnt, the loss stays what it was."""
    flags = ["--max-update=2", "--validate-interval-updates=1", "--lr=1e-30"]
    run("a", *flags, "--mask-ratio=0.15@0,0.9@1")
    run("b", *flags)
    losses = losses_in(tmp_path / "a", "valid")
    assert losses[1] == losses[2] == losses_in(tmp_path / "b", "valid")[2]
    assert losses_in(tmp_path / "a")[2] != losses_in(tmp_path / "b")[2]


class StopAt(NeverStop):
    """Asks for an end after so many updates."""

    def __init__(self, update: int) -> None:
        self.left = update

    @property
    def requested(self) -> int:  # type: ignore[override]
        self.left -= 1
        return 0 if self.left else signal.SIGTERM


def stop_here(update: int, data: Path, save_dir: Path, ranks: Ranks, *flags: str) -> None:
    """Begins a run in this process and stops it."""
    config = parse(TrainConfig, [str(data), f"--save-dir={save_dir}", *SHAPE, *flags])
    save_dir.mkdir()
    ending = Ending(save_dir)
    ending.begin()
    assert train.train(config, ranks, StopAt(update), ending) == 75  # type: ignore[arg-type]


def test_a_validation_missed_by_a_stop_is_made_up_for(
    run: Any, tiny_data: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """The schedule moves with it: the losses after it are those of a run that was not stopped."""
    flags = ["--max-update=8", "--validate-interval-updates=2", "--lr-threshold=0.5", "--lr=0.03"]
    whole = run("whole", *flags)
    stop_here(4, tiny_data, tmp_path / "stopped", ranks, *flags)
    assert set(losses_in(tmp_path / "stopped", "valid")) == {2}
    assert run("stopped", *flags) == whole
    assert losses_in(tmp_path / "stopped", "valid") == losses_in(tmp_path / "whole", "valid")
    rates = {r["update"]: r["lr"] for r in records_in(tmp_path / "whole") if r["kind"] == "train"}
    assert rates[8] < rates[1], "the schedule never moved, so the test shows nothing"


def test_a_finished_run_started_again_does_nothing(run: Any, tmp_path: Path) -> None:
    first = run("a", "--max-update=2")
    folder = (tmp_path / "a" / checkpoint.LAST).resolve()
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert run("a", "--max-update=2") == first
    assert (folder / "manifest.json").stat().st_mtime_ns == before


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the loss of a sample NaN (None: only the gradient), in some updates."""

    def start(updates: set[int], sample: int | None) -> None:
        backward, add = Engine.backward, LossMeter.add
        update = -1

        def poisoned(self: Engine, loss: torch.Tensor) -> None:
            nonlocal update
            update += 1
            backward(self, loss * float("nan") if update in updates else loss)

        def noted(self: LossMeter, batch: Any, losses: torch.Tensor, first: int) -> None:
            if sample is not None and first <= sample < first + batch.languages.numel():
                losses = losses.clone()
                losses.view(batch.languages.numel(), -1)[sample - first, 0] = math.nan
            add(self, batch, losses, first)

        monkeypatch.setattr(Engine, "backward", poisoned)
        monkeypatch.setattr(LossMeter, "add", noted)

    return start


def test_a_gradient_that_is_not_finite_is_skipped_and_said(
    run: Any, tmp_path: Path, poison: Any
) -> None:
    poison({1, 3, 4}, None)
    losses = run("a", "--max-update=7", "--max-skipped-updates=3")
    lines = [r for r in records_in(tmp_path / "a") if r["kind"] == "train"]
    assert [r.get("skipped_updates", 0) for r in lines] == [0, 1, 1, 2, 3, 3, 3]
    assert all(math.isfinite(loss) for loss in losses.values())
    manifest = checkpoint.read_manifest(tmp_path / "a" / checkpoint.LAST)
    assert checkpoint.read_progress(manifest).skipped_updates == 3


def test_resuming_after_a_skipped_update_is_bit_equal(run: Any, poison: Any) -> None:
    poison({2, 6 + 2}, None)
    whole = run("whole", "--max-update=6", "--warmup-updates=4")
    run("parts", "--max-update=4", "--warmup-updates=4")
    assert run("parts", "--max-update=6", "--warmup-updates=4") == whole


@pytest.mark.parametrize("sample", [None, 9])
def test_too_many_skipped_updates_name_their_samples(
    run: Any, tmp_path: Path, poison: Any, sample: int | None
) -> None:
    """Updates of four samples: the third begins with sample 8."""
    poison({2, 3, 4}, sample)
    with pytest.raises(InputError) as caught:
        run("a", "--max-update=9", "--log-interval=5", "--max-skipped-updates=3")
    assert (
        "3 updates in a row were skipped, as their gradient was not finite: the first is update 3, of the samples "
        "8 to 11" in str(caught.value)
    )
    assert ("the loss of sample 9 (block " in str(caught.value)) == (sample is not None)
    assert not (tmp_path / "a" / checkpoint.LAST).exists()


def test_stages_give_the_same_fp32_losses(run: Any, tmp_path: Path) -> None:
    template = json.loads((CONFIG_DIRECTORY / "zero1_fp32.json").read_text(encoding="utf-8"))
    losses = {}
    for stage in (1, 2, 3):
        template["zero_optimization"]["stage"] = stage
        (tmp_path / f"z{stage}.json").write_text(json.dumps(template), encoding="utf-8")
        flags = ["--max-update=4", f"--deepspeed_config={tmp_path}/z{stage}.json"]
        losses[stage] = run(f"z{stage}", *flags)
    for stage in (2, 3):
        assert losses[stage] == pytest.approx(losses[1], abs=1e-4)


def test_saved_at_stage_1_continues_at_stage_3(run: Any, tmp_path: Path) -> None:
    whole = run("whole", "--max-update=6", "--dropout=0", "--attention-dropout=0")
    template = json.loads((CONFIG_DIRECTORY / "zero1_fp32.json").read_text(encoding="utf-8"))
    template["zero_optimization"]["stage"] = 3
    (tmp_path / "z3.json").write_text(json.dumps(template), encoding="utf-8")
    run("moved", "--max-update=3", "--dropout=0", "--attention-dropout=0")
    flags = ["--dropout=0", "--attention-dropout=0", f"--deepspeed_config={tmp_path / 'z3.json'}"]
    moved = run("moved", "--max-update=6", *flags)
    assert moved == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("arch", ["xlm", "xlm_100"])
def test_xlms_network_trains_is_saved_and_goes_on(run: Any, tmp_path: Path, arch: str) -> None:
    """Bit-equal, with dropout."""
    flags = [f"--arch={arch}", "--warmup-updates=4"]
    whole = run("whole", "--max-update=6", *flags)
    run("parts", "--max-update=3", *flags)
    assert run("parts", "--max-update=6", *flags) == whole
    names = last_weights(tmp_path / "whole")
    assert ("language_embedding.weight" in names) == (arch == "xlm")
    assert not [name for name in names if "transform" in name]
    with pytest.raises(InputError, match="another architecture"):
        run("whole", "--max-update=7")


def test_micro_batches_do_not_change_the_update(run: Any) -> None:
    """The same global batch in one micro-batch or in four: same samples, same masked-token mean."""
    flags = ["--max-update=3", "--dropout=0", "--attention-dropout=0", "--global-batch-tokens=256"]
    assert run("a", *flags, "--max-tokens=256") == pytest.approx(
        run("b", *flags, "--max-tokens=64"), abs=2e-4
    )


def test_the_run_folder_has_all_it_promises(run: Any, tmp_path: Path) -> None:
    run("a", "--max-update=2")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"config.toml", "deepspeed.json", "metrics.jsonl", "train.log", "tensorboard"} <= names
    assert {checkpoint.LAST, checkpoint.BEST, "checkpoint_1_2"} <= names
    config = parse(TrainConfig, ["--config", str(tmp_path / "a" / "config.toml")])
    assert config.data.monolingual_langs == ("ar", "en", "hi")
    assert set(losses_in(tmp_path / "a", "valid")) == {2}


def test_cadence_of_checkpoints(run: Any, tmp_path: Path) -> None:
    def folders() -> set[str]:
        return {p.name for p in (tmp_path / "a").glob("checkpoint_1_*")}

    run("a", "--max-update=5", "--save-interval-updates=2")
    assert folders() == {"checkpoint_1_2", "checkpoint_1_4", "checkpoint_1_5"}
    run("a", "--max-update=7")
    assert folders() == {"checkpoint_1_2", "checkpoint_1_4", "checkpoint_1_5", "checkpoint_1_7"}
    run("a", "--max-update=8", "--save-interval-updates=2", "--keep-interval-updates=2")
    assert folders() == {"checkpoint_1_7", "checkpoint_1_8"}
    assert (tmp_path / "a" / checkpoint.LAST).readlink().name == "checkpoint_1_8"


def test_a_diverged_run_keeps_its_last_good_checkpoint(run: Any, tmp_path: Path) -> None:
    run("a", "--max-update=2")
    with pytest.raises(InputError, match="is not finite"):
        run("a", "--max-update=9", "--lr=1e38", "--validate-interval-updates=1")
    assert all(torch.isfinite(weight).all() for weight in last_weights(tmp_path / "a").values())


def test_a_folder_that_is_gone_is_not_made_again_by_a_save(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a mount, a checkpoint would be hidden when the run's folder is back."""
    step, begin = Engine.step, checkpoint.Saver.begin

    def begin_and_finish(self: checkpoint.Saver, *arguments: Any) -> None:
        begin(self, *arguments)
        self.finish()

    def lost(self: Engine, lr: float) -> None:
        step(self, lr)
        if (tmp_path / "a" / "checkpoint_last").exists():
            (tmp_path / "a").rename(tmp_path / "away")
            (tmp_path / "a").mkdir()

    monkeypatch.setattr(Engine, "step", lost)
    monkeypatch.setattr(checkpoint.Saver, "begin", begin_and_finish)
    with pytest.raises(InputError, match=r"a: is gone \(unmounted, moved or removed\)"):
        run("a", "--max-update=4", "--save-interval-updates=2")
    assert not any((tmp_path / "a").glob("*checkpoint*"))
    assert last_weights(tmp_path / "away")


def test_a_name_that_is_a_folder_is_refused(run: Any, tmp_path: Path) -> None:
    """cp -rL follows the links; a save could not move them."""
    run("a", "--max-update=1")
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=False)
    with pytest.raises(InputError, match="is a folder, where a run has a link"):
        run("b", "--max-update=2")


@pytest.mark.parametrize("mode", ["complete", "complete_doc"])
def test_whole_lines_are_trained_on(run: Any, caplog: pytest.LogCaptureFixture, mode: str) -> None:
    """Rows of all lengths, in one shape; what is cut and what the tables take is said."""
    flags = [f"--sample-break-mode={mode}", "--validate-interval-updates=2"]
    with caplog.at_level("INFO", logger="xlm_ds"):
        whole = run("whole", *flags, "--max-update=4")
    assert re.search(r"\d+ lines are longer than 31 tokens and are cut", caplog.text)
    assert f"the tables of break mode {mode} take 0.0 MiB in each process" in caplog.text
    assert all(math.isfinite(loss) for loss in whole.values())
    run("parts", *flags, "--max-update=2")
    assert run("parts", *flags, "--max-update=4") == whole
    assert run("other", "--max-update=4") != whole


def test_changed_data_are_said(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    run("a", "--max-update=1")
    with caplog.at_level("INFO", logger="xlm_ds"):
        run("a", "--max-update=2", "--update-freq=2", "--sampling-alpha=0")
    assert "batch_samples was 4 and is now 8" in caplog.text
    assert "sampling_alpha was 0.7 and is now 0.0" in caplog.text


def test_another_dictionary_is_refused(run: Any, tmp_path: Path) -> None:
    run("a", "--max-update=1")
    manifest_path = tmp_path / "a" / checkpoint.LAST / "manifest.json"
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    manifest["dictionary_sha256"] = "0" * 64
    manifest["manifest_sha256"] = checkpoint._manifest_sha256(manifest)
    manifest_path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(InputError, match="its dictionary is not the one"):
        run("a", "--max-update=2")


def test_another_architecture_is_refused(run: Any) -> None:
    run("a", "--max-update=1")
    with pytest.raises(InputError, match="another architecture"):
        run("a", "--max-update=2", "--encoder-embed-dim=64")


def test_other_languages_are_refused(run: Any) -> None:
    run("a", "--max-update=1")
    with pytest.raises(InputError, match="the order gives the language ids"):
        run("a", "--max-update=2", "--monolingual-langs=en,ar,hi")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--tokens-per-sample=256"], "--max-tokens 128 is below --tokens-per-sample 256"),
        (["--max-positions=16"], "beyond the position table"),
        (["--num-segment=2"], "smaller than the number of languages"),
        (["--monolingual-langs=ar,xx"], "xx"),
        (["--monolingual-langs=ar,ar"], "named twice"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(run: Any, flags: list[str], expected: str) -> None:
    with pytest.raises((InputError, OSError)) as caught:
        run("a", "--max-update=1", *flags)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    config = parse(TrainConfig, [str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="no such folder"):
        open_corpus(config.data)


# ------------------------------------------------------------------------------- what the user sees


def test_the_parts_of_the_time_add_up_to_all_of_it(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin = time.perf_counter()
    with caplog.at_level("INFO", logger="xlm_ds"):
        run("a", "--max-update=4", "--log-interval=2", "--validate-interval-updates=2")
    whole = time.perf_counter() - begin
    first, second = (r for r in records_in(tmp_path / "a") if r["kind"] == "train")
    for part in ("data", "forward_backward", "optimizer"):
        assert first["seconds"][part] > 0
    assert first["seconds"]["validation"] == first["seconds"]["checkpoint"] == 0
    assert second["seconds"]["validation"] > 0, "it followed the first line"
    assert second["seconds"]["checkpoint"] > 0
    assert "no MFU, as the peak of a CPU is not known" in caplog.text
    (total,) = re.findall(r"([\d.]+) seconds: data", caplog.text)
    logged = sum(first["seconds"].values()) + sum(second["seconds"].values())
    assert logged < float(total) + 0.05 < whole + 0.1
    assert first["tflops"] > 0


def test_both_losses_are_compared_with_the_unigram_level(run: Any, tmp_path: Path) -> None:
    """A model that is the unigram mixture is above it, as it does not know a row's language."""
    flags = ["--max-update=2", "--log-interval=2", "--lr=1e-30"]
    run("mixture", *flags)
    run("uniform", *flags, "--init-output-bias=zeros")
    for kind in (0, 1):
        mixture = records_in(tmp_path / "mixture")[kind]["below_unigram"]
        uniform = records_in(tmp_path / "uniform")[kind]["below_unigram"]
        assert uniform < mixture < 20


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes when the host looks at what is in a tensor, as it could not on CUDA without waiting for the device."""

    OPS = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "is_nonzero",
        "equal",
        "masked_select",
        "_unique2",
    )

    def __init__(self, updates: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._updates = updates  # begun so far
        self.seen: list[tuple[int, str]] = []

    def note(self, name: str) -> None:
        self.seen.append((len(self._updates), name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.OPS or by_mask:
            self.note(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("stage", "clip_norm"), [(1, 1.0), (2, 0.0)])
def test_a_steady_update_never_looks_at_a_tensor(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, clip_norm: float
) -> None:
    """Of all updates, only those that are logged do. (DeepSpeed itself does in each: stage 3, and stage 2 to clip.)"""
    template = json.loads((CONFIG_DIRECTORY / "zero1_bf16.json").read_text(encoding="utf-8"))
    template["zero_optimization"]["stage"] = stage
    (tmp_path / "ds.json").write_text(json.dumps(template), encoding="utf-8")
    begun: list[int] = []
    reads = HostReads(begun)

    def beginning(update: int, *arguments: Any) -> float:
        begun.append(update)
        return lr_at(update, *arguments)

    monkeypatch.setattr(train, "lr_at", beginning)
    for name in ("cpu", "item", "tolist"):  # of which nothing is dispatched on a CPU
        monkeypatch.setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name), name, reads))
    monkeypatch.setattr(xlm_ds.run, "validate", lambda *_: torch.ones(4, 3))
    with reads:
        run(
            "a",
            "--max-update=9",
            "--log-interval=3",
            "--update-freq=2",
            f"--clip-norm={clip_norm}",
            f"--deepspeed_config={tmp_path / 'ds.json'}",
        )
    assert {update for update, _ in reads.seen if update > 0} == {3, 6, 9}, reads.seen


def noting(method: Any, name: str, reads: HostReads) -> Any:
    def call(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        reads.note(name)
        return method(self, *arguments, **options)

    return call


def test_a_trace_is_written_and_named(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="xlm_ds"):
        run("a", "--max-update=8", "--profile=2")
        run("b", "--max-update=4", "--profile=2")
        run("c", "--max-update=6", "--profile=100")
    trace = json.loads((tmp_path / "a" / "trace.json").read_text(encoding="utf-8"))
    steps = {e["name"] for e in trace["traceEvents"] if "ProfilerStep" in str(e.get("name"))}
    assert len(steps) == 2
    assert any("addmm" in str(e.get("name")) for e in trace["traceEvents"])
    assert f"wrote {tmp_path / 'a' / 'trace.json'}" in caplog.text
    assert "ui.perfetto.dev" in caplog.text
    assert caplog.text.count("no trace: there were no updates after the first 4") == 1
    assert not (tmp_path / "b" / "trace.json").exists()
    assert "a trace of 2 updates" in caplog.text.split(f"wrote {tmp_path / 'c'}")[1]
    (tmp_path / "d" / "trace.json").mkdir(parents=True)
    with pytest.raises(InputError, match="is a folder"):
        run("d", "--max-update=8", "--profile=2")


def test_a_full_disk_under_the_figures_ends_no_run(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setitem(globals(), "losses_in", lambda _: {})  # there are none
    with caplog.at_level("WARNING", logger="xlm_ds"):
        run("a", "--max-update=3", "--log-interval=1")
    assert caplog.text.count("No space left on device; going on without") == 1
    assert (tmp_path / "a" / "checkpoint_last").exists()


WANDB = """
calls = []
def init(**settings): calls.append({"step": 0, **settings})  # a new run
def log(figures, step, commit=None):
    assert step >= calls[-1]["step"], "wandb drops a step that is lower"
    calls.append({"step": step, **figures})
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of that name which remembers its calls, and a DeepSpeed JSON that enables it."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    template = json.loads((CONFIG_DIRECTORY / "zero1_fp32.json").read_text(encoding="utf-8"))
    template["wandb"] = {"enabled": True, "project": "xlm"}
    template["csv_monitor"] = {"enabled": True}
    (tmp_path / "wandb.json").write_text(json.dumps(template), encoding="utf-8")
    yield tmp_path / "wandb.json"
    sys.modules.pop("wandb", None)


def test_deepspeeds_monitors_get_all_figures(run: Any, tmp_path: Path, wandb: Path) -> None:
    run("a", "--max-update=2", f"--deepspeed_config={wandb}")
    run("a", "--max-update=3", f"--deepspeed_config={wandb}")  # goes on
    calls = sys.modules["wandb"].calls
    assert calls[0] == {"step": 0, "project": "xlm", "group": None, "entity": None}
    by_name = [(name, call["step"]) for call in calls for name in call]
    for name in ("train/loss", "Train/Samples/lr"):
        assert [step for n, step in by_name if n == name] == [4, 8, 12]
    for name in ("train/seconds/data", "train/below_unigram", "valid/loss_per_language/ar"):
        assert (name, 12) in by_name
    assert [step for n, step in by_name if n == "valid/perplexity"] == [8, 12]
    losses = (
        (tmp_path / "a" / "monitors" / "csv_monitor" / "train_loss.csv")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    assert float(losses[1].split(",")[1]) == losses_in(tmp_path / "a")[1]


# ------------------------------------------------------------------------------- pure decisions


@pytest.mark.parametrize(
    ("flags", "world", "expected"),
    [
        ({"max_tokens": 2048}, 1, Geometry(8, 1, 1)),
        ({"max_tokens": 2048, "update_freq": 4}, 2, Geometry(8, 4, 2)),
        ({"max_tokens": 2048, "global_batch_tokens": 65536}, 2, Geometry(8, 16, 2)),
        ({"max_tokens": 2048, "global_batch_tokens": 10 * 256}, 1, Geometry(5, 2, 1)),
        ({"max_tokens": 4096, "global_batch_tokens": 1024}, 1, Geometry(4, 1, 1)),
    ],
)
def test_geometry(flags: dict[str, Any], world: int, expected: Geometry) -> None:
    assert batch_geometry(OptimizationConfig(**flags), 256, world) == expected


@pytest.mark.parametrize(
    ("batch", "rows", "world", "expected"),
    [
        (32, 8, 1, Geometry(8, 4, 1)),
        (32, 8, 4, Geometry(8, 1, 4)),
        (32, 8, 8, Geometry(4, 1, 8)),
        (24, 8, 2, Geometry(6, 2, 2)),
        (14, 8, 2, Geometry(7, 1, 2)),
        (26, 8, 2, Geometry(1, 13, 2)),
    ],
)
def test_a_batch_is_kept_by_other_numbers_of_ranks(
    batch: int, rows: int, world: int, expected: Geometry
) -> None:
    assert divided(batch, rows, world) == expected
    assert expected.batch == batch


def test_a_batch_that_ranks_cannot_share_names_those_that_can() -> None:
    with pytest.raises(InputError, match=r"32 samples .* 3 ranks .* with 1, 2, 4, 8, 16, 32 ranks"):
        divided(32, 8, 3)


def test_the_batch_stays_unless_a_flag_changes_it(
    run: Any, tiny_data: Path, tmp_path: Path
) -> None:
    run("a", "--max-update=1", "--update-freq=3")
    saved = (folder := tmp_path / "a" / checkpoint.LAST), checkpoint.read_manifest(folder)

    def geometry(world: int, *flags: str) -> Geometry:
        config = parse(TrainConfig, [str(tiny_data), *SHAPE, *flags])
        return run_geometry(config, saved, world)

    assert geometry(1, "--update-freq=3") == Geometry(4, 3, 1)
    assert geometry(2, "--update-freq=3") == Geometry(3, 2, 2)
    assert geometry(3, "--update-freq=3") == Geometry(4, 1, 3)
    assert geometry(2, "--update-freq=2") == Geometry(4, 2, 2)
    with pytest.raises(InputError, match="5 ranks cannot share evenly"):
        geometry(5, "--update-freq=3")


@pytest.mark.parametrize("tokens", [1000, 256, 768])
def test_a_batch_that_cannot_be_divided_names_one_that_can(tokens: int) -> None:
    with pytest.raises(InputError, match=r"nearest that can is \d+") as caught:
        batch_geometry(OptimizationConfig(global_batch_tokens=tokens), 256, 2)
    nearest = int(str(caught.value).rsplit(" ", 1)[1])
    batch_geometry(OptimizationConfig(global_batch_tokens=nearest), 256, 2)


def due(update: int, before: int, after: int, **flags: Any) -> train.Due:
    run = dataclasses.replace(RunConfig(), **flags)
    return what_is_due(run, update, before, after, last=False, stopping=False)


def test_epoch_end_validates_and_saves() -> None:
    nothing = train.Due(log=False, validate=False, retrieve=False, save=False, epoch_name=False)
    assert due(7, 0, 1) == nothing._replace(log=True, validate=True, save=True, epoch_name=True)
    assert due(7, 0, 1, no_epoch_checkpoints=True).epoch_name is False
    assert due(7, 0, 0) == nothing


def test_intervals() -> None:
    assert due(100, 0, 0).log
    assert due(50, 0, 0, validate_interval_updates=25).validate
    assert due(50, 0, 0, save_interval_updates=25).save
    assert not due(50, 0, 1, save_interval=2, validate_interval=2).save
    assert due(50, 1, 2, save_interval=2, validate_interval=2).save


def test_an_update_that_crosses_several_epochs_is_an_epochs_end() -> None:
    assert due(50, 1, 3, save_interval=2, validate_interval=2).validate


def test_a_stop_saves() -> None:
    decided = what_is_due(RunConfig(), 3, 0, 0, last=False, stopping=True)
    assert (decided.save, decided.validate) == (True, False)


def test_dropout_seeds_differ_wherever_the_run_is() -> None:
    draws = set()
    for place in ((0, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1), (1, 1, 0, 0)):
        xlm_ds.run.seed_dropout(*place)
        draws.add(float(torch.rand(1)))
    assert len(draws) == 5
    xlm_ds.run.seed_dropout(0, 1, 0, 0)
    assert float(torch.rand(1)) in draws
