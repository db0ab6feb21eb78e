"""Cross-lingual masked language model pretraining (XLM) on DeepSpeed: raw text to an evaluated model."""

from typing import TYPE_CHECKING

try:
    from xlm_ds.log import InputError
except ModuleNotFoundError as error:
    # Python looks into the current folder before what is installed.
    if error.name != "xlm_ds._core":
        raise
    raise ImportError(
        f"{__path__[0]} has the sources of xlm_ds without its C++ core: build that (pip install -e .), or start in "
        "another folder, where Python finds what is installed"
    ) from None

if TYPE_CHECKING:
    from pathlib import Path

    from xlm_ds.pretrained import Pretrained

__all__ = ["InputError", "load"]
__version__ = "0.1.0"


def load(path: "Path | str") -> "Pretrained":
    """The model of a checkpoint's folder, or of a run's folder its best. Raises InputError, OSError."""
    from xlm_ds.pretrained import Pretrained  # torch, which takes seconds, only now

    return Pretrained.load(path)
