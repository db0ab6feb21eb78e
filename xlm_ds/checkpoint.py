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
from xlm_ds.engine import MOMENTS, Engine
from xlm_ds.files import file_sha256, sync_file
from xlm_ds.log import InputError

FORMAT = 1
TENSORS = ("weight", *MOMENTS)
LAST, BEST = "checkpoint_last", "checkpoint_best"
_FOLDER = re.compile(r"checkpoint_(\d+)_(\d+)")
_EPOCH_NAME = re.compile(r"checkpoint(\d+)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands. With seed and data it decides everything that comes after."""

    update: int = 0
    samples: int = 0
    best_valid_loss: float | None = None  # bits
    plateau: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # schedule.PlateauState
    seconds: float = 0.0


# ------------------------------------------------------------------------------------------ write


def save_checkpoint(
    folder: Path,
    engine: Engine,
    progress: Progress,
    description: Mapping[str, Any],
    companions: Iterable[Path] = (),
) -> None:
    """Writes `folder`, in place of one that may be there; all ranks must call it, rank 0 writes.

    `description` goes into the manifest; `companions` are files copied into the folder (dictionary, codes).
    """
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in TENSORS}
    for name, state in engine.state():
        if engine.ranks.rank == 0:
            for kind in TENSORS:
                tensors[kind][name] = state[kind].contiguous()
    if engine.ranks.rank == 0:
        _write_folder(folder, tensors, progress, description, companions)
    engine.ranks.wait()


def _write_folder(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    progress: Progress,
    description: Mapping[str, Any],
    companions: Iterable[Path],
) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for kind in TENSORS:
            save_file(dict(tensors[kind]), temporary / f"{kind}.safetensors")
        for path in companions:
            shutil.copyfile(path, temporary / path.name)
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


def prune(save_dir: Path, *, keep_last_epochs: int, keep_update: Callable[[int], bool]) -> None:
    """Deletes checkpoints that nothing keeps: neither a name nor `keep_update` of their update.

    `keep_last_epochs`: how many names checkpointN stay (-1: all). A damaged name is left alone.
    """
    epochs = sorted(int(m[1]) for p in save_dir.iterdir() if (m := _EPOCH_NAME.fullmatch(p.name)))
    for epoch in epochs[: max(len(epochs) - keep_last_epochs, 0)] if keep_last_epochs >= 0 else []:
        (save_dir / f"checkpoint{epoch}").unlink()
    named = {p.readlink().name for p in save_dir.glob("checkpoint*") if p.is_symlink()}
    for path in save_dir.iterdir():
        match = _FOLDER.fullmatch(path.name)
        if match and path.name not in named and not keep_update(int(match[2])):
            # Renamed first: a folder that is being deleted must never look like a checkpoint.
            doomed = path.rename(path.with_name(f".{path.name}.deleted"))
            shutil.rmtree(doomed)


# ------------------------------------------------------------------------------------------- read


def find_checkpoint(save_dir: Path, restore_file: str) -> Path | None:
    """What --restore-file means: a name in `save_dir`, or a path. None if it is the default and absent."""
    for candidate in (save_dir / restore_file, Path(restore_file)):
        if candidate.exists():
            return candidate.resolve()
    if restore_file == LAST:
        return None
    raise InputError(f"--restore-file {restore_file}: neither in {save_dir} nor a path that exists")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises InputError if `folder` is not one, or is of a later format."""
    path = folder / "manifest.json"
    if not path.exists():
        what = "has no manifest.json, so it is not a checkpoint" if folder.exists() else "not found"
        raise InputError(f"{folder}: {what}; give a folder such as SAVE_DIR/checkpoint_last")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged: {error}") from error
    if found != FORMAT:
        raise InputError(f"{path}: checkpoint format {found}; this version reads {FORMAT}")
    return dict(manifest)


def read_progress(manifest: Mapping[str, Any]) -> Progress:
    return Progress(**manifest["progress"])


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
    weights = load_tensors(folder, manifest, "weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found = weights.pop(name, None)
            if found is None or found.shape != parameter.shape:
                shape = "no such tensor" if found is None else f"shape {tuple(found.shape)}"
                raise InputError(
                    f"{folder}: another architecture: {name} has shape {tuple(parameter.shape)} here and "
                    f"{shape} in the checkpoint; give the flags it was trained with (manifest.json lists them)"
                )
            parameter.copy_(found)
    if weights:
        raise InputError(
            f"{folder}: another architecture: it has {next(iter(weights))}, unknown here"
        )


def load_state(folder: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """name -> {"weight", "exp_avg", "exp_avg_sq"}, for Engine.load_state."""
    kinds = {kind: load_tensors(folder, manifest, kind) for kind in TENSORS}
    return {name: {kind: kinds[kind][name] for kind in TENSORS} for name in kinds["weight"]}


def discard_leftovers(save_dir: Path) -> None:
    """Removes what killed saves left under temporary names, and puts back what one had moved aside."""
    for folder in (p.with_name(p.name[1:].removesuffix(".old")) for p in save_dir.glob(".*.old")):
        if not folder.exists():
            _aside(folder).rename(folder)
    for path in save_dir.glob(".checkpoint*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)
