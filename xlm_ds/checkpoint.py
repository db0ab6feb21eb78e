"""Checkpoints: a folder that any ZeRO stage and any number of ranks can continue from.

    SAVE_DIR/checkpoint_2_300/            epoch 2, update 300
        weight.safetensors  exp_avg.safetensors  exp_avg_sq.safetensors     fp32, whole parameters
                            (of N ranks: weight-00001-of-0000N.safetensors …, each parameter in one of them)
        manifest.json       progress, configuration, languages, SHA-256 of the files and of itself
        dict.txt  codes …   what text needs to become ids
    SAVE_DIR/checkpoint_last -> checkpoint_2_300      names are links, moved atomically
    SAVE_DIR/checkpoint_previous -> checkpoint_2_200  the one before it, should that be damaged
    SAVE_DIR/checkpoint_best -> checkpoint_1_150

A folder is written under a temporary name, synced and renamed, so that a killed save leaves no half checkpoint.
Nothing is pickled.
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xlm_ds import __version__
from xlm_ds.config import TrainConfig
from xlm_ds.engine import MOMENTS, Engine, Ranks
from xlm_ds.files import file_sha256, load_json_object, naming, sync_file
from xlm_ds.flags import from_dict
from xlm_ds.log import InputError, logger, sentence_of
from xlm_ds.schedule import PlateauState

FORMAT = 1
TENSORS = ("weight", *MOMENTS)
REQUIRED = (
    *("configuration", "languages", "dictionary_sha256", "blocks", "batch_samples"),
    *("progress", "environment", "sha256", "manifest_sha256"),
)
LAST, PREVIOUS, BEST = "checkpoint_last", "checkpoint_previous", "checkpoint_best"
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
    retrieval_due: bool = False  # so too
    seconds: float = 0.0
    skipped_updates: int = 0  # of all updates, those whose gradient was not finite
    batch_at_start: int = 0  # samples of an update when the run began (0: not recorded)
    chains: str = ""  # of digests.py, which continue ("": not recorded)
    best_accuracy: float | None = None  # of finetune, percent
    bad_validations: int = 0  # of finetune, in a row since the best


# ------------------------------------------------------------------------------------------ write


class Saver:
    """Writes checkpoints while training goes on: each rank its share of the parameters, on a thread of its own.

        saver.begin(folder, engine, progress, description, companions, after)   # training waits for the copy
        …                                                                       # and goes on
        saver.finish()                                                          # when no rank is writing any more

    All ranks must call both. Only one save is under way: `begin` waits for the last one.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._save: _Save | None = None  # that is under way
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def is_writing(self) -> bool:
        """Whether this rank's files are not all on the disk yet."""
        return self._save is not None and not self._save.written.done()

    def begin(
        self,
        folder: Path,
        engine: Engine,
        progress: Progress,
        description: Mapping[str, Any],
        companions: Mapping[str, bytes] | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Copies the state of a run that is to be in `folder`, in place of one that may be there.

        `description` goes into the manifest; `companions` are more files of the folder (dictionary, codes); `after` is
        what rank 0 does when the folder is whole. Raises InputError, on all ranks and before anything is written, if
        a weight is not finite; what the last save met.
        """
        self.finish()
        tensors = _own_share(engine, folder)
        temporary = folder.with_name(f".{folder.name}.tmp")

        def make() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        self._ranks.on_first(make)
        manifest = {
            "format": FORMAT,
            **description,
            "progress": dataclasses.asdict(progress),
            "environment": environment(),
        }
        files = companions or {} if self._ranks.rank == 0 else {}
        part = (self._ranks.rank, self._ranks.world_size)
        written = self._threads.submit(_write_share, temporary, tensors, files, part)
        self._save = _Save(folder, temporary, manifest, after, written)

    def finish(self) -> None:
        """Waits until all ranks have written, and makes it a checkpoint. Raises what any rank has met."""
        if self._save is None:
            return
        save, self._save = self._save, None
        failure: InputError | OSError | None = None
        sha256: dict[str, str] = {}
        try:
            sha256 = save.written.result()
        except (InputError, OSError) as error:
            failure = error
        shares = self._ranks.gathered(sha256 if failure is None else None)
        if failure is None and None not in shares:
            all_files = {name: value for share in shares for name, value in sorted(share.items())}
            self._ranks.on_first(lambda: save.complete(all_files))
            return
        if self._ranks.rank == 0:
            shutil.rmtree(save.temporary, ignore_errors=True)
        self._ranks.raise_on_all(failure)


def save_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    description: Mapping[str, Any],
    companions: Mapping[str, bytes],
) -> None:
    """Writes a checkpoint without moments, which can be evaluated, fine-tuned and begun from, but not gone on from.

    As `Saver` otherwise: a folder that is whole, or none. `weights`: fp32 by a parameter's name.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        sha256 = _write_share(temporary, {"weight": weights}, companions, (0, 1))
        manifest = {
            "format": FORMAT,
            **description,
            "progress": dataclasses.asdict(Progress()),
            "environment": environment(),
        }
        done: Future[dict[str, str]] = Future()
        _Save(folder, temporary, manifest, lambda: None, done).complete(sha256)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class _Save(NamedTuple):
    folder: Path
    temporary: Path
    manifest: dict[str, Any]
    after: Callable[[], None]
    written: "Future[dict[str, str]]"  # this rank's share: name -> SHA-256

    def complete(self, sha256: Mapping[str, str]) -> None:
        """Adds the manifest to a folder that has all else, and gives it its name."""
        try:
            manifest = {**self.manifest, "sha256": dict(sorted(sha256.items()))}
            manifest["manifest_sha256"] = _manifest_sha256(manifest)
            path = self.temporary / "manifest.json"
            with naming(path):
                path.write_text(
                    json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8"
                )
            sync_file(path)
            sync_file(self.temporary)
            _put_in_place(self.temporary, self.folder)
        except BaseException:
            shutil.rmtree(self.temporary, ignore_errors=True)
            raise
        self.after()


def _own_share(engine: Engine, folder: Path) -> dict[str, dict[str, Tensor]]:
    """kind -> name -> a copy on the CPU, of what this rank writes.

    Each tensor goes to the rank that has the least so far: the three of xlm_base's embedding table, at 95,000 symbols
    56 % of all bytes, to three of them.
    """
    ranks = engine.ranks
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in TENSORS}
    numbers = [0] * ranks.world_size
    bad: str | None = None
    for name, state in engine.state():
        for kind in TENSORS:
            writer = numbers.index(min(numbers))
            numbers[writer] += state[kind].numel()
            if writer != ranks.rank:
                continue
            tensors[kind][name] = state[kind].to("cpu", copy=True).contiguous()
            if bad is None and kind == "weight" and not bool(state[kind].isfinite().all()):
                bad = name
    ranks.raise_on_all(
        InputError(
            f"{bad} is not finite, so nothing was saved; lower --lr or set --clip-norm and start again: "
            f"the run goes on from the last checkpoint in {folder.parent}"
        )
        if bad is not None
        else None
    )
    return tensors


