"""Cross-lingual masked language model pretraining (XLM) on DeepSpeed: raw text to an evaluated model."""

from typing import TYPE_CHECKING

from xlm_ds.log import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from xlm_ds.pretrained import Pretrained

__all__ = ["InputError", "load"]
__version__ = "0.1.0"


def load(path: "Path | str") -> "Pretrained":
    """The model of a checkpoint's folder, or of a run's folder its best. Raises InputError, OSError."""
    from xlm_ds.pretrained import Pretrained  # torch, which takes seconds, only now

    return Pretrained.load(path)
