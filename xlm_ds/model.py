"""The cross-lingual encoder: a batch of masked token ids enters, the loss of every masked token leaves.

The network is fairseq's `xlm_base`: learned positions, language embeddings, post-norm layers, and a
head whose output matrix is the token embedding. The head runs on masked rows only, and nothing here
looks at the contents of a tensor on the host, so that a GPU is never made to wait.

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

from xlm_ds.architectures import FIRST_POSITION_ROW, ActivationName, ModelShape
from xlm_ds.batches import Rows
from xlm_ds.dictionary import PAD
from xlm_ds.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from xlm_ds.batches import MaskedBatch

LAYER_NORM_EPS = 1e-5
INIT_STD = 0.02  # of every matrix and table, as in BERT (Devlin et al. 2018, and its code)


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
        self.attention_norm = nn.LayerNorm(shape.embed_dim, eps=LAYER_NORM_EPS)
        self.ffn = FeedForward(
            shape.embed_dim,
            inner_dim=shape.ffn_embed_dim,
            activation=shape.activation_fn,
            dropout=shape.activation_dropout,
        )
        self.ffn_norm = nn.LayerNorm(shape.embed_dim, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, hidden: Tensor, attend: Tensor | None) -> Tensor:
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, attend)))
        out: Tensor = self.ffn_norm(hidden + self.dropout(self.ffn(hidden)))
        return out


class MaskedLmHead(nn.Module):
    """Turns final hidden states into what a word's row of the tied table is multiplied with."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.transform = nn.Linear(shape.embed_dim, shape.embed_dim)
        self.activation = build_activation(shape.activation_fn)
        self.norm = nn.LayerNorm(shape.embed_dim, eps=LAYER_NORM_EPS)
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
        self.language_embedding = nn.Embedding(shape.num_segment, dim)
        self.position_embedding = (
            nn.Embedding(shape.max_positions + FIRST_POSITION_ROW, dim, padding_idx=PAD)
            if shape.token_positions
            else None
        )
        self.embedding_norm = (
            nn.LayerNorm(dim, eps=LAYER_NORM_EPS) if shape.normalize_embeddings else nn.Identity()
        )
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
            table, batch.input_ids, batch.languages, has_padding=batch.has_padding
        )
        features: Tensor = self.head(hidden.flatten(0, 1).index_select(0, batch.masked_positions))
        return features

    def encode(self, input_ids: Tensor, languages: Tensor, *, has_padding: bool = True) -> Tensor:
        """Returns the final hidden states (B, T, d) of ids (B, T) in languages (B,).

        `has_padding=False` promises that no id is PAD; attention is then unmasked, which is faster.
        States at padding mean nothing and influence no others.
        """
        lookup, _ = tied(self.token_embedding.weight)
        return self._encode(lookup, input_ids, languages, has_padding=has_padding)

    def _encode(
        self, table: Tensor, input_ids: Tensor, languages: Tensor, *, has_padding: bool
    ) -> Tensor:
        not_pad = input_ids.ne(PAD) if has_padding else None
        # Sparse, for _TiedTable. The row of PAD gets no gradient from here: padding is multiplied by 0 below.
        hidden: Tensor = F.embedding(input_ids, table, sparse=True)
        hidden = hidden + self.language_embedding(languages)[:, None]
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(position_rows(input_ids, not_pad))
        hidden = self.dropout(self.embedding_norm(hidden))
        attend = None
        if not_pad is not None:
            hidden = hidden * not_pad[:, :, None]
            attend = not_pad[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, attend)
        return hidden


def position_rows(input_ids: Tensor, not_pad: Tensor | None) -> Tensor:
    """Returns the rows of the position table for ids (B, T): (B, T), or (T,) without padding.

    Tokens are numbered from FIRST_POSITION_ROW, padding not counted; padding itself has row PAD.
    """
    if not_pad is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device) + FIRST_POSITION_ROW
    return not_pad.cumsum(dim=1) * not_pad + PAD


def build_activation(name: ActivationName) -> nn.Module:
    """Returns gelu in its exact (erf) form, or relu."""
    return nn.GELU() if name == "gelu" else nn.ReLU()


@torch.no_grad()
def init_parameters(model: XlmEncoder, generator: torch.Generator) -> None:
    """Fills every parameter, as fairseq's `apply_bert_init` does: the same for the same generator.

    Matrices and tables are N(0, INIT_STD), their padding rows and all biases 0, norms 1 and 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, INIT_STD, generator=generator)
            module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, INIT_STD, generator=generator)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, MaskedLmHead):
            module.output_bias.zero_()


def build_model(shape: ModelShape, *, seed: int) -> XlmEncoder:
    """Returns a network on the CPU in fp32, initialised from the seed: the same on every rank."""
    with torch.device("meta"):  # torch's own initialisation would draw from the global generator
        model = XlmEncoder(shape)
    model.to_empty(device="cpu")
    init_parameters(model, torch.Generator().manual_seed(seed))
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
