"""Checkpoints: a folder that any ZeRO stage and any number of ranks can continue from.

    SAVE_DIR/checkpoint_2_300/            epoch 2, update 300
        weight.safetensors  exp_avg.safetensors  exp_avg_sq.safetensors     fp32, whole parameters
        manifest.json       progress, configuration, languages, SHA-256 of the files
        dict.txt  codes …   what text needs to become ids
    SAVE_DIR/checkpoint_last -> checkpoint_2_300      names are links, moved atomically
    SAVE_DIR/checkpoint_best -> checkpoint_1_150

A folder is written under a temporary name, synced and renamed, so that a killed save leaves no half checkpoint.
Nothing is pickled.
"""

import dataclasses
import json
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from xlm_ds import __version__
from xlm_ds.config import TrainConfig
from xlm_ds.engine import MOMENTS, Engine
from xlm_ds.files import file_sha256, sync_file
from xlm_ds.flags import from_dict
from xlm_ds.log import InputError
from xlm_ds.schedule import PlateauState

FORMAT = 1
TENSORS = ("weight", *MOMENTS)
REQUIRED = (
    *("configuration", "languages", "dictionary_sha256", "blocks", "batch_samples"),
    *("progress", "environment", "sha256"),
)
LAST, BEST = "checkpoint_last", "checkpoint_best"
_FOLDER = re.compile(r"checkpoint_(\d+)_(\d+)")
_EPOCH_NAME = re.compile(r"checkpoint(\d+)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands. With seed and data it decides everything that comes after."""

    update: int = 0
    samples: int = 0
    best_valid_loss: float | None = None  # bits
    plateau: PlateauState = dataclasses.field(default_factory=PlateauState)
    validation_due: bool = False  # the run was stopped before a validation that was its turn
    seconds: float = 0.0
    skipped_updates: int = 0  # of all updates, those whose gradient was not finite
    batch_at_start: int = 0  # samples of an update when the run began (0: not recorded)


# ------------------------------------------------------------------------------------------ write


def save_checkpoint(
    folder: Path,
    engine: Engine,
    progress: Progress,
    description: Mapping[str, Any],
    companions: Mapping[str, bytes] | None = None,
) -> None:
    """Writes `folder`, in place of one that may be there; all ranks must call it, rank 0 writes.

    `description` goes into the manifest; `companions` are more files of the folder (dictionary, codes).
    Raises InputError, on all ranks and before anything is written, if a weight is not finite.
    """
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in TENSORS}
    for name, state in engine.state():
        if not bool(torch.isfinite(state["weight"]).all()):
            raise InputError(
                f"{name} is not finite, so nothing was saved; lower --lr or set --clip-norm and start again: "
                f"the run goes on from the last checkpoint in {folder.parent}"
            )
        if engine.ranks.rank == 0:
            for kind in TENSORS:
                tensors[kind][name] = state[kind].cpu().clone()
    engine.ranks.on_first(
        lambda: _write_folder(folder, tensors, progress, description, companions or {})
    )


