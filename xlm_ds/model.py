"""The cross-lingual encoder: a batch of masked token ids enters, the loss of every masked token leaves.

The network is fairseq's `xlm_base`, or XLM's own: learned positions, language embeddings, post-norm
layers, and a head whose output matrix is the token embedding; ModelShape has what they differ in. The
head runs on masked rows only, and nothing here looks at the contents of a tensor on the host, so that
a GPU is never made to wait.

    model = build_model(shape, seed=config.data.seed)         # numbers: architectures.ModelShape
    init_output_bias(model, unigram_log_probabilities(counts, language_probabilities=probabilities))
    losses = model(batch)                                     # (B*K,) nats, 0 where the target is PAD
    losses.sum().backward()

The counts are those binarize wrote, the probabilities those that languages are sampled with.

Parameter names are a file format (checkpoints store them); changing one needs a page in
docs/decisions/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xlm_ds.architectures import ActivationName, Initialisation, ModelShape, position_table_rows
from xlm_ds.batches import Rows
from xlm_ds.dictionary import PAD
from xlm_ds.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from xlm_ds.batches import MaskedBatch

INIT_STD = 0.02  # of every matrix and table in BERT (Devlin et al. 2018, and its code)


class SelfAttention(nn.Module):
    """Every position of a row attends to every position of that row that is not padding."""

    def __init__(self, embed_dim: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim)  # rows: queries, keys, values
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, hidden: Tensor, attend: Tensor | None) -> Tensor:
        """Maps (B, T, d) to (B, T, d); `attend` (B, 1, 1, T) is False at keys to leave out."""
        qkv = self.qkv_proj(hidden).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, d / heads)
        dropout = self.dropout if self.training else 0.0
        if dropout and not hidden.is_cuda:
            # torch 2.13 has no fused attention with dropout there. What it would keep for the backward pass grows with
            # the square of a row's length, 0.4 GB of 5 in rows of 256; to compute it again costs 2 to 6 % of a step.
            context = checkpoint(
                _attention, query, key, value, attend, dropout, use_reentrant=False
            )
        else:
            context = _attention(query, key, value, attend, dropout)
        out: Tensor = self.out_proj(context.transpose(1, 2).flatten(2))
        return out


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None, dropout: float
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attend, dropout_p=dropout)


class FeedForward(nn.Module):
    """Two projections with an activation between them, on every position by itself."""

    def __init__(
        self, embed_dim: int, *, inner_dim: int, activation: ActivationName, dropout: float
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, inner_dim)
        self.activation = build_activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(inner_dim, embed_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.dropout(self.activation(self.fc1(hidden))))
        return out


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input and then normalised (post-norm)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.attention = SelfAttention(
            shape.embed_dim, heads=shape.attention_heads, dropout=shape.attention_dropout
        )
        self.attention_norm = build_norm(shape)
        self.ffn = FeedForward(
            shape.embed_dim,
            inner_dim=shape.ffn_embed_dim,
            activation=shape.activation_fn,
            dropout=shape.activation_dropout,
        )
        self.ffn_norm = build_norm(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, hidden: Tensor, attend: Tensor | None) -> Tensor:
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, attend)))
        out: Tensor = self.ffn_norm(hidden + self.dropout(self.ffn(hidden)))
        return out


class MaskedLmHead(nn.Module):
    """Turns final hidden states into what a word's row of the tied table is multiplied with."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        if shape.head_transform:
            self.transform: nn.Module = nn.Linear(shape.embed_dim, shape.embed_dim)
            self.activation = build_activation(shape.activation_fn)
            self.norm: nn.Module = build_norm(shape)
        else:
            self.transform, self.activation, self.norm = (nn.Identity() for _ in range(3))
        self.output_bias = nn.Parameter(torch.zeros(shape.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps (N, d) to (N, d)."""
        out: Tensor = self.norm(self.activation(self.transform(hidden)))
        return out


def tied(table: Tensor) -> tuple[Tensor, Tensor]:
    """A table that is looked up and multiplied with, as one tensor for each, whose gradients become one again.

    Autograd by itself would write the lookup's few rows into a second table of zeros and add that to the product's
    gradient: for 95,000 words of 1,024 numbers, 0.23 CPU-seconds against 0.002 (fp32, a
    prototype on 2 cores, November 2026).
    """
    lookup, product = _TiedTable.apply(table)  # type: ignore[no-untyped-call]
    return lookup, product


class _TiedTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return table.view_as(table), table.view_as(table)

    @staticmethod
    def backward(ctx: Any, looked_up: Tensor | None, product: Tensor | None) -> Tensor | None:  # noqa: ARG004
        if looked_up is None:
            return product
        if product is None:
            product = torch.zeros(looked_up.shape, dtype=looked_up.dtype, device=looked_up.device)
        add_rows_(product, looked_up._indices()[0], looked_up._values())
        return product


def add_rows_(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Adds values (N, d) to the rows (N,) of a table (V, d), summing in fp32 those that share a row.

    One after another in bf16, the terms of a frequent word would soon be too small to change the sum; and on CUDA the
    sum would depend on who comes first.
    """
    ordered, order = rows.sort()
    is_first = F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)
    place = torch.empty_like(rows).scatter_(
        0, order, is_first.cumsum(0) - 1
    )  # 0, 1, … by distinct row
    sums = torch.ops.aten.embedding_dense_backward(values.float(), place, len(rows), -1, False)
    # Places beyond the last distinct row have sums of 0, for any row; one for all would be a queue on CUDA.
    anywhere = torch.arange(len(rows), device=rows.device) % len(table)
    table.index_add_(0, anywhere.scatter_(0, place, rows), sums.to(table.dtype))


class XlmEncoder(nn.Module):
    """A bidirectional transformer that predicts masked tokens of any of its languages.

    Parameters hold torch's own initial values until `init_parameters` has run.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        dim = shape.embed_dim
        self.token_embedding = nn.Embedding(shape.vocab_size, dim, padding_idx=PAD)
        self.language_embedding = (
            nn.Embedding(shape.num_segment, dim) if shape.num_segment else None
        )
        self.first_position_row = shape.first_position_row
        self.position_embedding = (
            nn.Embedding(
                position_table_rows(shape),
                dim,
                padding_idx=PAD if shape.first_position_row > PAD else None,
            )
            if shape.token_positions
            else None
        )
        self.embedding_norm = build_norm(shape) if shape.normalize_embeddings else nn.Identity()
        self.dropout = nn.Dropout(shape.dropout)
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(shape.layers))
        self.head = MaskedLmHead(shape)

    def forward(self, batch: MaskedBatch | Rows) -> Tensor:
        """Returns the negative log-likelihood of every target: (B*K,) fp32 nats, 0 where it is PAD.

        Of rows without targets it returns what `encode` does: DeepSpeed knows no way in but this one.
        """
        if isinstance(batch, Rows):
            return self.encode(batch.input_ids, batch.languages, has_padding=batch.has_padding)
        lookup, product = tied(self.token_embedding.weight)
        return linear_cross_entropy(
            self._features(batch, lookup),
            product,
            self.head.output_bias,
            batch.targets,
            ignore_index=PAD,
        )

    def compile_layers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compiles the layers at their first call: one graph that all of them use, with no way around it in Python."""
        for layer in self.layers:
            layer.compile(backend=backend, fullgraph=True, dynamic=False)

    def logits(self, batch: MaskedBatch) -> Tensor:
        """Returns the scores of every word at every masked position: (B*K, V) fp32."""
        lookup, product = tied(self.token_embedding.weight)
        return F.linear(self._features(batch, lookup), product).float() + self.head.output_bias

    def _features(self, batch: MaskedBatch, table: Tensor) -> Tensor:
        """(B*K, d): what the head makes of the masked positions."""
        hidden = self._encode(
            table,
            batch.input_ids,
            language_of_positions(batch),
            has_padding=batch.has_padding,
            second_starts=batch.second_starts,
        )
        features: Tensor = self.head(hidden.flatten(0, 1).index_select(0, batch.masked_positions))
        return features

    def encode(self, input_ids: Tensor, languages: Tensor, *, has_padding: bool = True) -> Tensor:
        """Returns the final hidden states (B, T, d) of ids (B, T) in languages (B,).

        `has_padding=False` promises that no id is PAD; attention is then unmasked, which is faster.
        States at padding are 0 and influence no others.
        """
        lookup, _ = tied(self.token_embedding.weight)
        hidden = self._encode(lookup, input_ids, languages[:, None], has_padding=has_padding)
        return hidden * input_ids.ne(PAD)[:, :, None] if has_padding else hidden

    def _encode(
        self,
        table: Tensor,
        input_ids: Tensor,
        languages: Tensor,
        *,
        has_padding: bool,
        second_starts: Tensor | None = None,
    ) -> Tensor:
        """`languages`: of each position (B, T), or of each row (B, 1)."""
        not_pad = input_ids.ne(PAD) if has_padding else None
        # Sparse, for _TiedTable. The row of PAD gets no gradient from here: padding is multiplied by 0 below.
        hidden: Tensor = F.embedding(input_ids, table, sparse=True)
        if self.language_embedding is not None:
            hidden = hidden + self.language_embedding(languages)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(
                position_rows(input_ids, not_pad, second_starts, first=self.first_position_row)
            )
        hidden = self.dropout(self.embedding_norm(hidden))
        attend = None
        if not_pad is not None:
            hidden = hidden * not_pad[:, :, None]
            attend = not_pad[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, attend)
        return hidden


def language_of_positions(batch: MaskedBatch) -> Tensor:
    """(B, T), or (B, 1) where no row is a pair."""
    languages = batch.languages[:, None]
    if batch.second_starts is None or batch.second_languages is None:
        return languages
    is_second = in_second_half(batch.input_ids, batch.second_starts)
    return torch.where(is_second, batch.second_languages[:, None], languages)


def in_second_half(input_ids: Tensor, second_starts: Tensor) -> Tensor:
    """(B, T): whether a position is in its row's second half, which begins at `second_starts` (B,)."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    return places >= second_starts[:, None]


def position_rows(
    input_ids: Tensor, not_pad: Tensor | None, second_starts: Tensor | None = None, *, first: int
) -> Tensor:
    """Returns the rows of the position table for ids (B, T): (B, T), or (T,) where all rows have the same.

    Tokens are numbered from row `first`, and again where a second half begins (B,); padding is not counted, and has the
    row before `first`, or 0.
    """
    if not_pad is None:
        rows = torch.arange(input_ids.shape[1], device=input_ids.device) + first
    else:
        rows = (not_pad.cumsum(dim=1) * not_pad + (first - 1)).clamp(min=0)
    if second_starts is None:
        return rows
    is_second = in_second_half(input_ids, second_starts)
    if not_pad is not None:
        is_second = is_second & not_pad
    return rows - is_second * second_starts[:, None]


def build_norm(shape: ModelShape) -> nn.LayerNorm:
    return nn.LayerNorm(shape.embed_dim, eps=shape.layer_norm_eps)


def build_activation(name: ActivationName) -> nn.Module:
    """Returns gelu in its exact (erf) form, or relu."""
    return nn.GELU() if name == "gelu" else nn.ReLU()


@torch.no_grad()
def init_parameters(
    model: XlmEncoder, initialisation: Initialisation, generator: torch.Generator
) -> None:
    """Fills every parameter: the same for the same generator.

    bert, as fairseq's `apply_bert_init`: matrices and tables are N(0, INIT_STD), all biases 0. xlm, as XLM: tables of
    width d are N(0, 1/sqrt(d)); matrices and biases, as torch's Linear has them, within 1/sqrt(inputs). Both: padding
    rows and the output's bias are 0, norms 1 and 0.
    """
    as_xlm = initialisation == "xlm"
    for module in model.modules():
        if isinstance(module, nn.Linear) and as_xlm:
            bound = module.in_features**-0.5
            module.weight.uniform_(-bound, bound, generator=generator)
            module.bias.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, nn.Linear):
            module.weight.normal_(0.0, INIT_STD, generator=generator)
            module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            std = module.embedding_dim**-0.5 if as_xlm else INIT_STD
            module.weight.normal_(0.0, std, generator=generator)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, MaskedLmHead):
            module.output_bias.zero_()
    if model.position_embedding is not None:  # rows that nothing reads, and that not all peers have
        model.position_embedding.weight[: model.first_position_row].zero_()


def build_model(shape: ModelShape, *, seed: int) -> XlmEncoder:
    """Returns a network on the CPU in fp32, initialised from the seed: the same on every rank."""
    with torch.device("meta"):  # torch's own initialisation would draw from the global generator
        model = XlmEncoder(shape)
    model.to_empty(device="cpu")
    init_parameters(model, shape.initialisation, torch.Generator().manual_seed(seed))
    return model


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