def _write_share(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, bytes],
    part: tuple[int, int],
) -> dict[str, str]:
    """Writes a rank's files and returns when they are on the disk: name -> SHA-256."""
    rank, ranks = part
    written = []
    for kind, share in tensors.items():
        if share:
            suffix = f"-{rank + 1:05}-of-{ranks:05}" if ranks > 1 else ""
            written.append(folder / f"{kind}{suffix}.safetensors")
            _save_tensors(share, written[-1])
            written[-1].chmod(
                folder.stat().st_mode & 0o666
            )  # safetensors makes it its owner's alone
    for name, content in files.items():
        written.append(folder / name)
        with naming(written[-1]):
            written[-1].write_bytes(content)
    for path in written:
        sync_file(path)
    return {path.name: file_sha256(path) for path in written}


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # a full disk, above all
        raise OSError(f"cannot write {path}: {error}") from error


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
    """Gives a saved folder its names, and deletes those that lost their last name by it, or before, in a save that was
    killed.

    keep_last_epochs: how many names checkpointN stay (-1: all). A folder that --save-interval-updates wrote, which its
    manifest says, is deleted only if `keep_update` does not keep its update.
    """
    save_dir = folder.parent
    before = _named(save_dir)
    last = save_dir / LAST
    if LAST in names and last.exists() and last.resolve() != folder.resolve():
        point(save_dir / PREVIOUS, last.resolve())
    for name in names:
        point(save_dir / name, folder)
    epochs = sorted(int(m[1]) for p in save_dir.iterdir() if (m := _EPOCH_NAME.fullmatch(p.name)))
    for epoch in epochs[: max(len(epochs) - keep_last_epochs, 0)] if keep_last_epochs >= 0 else []:
        (save_dir / f"checkpoint{epoch}").unlink()
    named = _named(save_dir)
    previous = _update_of(save_dir / PREVIOUS) or 0
    for update, path in _folders(save_dir):
        if path.name in named:
            continue
        try:
            interval_save = read_manifest(path).get("interval_save", False)
        except InputError:
            continue  # damaged, or not ours: not for us to delete, and no reason to end a run
        if not keep_update(update) if interval_save else path.name in before or update < previous:
            # Renamed first: a folder that is being deleted must never look like a checkpoint.
            # What cannot be deleted, as on NFS where another process reads it, `discard_leftovers` tries again.
            away = path.rename(path.with_name(f".{path.name}.deleted"))
            shutil.rmtree(away, ignore_errors=True)


