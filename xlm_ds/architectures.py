"""Named sizes, and what a network of a size holds and computes, without torch.

What a flag leaves open is the architecture's; what cannot be built is refused here.

    shape = shape_from_config(config.model, vocab_size=95_005, languages=5, tokens_per_sample=256)
    parameter_count(shape)                                    # of model.build_model(shape, seed=0)
    useful_flops(shape, rows=64, tokens=256, masked=39)       # of forward and backward pass
"""

from dataclasses import dataclass, replace
from typing import Literal, cast

from xlm_ds.config import ModelConfig
from xlm_ds.dictionary import PAD
from xlm_ds.log import InputError

FIRST_POSITION_ROW = PAD + 1  # fairseq's position table has unused rows 0 and PAD before the first

ActivationName = Literal["gelu", "relu"]
Initialisation = Literal["bert", "xlm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Every number the network is made from."""

    vocab_size: int
    max_positions: int
    num_segment: int  # rows of the language table; 0: there is none
    layers: int
    embed_dim: int
    ffn_embed_dim: int
    attention_heads: int
    dropout: float
    attention_dropout: float
    activation_dropout: float
    activation_fn: ActivationName
    token_positions: bool  # whether there is a position table
    first_position_row: int = FIRST_POSITION_ROW  # of that table; those before it are not used
    normalize_embeddings: bool  # whether the sum of the embeddings is layer-normalised
    layer_norm_eps: float = 1e-5
    head_transform: bool = True  # between the last layer and the output matrix
    initialisation: Initialisation = "bert"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a name stands for where the configuration says nothing."""

    layers: int
    embed_dim: int
    ffn_embed_dim: int
    attention_heads: int
    activation_fn: ActivationName = "gelu"
    max_positions: int | None = None  # None: as many as a sample has tokens
    language_embeddings: bool = True
    first_position_row: int = FIRST_POSITION_ROW
    normalize_embeddings: bool = False
    layer_norm_eps: float = 1e-5
    head_transform: bool = True
    initialisation: Initialisation = "bert"


# XLM's own network (XLM cd281d3). It also sets the states of padding to 0 after every layer, which no other state knows
# of: here they are left as they are, and encode() returns 0 there.
_XLM = Architecture(
    layers=6,
    embed_dim=1024,
    ffn_embed_dim=4096,
    attention_heads=8,
    max_positions=512,
    first_position_row=0,
    normalize_embeddings=True,
    layer_norm_eps=1e-12,
    head_transform=False,
    initialisation="xlm",
)
ARCHITECTURES = {
    # fairseq's xlm_base.
    "xlm_base": Architecture(layers=6, embed_dim=1024, ffn_embed_dim=4096, attention_heads=8),
    # XLM's of en-fr, en-de and en-ro.
    "xlm": _XLM,
    "xlm_xnli15": replace(_XLM, layers=12),
    # Of 17 and of 100 languages. Sizes: config.json of xlm-mlm-17-1280 and xlm-mlm-100-1280 on the Hugging Face hub.
    "xlm_100": replace(
        _XLM,
        layers=16,
        embed_dim=1280,
        ffn_embed_dim=5120,
        attention_heads=16,
        language_embeddings=False,
    ),
}


def shape_from_config(
    config: ModelConfig, *, vocab_size: int, languages: int, tokens_per_sample: int
) -> ModelShape:
    """Returns the shape of the network for so many words, languages and tokens in a row.

    Raises: InputError, if there can be no such network.
    """
    named = ARCHITECTURES[config.arch]
    tables = languages if named.language_embeddings else 0
    shape = ModelShape(
        vocab_size=vocab_size,
        max_positions=config.max_positions or named.max_positions or tokens_per_sample,
        num_segment=tables if config.num_segment is None else config.num_segment,
        layers=config.encoder_layers or named.layers,
        embed_dim=config.encoder_embed_dim or named.embed_dim,
        ffn_embed_dim=config.encoder_ffn_embed_dim or named.ffn_embed_dim,
        attention_heads=config.encoder_attention_heads or named.attention_heads,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout,
        activation_fn=cast(ActivationName, config.activation_fn or named.activation_fn),
        token_positions=not config.no_token_positional_embeddings,
        first_position_row=named.first_position_row,
        normalize_embeddings=config.encoder_normalize_before or named.normalize_embeddings,
        layer_norm_eps=named.layer_norm_eps,
        head_transform=named.head_transform,
        initialisation=named.initialisation,
    )
    _check_shape(shape, languages=languages, tokens_per_sample=tokens_per_sample)
    return shape


def position_table_rows(shape: ModelShape) -> int:
    """Rows of the position table."""
    return shape.first_position_row + shape.max_positions


def parameters_by_part(shape: ModelShape) -> dict[str, int]:
    """The numbers of parameters of a model of this shape; the output matrix is the token embedding."""
    dim, inner = shape.embed_dim, shape.ffn_embed_dim
    norm = 2 * dim
    small_tables = shape.num_segment * dim
    if shape.token_positions:
        small_tables += position_table_rows(shape) * dim
    if shape.normalize_embeddings:
        small_tables += norm
    attention = 4 * (dim * dim + dim)
    ffn = 2 * dim * inner + inner + dim
    transform = dim * dim + dim + norm if shape.head_transform else 0
    return {
        "token embedding": shape.vocab_size * dim,
        "language and position embeddings": small_tables,
        "layers": shape.layers * (attention + ffn + 2 * norm),
        "head": transform + shape.vocab_size,
    }


def parameter_count(shape: ModelShape) -> int:
    return sum(parameters_by_part(shape).values())


def tensor_sizes(shape: ModelShape) -> list[int]:
    """Numbers in each of the parameters of a model of this shape, which are sent and kept one by one here and there."""
    dim, inner = shape.embed_dim, shape.ffn_embed_dim
    norm = [dim, dim]
    attention = [3 * dim * dim, 3 * dim, dim * dim, dim]
    ffn = [dim * inner, inner, inner * dim, dim]
    tables = [shape.vocab_size * dim]
    if shape.num_segment:
        tables.append(shape.num_segment * dim)
    if shape.token_positions:
        tables.append(position_table_rows(shape) * dim)
    if shape.normalize_embeddings:
        tables += norm
    head = [shape.vocab_size]
    if shape.head_transform:
        head += [dim * dim, dim, *norm]
    return tables + shape.layers * (attention + norm + ffn + norm) + head


def flops_by_part(shape: ModelShape, *, rows: int, tokens: int, masked: int) -> dict[str, float]:
    """Floating point operations that forward and backward pass of rows of so many tokens, `masked` of them, need: three
    times the forward matrix products (a multiply and an add each) of the layers, attention over the whole row, and the
    head at masked positions only; no lookups, norms or softmax, nothing computed twice.
    """
    dim, inner = shape.embed_dim, shape.ffn_embed_dim
    per_token = 2 * (4 * dim * dim + 2 * dim * inner)
    per_target = 2 * (shape.vocab_size * dim + dim * dim * shape.head_transform)
    return {
        "layers": 3.0 * rows * tokens * shape.layers * per_token,
        "attention": 3.0 * rows * tokens * shape.layers * 4 * tokens * dim,
        "head": 3.0 * rows * masked * per_target,
    }


def useful_flops(shape: ModelShape, *, rows: int, tokens: int, masked: int) -> float:
    return sum(flops_by_part(shape, rows=rows, tokens=tokens, masked=masked).values())


def _check_shape(shape: ModelShape, *, languages: int, tokens_per_sample: int) -> None:
    if shape.embed_dim % shape.attention_heads:
        raise InputError(
            f"--encoder-embed-dim {shape.embed_dim} is not a multiple of --encoder-attention-heads "
            f"{shape.attention_heads}; every head needs the same share of it"
        )
    if 0 < shape.num_segment < languages:
        raise InputError(
            f"--num-segment {shape.num_segment} is smaller than the number of languages, "
            f"{languages}; give at least {languages}, 0 for no language embedding, or leave it out"
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
