"""A model that torch.save has saved: its tensors and settings, read in a process of its own.

    with opened_torch_model(Path("mlm_xnli15_1024.pth")) as saved:
        saved.tensors                     # a .safetensors of the weights, by the file's names
        saved.settings["params"]["emb_dim"]

The process runs torch_file's reader, which can call nothing that such a file names. Should it have a fault all the
same, it meets a process that knows nothing of the run, may use no more memory than the file explains, and hands over
nothing but safetensors and JSON.

    python -m xlm_ds.torch_model FILE FOLDER          # what that process runs
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from xlm_ds.log import EXIT_BAD_INPUT, EXIT_OK, InputError, run_stage
from xlm_ds.torch_file import PickledObject, PickledTensor, load_torch_file

# Besides what the file maps and its tensors take: a dictionary of 200,000 words is a few 100 MB as Python's objects.
_MEMORY_BYTES = 4 << 30
_CPU_SECONDS, _BYTES_PER_CPU_SECOND = 60, 10 << 20
_MOST_TEXT, _DEEPEST = 1 << 20, 100
_SETTINGS = ("args", "cfg", "params")
_WORDS = ("dico_id2word", "dico_counts")
_STAGE = "torch_model"


@dataclass(frozen=True)
class SavedModel:
    """What a checkpoint of fairseq or XLM, or a state_dict alone, says of a model."""

    tensors: Path  # safetensors, by the names of the file
    settings: dict[str, Any]  # of those of _SETTINGS that are there, by their names
    words: tuple[str, ...]  # XLM's dictionary by id; () where there is none
    counts: tuple[int, ...]


@contextlib.contextmanager
def opened_torch_model(path: Path) -> Iterator[SavedModel]:
    """Raises InputError for what is no such file or may not be read; OSError."""
    path.stat()
    with tempfile.TemporaryDirectory(prefix="xlm_ds-") as name:
        folder = Path(name)
        # -P: or modules of the folder that the command is given in would be imported, be it where the model lies.
        command = [sys.executable, "-P", "-m", "xlm_ds.torch_model", str(path), name]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        last_words = done.stderr.strip().rpartition("\n")[2]
        if done.returncode == EXIT_BAD_INPUT:
            raise InputError(last_words.removeprefix(f"{_STAGE}: error: "))
        if done.returncode == -signal.SIGXCPU:
            raise InputError(
                f"{path}: not read: it takes more time than a file of its size explains; is it damaged?"
            )
        if done.returncode != EXIT_OK:
            raise InputError(
                f"{path}: not read: the process that read it ended with {done.returncode} ({last_words:.200})"
            )
        content = json.loads((folder / "content.json").read_text(encoding="utf-8"))
        yield SavedModel(
            folder / "model.safetensors",
            content["settings"],
            tuple(content["words"]),
            tuple(content["counts"]),
        )


# ------------------------------------------------------------------------------ in the process


def extract(path: Path, folder: Path) -> None:
    """Writes what `opened_torch_model` gives. Raises InputError, OSError."""
    content = load_torch_file(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a checkpoint: it holds no dictionary")
    state = content.get("model", content)
    if not isinstance(state, dict) or not any(
        isinstance(value, PickledTensor) for value in state.values()
    ):
        kinds = ", ".join(sorted(map(str, content))[:8])
        raise InputError(f"{path}: has no weights of a model under model; it has {kinds:.100}")
    tensors = {
        str(name): _numbers(value)
        for name, value in state.items()
        if isinstance(value, PickledTensor)
    }
    try:
        save_file(tensors, folder / "model.safetensors")
    except SafetensorError as error:  # a full disk, above all
        raise InputError(
            f"{path}: its tensors cannot be written to {folder}: {error}; set TMPDIR to a folder with room for them"
        ) from error
    plain = _Plain(path, _MOST_TEXT + 2 * path.stat().st_size)
    settings = {key: plain(content[key]) for key in _SETTINGS if key in content}
    words, counts = _dictionary(content, path)
    plain.count("".join(words))
    (folder / "content.json").write_text(
        json.dumps({"settings": settings, "words": words, "counts": counts}), encoding="utf-8"
    )


def _numbers(tensor: PickledTensor) -> NDArray[Any]:
    """Contiguous; of bfloat16 the same numbers as float32, whose first half its bits are."""
    if tensor.dtype == "BF16":
        return (tensor.array.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(tensor.array)


def _dictionary(content: dict[Any, Any], path: Path) -> tuple[list[str], list[int]]:
    if _WORDS[0] not in content:
        return [], []
    by_id, by_word = (content.get(key) for key in _WORDS)
    if isinstance(by_id, dict) and isinstance(by_word, dict):
        words = [by_id.get(number) for number in range(len(by_id))]
        counts = [by_word.get(word) for word in words if isinstance(word, str)]
        if len(counts) == len(words) and all(type(count) is int for count in counts):
            return words, counts  # type: ignore[return-value]
    raise InputError(f"{path}: {' and '.join(_WORDS)} do not give every id a word with a count")


class _Plain:
    """Settings as JSON has them. What is none, such as a tensor, becomes null."""

    def __init__(self, path: Path, most: int) -> None:
        self._path = path
        self._most = most  # characters and values: a file can name the same one often

    def count(self, text: str = "", depth: int = 0) -> None:
        self._most -= 1 + len(text)
        if self._most < 0 or depth > _DEEPEST:
            raise InputError(f"{self._path}: its settings are too many, or nested too deep")

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self.count(value if isinstance(value, str) else "", depth)
        if isinstance(value, PickledObject):
            value = value.attributes
        if isinstance(value, dict):
            return {str(key): self(part, depth + 1) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self(part, depth + 1) for part in value]
        return value if value is None or isinstance(value, bool | int | float | str) else None


def limit(file_bytes: int) -> None:
    """Bounds memory, processor time and core files of this process by the size of the file that it reads."""
    bounds = {
        resource.RLIMIT_AS: _MEMORY_BYTES + 4 * file_bytes,
        resource.RLIMIT_CPU: _CPU_SECONDS + file_bytes // _BYTES_PER_CPU_SECOND,
        resource.RLIMIT_CORE: 0,
    }
    for what, wanted in bounds.items():
        _, hard = resource.getrlimit(what)
        bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(what, (bound, hard if what == resource.RLIMIT_CPU else bound))


def main(argv: Sequence[str]) -> int:
    path, folder = map(Path, argv)
    limit(path.stat().st_size)
    extract(path, folder)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_stage(_STAGE, main))