def _folders(save_dir: Path) -> list[tuple[int, Path]]:
    """(update, folder) of everything that is named as a checkpoint, the earliest first."""
    matches = ((_FOLDER.fullmatch(path.name), path) for path in save_dir.iterdir())
    return sorted((int(match[2]), path) for match, path in matches if match)


def _named(save_dir: Path) -> set[str]:
    return {p.readlink().name for p in save_dir.glob("checkpoint*") if p.is_symlink()}


# ------------------------------------------------------------------------------------------- read


def checkpoint_folder(path: Path) -> Path:
    """Of a run's folder its best checkpoint; any other path as it is."""
    is_run = not (path / "manifest.json").exists() and (path / BEST).exists()
    return path / BEST if is_run else path


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
        refuse_lost_link(save_dir)
    return None


def refuse_lost_link(save_dir: Path) -> NoReturn:
    raise InputError(
        f"{save_dir / LAST}: points at {(save_dir / LAST).readlink()}, which is gone; bring it back, or give another "
        "--save-dir"
    )


class LaterFormat(InputError):
    """A checkpoint of a later version: whole, for all that is known, and not to be gone round."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises InputError if `folder` is not one, or is of a later format."""
    path = folder / "manifest.json"
    if not path.exists():
        what = "has no manifest.json, so it is not a checkpoint" if folder.exists() else "not found"
        raise InputError(
            f"{folder}: {what}; give a folder such as SAVE_DIR/checkpoint_last (xlm-ds convert makes one of a model of "
            "fairseq, XLM or Hugging Face)"
        )
    if not path.is_file():
        raise InputError(f"{path}: damaged: not a file")
    manifest = load_json_object(path)
    found = manifest.get("format")
    if type(found) is int and found > FORMAT:
        raise LaterFormat(f"{path}: checkpoint format {found}; this version reads {FORMAT}")
    if found != FORMAT:
        raise InputError(f"{path}: damaged: format {found}")
    missing = [key for key in REQUIRED if key not in manifest]
    if missing:
        raise InputError(f"{path}: damaged: {missing[0]} is missing")
    if manifest["manifest_sha256"] != _manifest_sha256(manifest):
        raise InputError(f"{path}: damaged: its SHA-256 is not the one it was written with")
    return manifest


def read_progress(manifest: Mapping[str, Any]) -> Progress:
    plateau = PlateauState(**manifest["progress"]["plateau"])
    return Progress(**{**manifest["progress"], "plateau": plateau})


def is_finetuned(manifest: Mapping[str, Any]) -> bool:
    return "finetuned" in manifest


def read_configuration(folder: Path, manifest: Mapping[str, Any]) -> TrainConfig:
    """What the checkpoint was trained with. Raises InputError if it is a fine-tuned one, or of a later version."""
    if is_finetuned(manifest):
        raise InputError(
            f"{folder}: is of finetune, a classifier that predicts no words any more; give the checkpoint that it was "
            f"made from ({manifest['finetuned']['model']})"
        )
    return trained_with(folder, manifest, manifest["configuration"])


def trained_with(
    folder: Path, manifest: Mapping[str, Any], configuration: Mapping[str, Any]
) -> TrainConfig:
    """`configuration`: of the manifest."""
    try:
        return from_dict(TrainConfig, configuration)
    except InputError as error:
        raise InputError(
            f"{folder}: written by another version of xlm_ds ({manifest['environment'].get('xlm_ds')}): {error}"
        ) from error