def _write_folder(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    progress: Progress,
    description: Mapping[str, Any],
    companions: Mapping[str, bytes],
) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for kind in TENSORS:
            _save_tensors(tensors[kind], temporary / f"{kind}.safetensors")
        for name, content in companions.items():
            (temporary / name).write_bytes(content)
        manifest = {
            "format": FORMAT,
            **description,
            "progress": dataclasses.asdict(progress),
            "environment": environment(),
            "sha256": {path.name: file_sha256(path) for path in sorted(temporary.iterdir())},
        }
        (temporary / "manifest.json").write_text(
            json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        for path in temporary.iterdir():
            sync_file(path)
        sync_file(temporary)
        _put_in_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # a full disk, above all
        raise OSError(
            f"{path}: not written ({error}); make room and start again: the last checkpoint is whole"
        ) from error


def _put_in_place(temporary: Path, folder: Path) -> None:
    """A folder cannot be replaced by rename: an old one steps aside, where `discard_leftovers` finds it again."""
    aside = _aside(folder)
    if folder.exists():
        folder.rename(aside)
    temporary.rename(folder)
    sync_file(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def environment() -> dict[str, str]:
    """Versions of what computed the run."""
    return {
        "xlm_ds": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


# ------------------------------------------------------------------------------------------ names


def folder_name(epoch: int, update: int) -> str:
    return f"checkpoint_{epoch}_{update}"


def point(name: Path, folder: Path) -> None:
    """Makes `name` a link to `folder` (in the same directory), atomically."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    temporary.replace(name)


def name_checkpoint(
    folder: Path, names: Iterable[str], *, keep_last_epochs: int, keep_update: Callable[[int], bool]
) -> None:
    """Gives a saved folder its names, and deletes those that lost their last name by it.

    keep_last_epochs: how many names checkpointN stay (-1: all). A folder that --save-interval-updates wrote, which its
    manifest says, is deleted only if `keep_update` does not keep its update.
    """
    save_dir = folder.parent
    before = _named(save_dir)
    for name in names:
        point(save_dir / name, folder)
    epochs = sorted(int(m[1]) for p in save_dir.iterdir() if (m := _EPOCH_NAME.fullmatch(p.name)))
    for epoch in epochs[: max(len(epochs) - keep_last_epochs, 0)] if keep_last_epochs >= 0 else []:
        (save_dir / f"checkpoint{epoch}").unlink()
    named = _named(save_dir)
    for update, path in _folders(save_dir):
        if path.name in named:
            continue
        try:
            interval_save = read_manifest(path).get("interval_save", False)
        except InputError:
            continue  # damaged, or not ours: not for us to delete, and no reason to end a run
        if not keep_update(update) if interval_save else path.name in before:
            # Renamed first: a folder that is being deleted must never look like a checkpoint.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.deleted")))


def _folders(save_dir: Path) -> list[tuple[int, Path]]:
    """(update, folder) of everything that is named as a checkpoint, the earliest first."""
    matches = ((_FOLDER.fullmatch(path.name), path) for path in save_dir.iterdir())
    return sorted((int(match[2]), path) for match, path in matches if match)


def _named(save_dir: Path) -> set[str]:
    return {p.readlink().name for p in save_dir.glob("checkpoint*") if p.is_symlink()}


# ------------------------------------------------------------------------------------------- read


def find_checkpoint(save_dir: Path, restore_file: str) -> Path | None:
    """What --restore-file means: a name in `save_dir`, or a path. None if it is the default and the run is new."""
    if (save_dir / restore_file).exists():
        return (save_dir / restore_file).resolve()
    if restore_file != LAST:
        if restore_file and Path(restore_file).exists():
            return Path(restore_file).resolve()
        raise InputError(
            f"--restore-file {restore_file}: neither in {save_dir} nor a path that exists"
        )
    there = _folders(save_dir) if save_dir.is_dir() else []
    if there:
        latest = there[-1][1].name
        raise InputError(
            f"{save_dir}: holds {', '.join(path.name for _, path in there)} but no {LAST}; go on with "
            f"--restore-file {latest}, or give another --save-dir"
        )
    if (save_dir / LAST).is_symlink():
        raise InputError(
            f"{save_dir / LAST}: points at {(save_dir / LAST).readlink()}, which is gone; bring it back, or give "
            "another --save-dir"
        )
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises InputError if `folder` is not one, or is of a later format."""
    path = folder / "manifest.json"
    if not path.exists():
        what = "has no manifest.json, so it is not a checkpoint" if folder.exists() else "not found"
        raise InputError(f"{folder}: {what}; give a folder such as SAVE_DIR/checkpoint_last")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else "none"
        raise InputError(f"{path}: checkpoint format {found}; this version reads {FORMAT}")
    missing = [key for key in REQUIRED if key not in manifest]
    if missing:
        raise InputError(f"{path}: damaged: {missing[0]} is missing")
    return manifest


def read_progress(manifest: Mapping[str, Any]) -> Progress:
    plateau = PlateauState(**manifest["progress"]["plateau"])
    return Progress(**{**manifest["progress"], "plateau": plateau})


def read_configuration(folder: Path, manifest: Mapping[str, Any]) -> TrainConfig:
    """What the checkpoint was trained with. Raises InputError if a later version wrote it."""
    try:
        return from_dict(TrainConfig, manifest["configuration"])
    except InputError as error:
        raise InputError(
            f"{folder}: written by another version of xlm_ds ({manifest['environment'].get('xlm_ds')}): {error}"
        ) from error


def load_tensors(folder: Path, manifest: Mapping[str, Any], kind: str) -> dict[str, Tensor]:
    """One of TENSORS, whole, fp32, on the CPU; checked against the manifest's SHA-256."""
    path = folder / f"{kind}.safetensors"
    if not path.exists():
        raise InputError(f"{path}: missing; the checkpoint is damaged, use another")
    if file_sha256(path) != manifest["sha256"][path.name]:
        raise InputError(
            f"{path}: its SHA-256 is not the one in manifest.json; the checkpoint is damaged, use another"
        )
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise InputError(f"{path}: damaged: {error}") from error


def load_weights(model: torch.nn.Module, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Copies a checkpoint's weights into `model`. Raises InputError if it is of another architecture."""
    copy_weights(model, load_tensors(folder, manifest, "weight"), folder)


def copy_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Copies the weights that were read from `folder` into `model`; raises as load_weights."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            found = weights.get(name)
            if found is None or found.shape != parameter.shape:
                shape = "no such tensor" if found is None else f"shape {tuple(found.shape)}"
                raise InputError(
                    f"{folder}: another architecture: {name} has shape {tuple(parameter.shape)} here and "
                    f"{shape} in the checkpoint; give the flags it was trained with (manifest.json lists them)"
                )
            parameter.copy_(found)
    unknown = next((name for name in weights if name not in parameters), None)
    if unknown is not None:
        raise InputError(f"{folder}: another architecture: it has {unknown}, unknown here")


def load_state(folder: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """name -> {"weight", "exp_avg", "exp_avg_sq"}, for Engine.load_state."""
    kinds = {kind: load_tensors(folder, manifest, kind) for kind in TENSORS}
    return {name: {kind: kinds[kind][name] for kind in TENSORS} for name in kinds["weight"]}


def discard_leftovers(save_dir: Path) -> None:
    """Removes what killed saves left under temporary names, and puts back what one had moved aside."""
    for folder in (
        p.with_name(p.name[1:].removesuffix(".old")) for p in save_dir.glob(".checkpoint_*.old")
    ):
        if not folder.exists():
            _aside(folder).rename(folder)
    for path in save_dir.glob(".checkpoint*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)
