"""Named sizes, and the way from a configuration to a network ready to train.

What a flag leaves open is the architecture's; what cannot be built is refused here.

    shape = shape_from_config(config.model, vocab_size=95_005, languages=5, tokens_per_sample=256)
    model = build_model(shape, seed=config.data.seed)
    log_p = unigram_log_probabilities(counts, language_probabilities=probabilities)
    init_output_bias(model, log_p)

The counts are those binarize wrote, the probabilities those that languages are sampled with.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from xlm_ds import _core
from xlm_ds.config import ModelConfig
from xlm_ds.log import InputError
from xlm_ds.model import ActivationName, ModelShape, XlmEncoder, init_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a name stands for where the configuration says nothing."""

    layers: int
    embed_dim: int
    ffn_embed_dim: int
    attention_heads: int
    activation_fn: ActivationName


ARCHITECTURES = {
    # fairseq's xlm_base, which differs from the XLM paper's network by a transform in the head.
    "xlm_base": Architecture(
        layers=6, embed_dim=1024, ffn_embed_dim=4096, attention_heads=8, activation_fn="gelu"
    ),
}


def shape_from_config(
    config: ModelConfig, *, vocab_size: int, languages: int, tokens_per_sample: int
) -> ModelShape:
    """Returns the shape of the network for so many words, languages and tokens in a row.

    Raises: InputError, if there can be no such network.
    """
    named = ARCHITECTURES[config.arch]
    shape = ModelShape(
        vocab_size=vocab_size,
        max_positions=config.max_positions or tokens_per_sample,
        num_segment=languages if config.num_segment is None else config.num_segment,
        layers=config.encoder_layers or named.layers,
        embed_dim=config.encoder_embed_dim or named.embed_dim,
        ffn_embed_dim=config.encoder_ffn_embed_dim or named.ffn_embed_dim,
        attention_heads=config.encoder_attention_heads or named.attention_heads,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout,
        activation_fn=cast(ActivationName, config.activation_fn or named.activation_fn),
        token_positions=not config.no_token_positional_embeddings,
        normalize_embeddings=config.encoder_normalize_before,
    )
    _check_shape(shape, languages=languages, tokens_per_sample=tokens_per_sample)
    return shape


def build_model(shape: ModelShape, *, seed: int) -> XlmEncoder:
    """Returns a network on the CPU in fp32, initialised from the seed: the same on every rank."""
    with torch.device("meta"):  # torch's own initialisation would draw from the global generator
        model = XlmEncoder(shape)
    model.to_empty(device="cpu")
    init_parameters(model, torch.Generator().manual_seed(seed))
    return model


def useful_flops_per_token(shape: ModelShape, tokens_per_sample: int, mask_ratio: float) -> float:
    """Floating point operations that training needs for each token of a sample, masked or not.

    Three times the forward matrix products (a multiply and an add each) of the layers, attention in full, and the head
    at masked positions only; no lookups, norms or softmax, nothing computed twice.
    """
    dim = shape.embed_dim
    layer = 2 * (4 * dim * dim + 2 * dim * shape.ffn_embed_dim) + 4 * tokens_per_sample * dim
    head = 2 * (shape.vocab_size * dim + dim * dim)
    masked = _core.masked_count(mask_ratio, tokens_per_sample - 1) / tokens_per_sample
    return 3.0 * (shape.layers * layer + masked * head)


def unigram_log_probabilities(
    counts: NDArray[np.uint64], *, language_probabilities: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Returns the log-probabilities (V,) of a token drawn from a language drawn by its probability.

    `counts` (L, V) are each language's tokens in the training text; `language_probabilities` (L,)
    sum to 1. Each language's distribution is smoothed by adding one to every count.
    """
    smoothed = counts.astype(np.float64) + 1
    per_language = smoothed / smoothed.sum(axis=1, keepdims=True)
    mixture: NDArray[np.float64] = language_probabilities @ per_language
    return np.log(mixture).astype(np.float32)


@torch.no_grad()
def init_output_bias(model: XlmEncoder, log_probabilities: NDArray[np.float32]) -> None:
    """Sets the output bias to log-probabilities (V,): the model then starts at the unigram loss."""
    model.head.output_bias.copy_(torch.from_numpy(log_probabilities))


def _check_shape(shape: ModelShape, *, languages: int, tokens_per_sample: int) -> None:
    if shape.embed_dim % shape.attention_heads:
        raise InputError(
            f"--encoder-embed-dim {shape.embed_dim} is not a multiple of --encoder-attention-heads "
            f"{shape.attention_heads}; every head needs the same share of it"
        )
    if shape.num_segment < languages:
        raise InputError(
            f"--num-segment {shape.num_segment} is smaller than the number of languages, "
            f"{languages}; give at least {languages}, or leave it out"
        )
    if shape.token_positions and tokens_per_sample > shape.max_positions:
        raise InputError(
            f"--tokens-per-sample {tokens_per_sample} is beyond the position table of "
            f"{shape.max_positions} rows; lower it, or raise --max-positions"
        )
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        if not 0 <= getattr(shape, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {getattr(shape, name)} is not a share; it must be below 1")
