"""Cross-lingual masked language model pretraining (XLM) on DeepSpeed: raw text to an evaluated model."""

__version__ = "0.1.0"