def check_files(folder: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises InputError that names the first of these files that is not what the manifest says."""
    for name in names:
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing; the checkpoint is damaged, use another")
        with naming(path, "read"):
            found = file_sha256(path)
        if found != manifest["sha256"].get(name):
            raise InputError(
                f"{path}: its SHA-256 is not the one in manifest.json; the checkpoint is damaged, use another"
            )


def _files_of(manifest: Mapping[str, Any], kind: str) -> list[str]:
    """Of one of TENSORS: one file, or one for each rank that has written."""
    pattern = re.compile(rf"{kind}(-\d+-of-\d+)?\.safetensors")
    return [name for name in sorted(manifest["sha256"]) if pattern.fullmatch(name)]


class StoredTensors(Mapping[str, Tensor]):
    """One of TENSORS by a parameter's name: whole, fp32, read from the folder's files when it is asked for."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], kind: str) -> None:
        """Raises InputError if a file is no safetensors, or there is none."""
        self._files: dict[str, Any] = {}
        for name in _files_of(manifest, kind):
            try:
                file = safe_open(folder / name, framework="pt")
            except (SafetensorError, FileNotFoundError) as error:
                raise InputError(f"{folder / name}: damaged: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]
        if not self._files:
            raise InputError(f"{folder / 'manifest.json'}: damaged: it has no file of {kind}")

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def load_tensors(folder: Path, manifest: Mapping[str, Any], kind: str) -> StoredTensors:
    """One of TENSORS; checked against the manifest's SHA-256."""
    check_files(folder, manifest, _files_of(manifest, kind))
    return StoredTensors(folder, manifest, kind)


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


def stored_state(folder: Path, manifest: Mapping[str, Any]) -> dict[str, StoredTensors]:
    """kind -> tensors by name, for Engine.load_state; unchecked (`find_whole` has)."""
    return {kind: StoredTensors(folder, manifest, kind) for kind in TENSORS}


def check_can_go_on(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises InputError of a model that was converted, which has nothing of an optimizer."""
    if manifest.get("converted"):
        raise InputError(
            f"{folder}: is a converted model, without an optimizer's state to go on from; begin a run with its "
            f"weights: train --init-from {folder}"
        )


def find_whole(
    save_dir: Path, restore_file: str, ranks: Ranks
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from and its manifest, all its files checked: each rank reads some.

    What --restore-file means, or if that is its default and damaged, the latest one before it; what is wrong is said.
    None if the run is new. Raises InputError, on all ranks, if none is whole.
    """
    candidates: list[Path] = []
    ranks.on_first(lambda: candidates.extend(_candidates(save_dir, restore_file)))
    candidates = ranks.gathered(candidates)[
        0
    ]  # another host may still see the link as it was (NFS)
    if not candidates:
        return None
    problems: list[str] = []
    for folder in candidates:
        problem: str | None = None
        try:
            manifest = read_manifest(folder)
            check_files(
                folder, manifest, sorted(manifest["sha256"])[ranks.rank :: ranks.world_size]
            )
        except (InputError, OSError) as error:
            problem = sentence_of(error)
        all_problems = sorted({text for text in ranks.gathered(problem) if text is not None})
        if not all_problems:
            check_can_go_on(folder, manifest)
            if problems:
                ranks.on_first(functools.partial(point, save_dir / LAST, folder))
                logger.warning(
                    f"{'; '.join(problems)}; going on from {folder.name}, the one before"
                )
            return folder, manifest
        problems += all_problems
    raise InputError("; ".join(problems))


def _candidates(save_dir: Path, restore_file: str) -> list[Path]:
    """What --restore-file means, and if that is its default those before it, in the order in which they count."""
    last = save_dir / LAST
    lost = restore_file == LAST and last.is_symlink() and not os.path.exists(last)  # noqa: PTH110
    found = save_dir / last.readlink() if lost else find_checkpoint(save_dir, restore_file)
    if found is None:
        return []
    if restore_file != LAST:
        return [found]
    try:
        read_manifest(found)
    except LaterFormat:
        raise
    except (InputError, OSError):
        pass  # damaged, which is for all ranks to see
    update, previous = _update_of(found), os.path.realpath(save_dir / PREVIOUS)
    earlier = [
        path for before, path in reversed(_folders(save_dir)) if before < update or update == 0
    ]
    if lost and not earlier:
        refuse_lost_link(save_dir)
    return [found, *sorted(earlier, key=lambda path: os.path.realpath(path) != previous)]


def _update_of(folder: Path) -> int:
    """By its name, or that of what a link points to; 0 where that is none of a checkpoint."""
    match = _FOLDER.fullmatch(Path(os.path.realpath(folder)).name)
    return int(match[2]) if match else 0


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
