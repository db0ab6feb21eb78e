"""A checkpoint is whole or absent, each damage is named, and nothing is deleted that something keeps."""

import json
from pathlib import Path

import pytest
import torch

from test_engine import engine_losses, settings_of, small_model
from xlm_ds import checkpoint
from xlm_ds.checkpoint import Progress
from xlm_ds.engine import Engine, Ranks
from xlm_ds.log import InputError


@pytest.fixture(scope="module")
def engine(ranks: Ranks) -> Engine:
    engine = Engine(small_model(), settings_of("zero1_fp32", 1), ranks)
    engine_losses(engine, range(2))
    return engine


@pytest.fixture
def saved(tmp_path: Path, engine: Engine) -> Path:
    folder = tmp_path / "checkpoint_1_2"
    progress = Progress(update=2, samples=8, plateau={"shrinks": 1})
    checkpoint.save_checkpoint(folder, engine, progress, {"languages": ["en"]})
    return folder


def test_round_trip(saved: Path, engine: Engine) -> None:
    manifest = checkpoint.read_manifest(saved)
    progress = checkpoint.read_progress(manifest)
    assert (progress.update, progress.samples, progress.plateau) == (2, 8, {"shrinks": 1})
    loaded = checkpoint.load_state(saved, manifest)
    for name, state in engine.state():
        for kind, tensor in state.items():
            assert torch.equal(loaded[name][kind], tensor), (name, kind)


def test_nothing_is_pickled(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert names == {
        "weight.safetensors",
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
        "manifest.json",
    }


def test_a_flipped_bit_is_named(saved: Path) -> None:
    path = saved / "exp_avg.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"exp_avg\.safetensors: its SHA-256"):
        checkpoint.load_state(saved, checkpoint.read_manifest(saved))


def test_a_missing_file_is_named(saved: Path) -> None:
    (saved / "weight.safetensors").unlink()
    with pytest.raises(InputError, match=r"weight\.safetensors: missing"):
        checkpoint.load_weights(small_model(), saved, checkpoint.read_manifest(saved))


def test_a_damaged_manifest_is_named(saved: Path) -> None:
    (saved / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        checkpoint.read_manifest(saved)


def test_a_later_format_is_refused(saved: Path) -> None:
    (saved / "manifest.json").write_text(json.dumps({"format": 99}), encoding="utf-8")
    with pytest.raises(InputError, match="format 99"):
        checkpoint.read_manifest(saved)


def test_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a checkpoint"):
        checkpoint.read_manifest(tmp_path)
    with pytest.raises(InputError, match="not found"):
        checkpoint.read_manifest(tmp_path / "absent")


def test_another_architecture_is_refused(saved: Path) -> None:
    model = torch.nn.Linear(3, 3)
    with pytest.raises(InputError, match="another architecture"):
        checkpoint.load_weights(model, saved, checkpoint.read_manifest(saved))


def test_a_failed_save_leaves_nothing(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device", "weight.safetensors")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_checkpoint(tmp_path / "checkpoint_1_2", engine, Progress(update=2), {})
    assert list(tmp_path.iterdir()) == []


def test_saving_the_same_update_again_replaces_it(saved: Path, engine: Engine) -> None:
    """A run that goes on from an older checkpoint with other flags comes by the same updates."""
    checkpoint.save_checkpoint(saved, engine, Progress(update=2, samples=99), {})
    assert checkpoint.read_progress(checkpoint.read_manifest(saved)).samples == 99
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_save_killed_while_replacing_loses_nothing(saved: Path, engine: Engine) -> None:
    del engine
    saved.rename(saved.with_name(f".{saved.name}.old"))
    (saved.parent / ".checkpoint_1_4.tmp").mkdir()
    checkpoint.discard_leftovers(saved.parent)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    checkpoint.load_state(saved, checkpoint.read_manifest(saved))


def make_folders(save_dir: Path, *updates: int) -> None:
    for update in updates:
        (save_dir / f"checkpoint_1_{update}").mkdir()


def test_names_move_and_the_unnamed_go(tmp_path: Path) -> None:
    make_folders(tmp_path, 10, 20, 30)
    for update in (10, 20, 30):
        folder = tmp_path / f"checkpoint_1_{update}"
        checkpoint.point(tmp_path / checkpoint.LAST, folder)
    checkpoint.point(tmp_path / checkpoint.BEST, tmp_path / "checkpoint_1_10")
    checkpoint.prune(tmp_path, keep_last_epochs=-1, keep_update=lambda _: False)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint_1_10", "checkpoint_1_30", checkpoint.LAST, checkpoint.BEST}
    assert (tmp_path / checkpoint.LAST).resolve().name == "checkpoint_1_30"


def test_keep_last_epochs_and_intervals(tmp_path: Path) -> None:
    make_folders(tmp_path, 10, 20, 30, 40)
    for epoch, update in ((1, 10), (2, 20), (3, 30)):
        checkpoint.point(tmp_path / f"checkpoint{epoch}", tmp_path / f"checkpoint_1_{update}")
    checkpoint.prune(tmp_path, keep_last_epochs=1, keep_update=lambda update: update == 40)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint3", "checkpoint_1_30", "checkpoint_1_40"}


def test_restore_file(tmp_path: Path) -> None:
    assert checkpoint.find_checkpoint(tmp_path, checkpoint.LAST) is None
    make_folders(tmp_path, 10)
    assert checkpoint.find_checkpoint(tmp_path, "checkpoint_1_10") == tmp_path / "checkpoint_1_10"
    with pytest.raises(InputError, match="--restore-file nowhere"):
        checkpoint.find_checkpoint(tmp_path, "nowhere")
