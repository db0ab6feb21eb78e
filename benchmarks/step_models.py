"""What step_cpu.py and step_gpu.py run side by side: one update of xlm_base by ours, and by what users would pick.

A contender is built once and then called with a batch: `update(batch)` is forward, backward and optimizer, and returns
the loss in nats per masked token without looking at it on the host. All but HF's have the same weights and the same
numerics, and so without dropout the same loss; HF's network has no transform in its head.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import SkippedError
from torch import Tensor, nn

from xlm_ds import architectures
from xlm_ds.architectures import FIRST_POSITION_ROW, ModelShape, shape_from_config
from xlm_ds.batches import MaskedBatch
from xlm_ds.config import ModelConfig, OptimizationConfig
from xlm_ds.dictionary import PAD
from xlm_ds.model import XlmEncoder, build_model

LANGUAGES = 5
MASK_RATIO = 0.15
LR, BETA1, BETA2, EPS = 1e-4, 0.9, 0.999, 1e-8
SPECIALS = 5


@dataclass(frozen=True)
class Size:
    """What is trained on: xlm_base, or `layers` of `dim`."""

    vocab_size: int = 95_000
    rows: int = 8
    tokens: int = 256
    layers: int = 6
    dim: int = 1024
    dropout: float = 0.1  # the recipe's, everywhere

    @property
    def masked_per_row(self) -> int:
        return math.ceil(MASK_RATIO * (self.tokens - 1))

    def shape(self) -> ModelShape:
        config = ModelConfig(
            encoder_layers=self.layers,
            encoder_embed_dim=self.dim,
            encoder_ffn_embed_dim=4 * self.dim,
            dropout=self.dropout,
            attention_dropout=self.dropout,
        )
        return shape_from_config(
            config, vocab_size=self.vocab_size, languages=LANGUAGES, tokens_per_sample=self.tokens
        )

    def model(self) -> XlmEncoder:
        return build_model(self.shape(), seed=1)

    def batch(self, seed: int, device: torch.device | None = None) -> MaskedBatch:
        """Random words, masked as in training: the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(
            SPECIALS, self.vocab_size, (self.rows, self.tokens), generator=generator
        )
        ids[:, 0] = 2
        columns = torch.rand(self.rows, self.tokens - 1, generator=generator).argsort(dim=1)
        columns = columns[:, : self.masked_per_row].sort(dim=1).values + 1
        positions = (columns + self.tokens * torch.arange(self.rows)[:, None]).flatten()
        targets = ids.flatten()[positions]
        ids.view(-1)[positions] = 4  # <mask>, all of them
        languages = torch.randint(0, LANGUAGES, (self.rows,), generator=generator)
        tensors = (ids, languages, positions, targets)
        return MaskedBatch(*(tensor.to(device) for tensor in tensors), has_padding=False)


@dataclass(frozen=True)
class Update:
    """A contender: forward, backward and optimizer of `network`."""

    network: nn.Module
    step: Callable[[MaskedBatch], Tensor]

    def __call__(self, batch: MaskedBatch) -> Tensor:
        return self.step(batch)


def set_dropout(network: nn.Module, probability: float) -> None:
    """Everywhere in ours or in FairseqLike."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = probability  # type: ignore[assignment]


def compile_layers(model: XlmEncoder, device: torch.device) -> None:
    """As a run does. On a CPU they are only traced: inductor's C++ would take minutes, for nothing."""
    model.compile_layers("inductor" if device.type == "cuda" else "aot_eager")


def useful_flops(size: Size) -> float:
    """Of one update."""
    return architectures.useful_flops(
        size.shape(), rows=size.rows, tokens=size.tokens, masked=size.masked_per_row
    )


# -------------------------------------------------------------------------------------------- ours


def engine_update(
    size: Size, deepspeed_config: str, *, flat: bool | None = None, compiled: bool = False
) -> Update:
    """One of ds_configs, through the engine as a run has it, or with or without its flat gradients."""
    import xlm_ds.engine as room
    from xlm_ds.deepspeed_config import (
        CONFIG_DIRECTORY,
        read_deepspeed_config,
        resolve_deepspeed_config,
    )

    ranks = room.start_ranks()
    settings = resolve_deepspeed_config(
        read_deepspeed_config(CONFIG_DIRECTORY / f"{deepspeed_config}.json", ranks.device.type),
        OptimizationConfig(lr=LR),
        rows=size.rows,
        accumulation=1,
    )
    if flat is False:
        room.takes_flat_gradients = lambda settings: False  # noqa: ARG005
    elif flat and not room.takes_flat_gradients(settings):
        raise SkippedError(
            f"the flat gradients are not made for DeepSpeed {room.deepspeed.__version__}"
        )
    model = size.model()
    if compiled:
        compile_layers(model, ranks.device)
    engine = room.Engine(model, settings, ranks)
    engine.train()
    targets = size.rows * size.masked_per_row

    def update(batch: MaskedBatch) -> Tensor:
        loss = engine(batch).sum() / targets
        engine.backward(loss)
        engine.step(LR)
        return loss.detach()

    return Update(model, update)


def plain_update(
    size: Size, dtype: torch.dtype, device: torch.device, *, compiled: bool = False
) -> Update:
    """Our model without DeepSpeed: torch's fused Adam, on fp32 masters of a lower `dtype`."""
    model = size.model().to(device)
    if compiled:
        compile_layers(model, device)
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    model.to(dtype)
    model.train()
    optimizer = torch.optim.AdamW(masters, lr=LR, weight_decay=0.0, fused=True)
    targets = size.rows * size.masked_per_row

    def update(batch: MaskedBatch) -> Tensor:
        loss = model(batch).sum() / targets
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), masters)
        return loss.detach()

    return Update(model, update)


# ------------------------------------------------------------------------------------ fairseq-like


class FairseqLike(nn.Module):
    """xlm_base as fairseq computes it: time first, three projections, attention in separate steps, the head and the
    softmax at every position. Written from its behaviour; ours lends the weights.
    """

    def __init__(self, ours: XlmEncoder, size: Size) -> None:
        super().__init__()
        dim = size.dim
        self.heads = ours.layers[0].attention.heads  # type: ignore[union-attr]
        self.dropout = size.dropout
        self.tokens, self.languages = ours.token_embedding, ours.language_embedding
        self.positions = ours.position_embedding
        self.layers = nn.ModuleList()
        for layer in ours.layers:
            parts = nn.ModuleDict()
            qkv = layer.attention.qkv_proj  # type: ignore[union-attr]
            for i, name in enumerate(("query", "key", "value")):
                rows = slice(i * dim, (i + 1) * dim)
                parts[name] = linear(qkv.weight[rows], qkv.bias[rows])
            parts["out"] = layer.attention.out_proj  # type: ignore[union-attr]
            parts["norm1"], parts["norm2"] = layer.attention_norm, layer.ffn_norm  # type: ignore[assignment]
            parts["fc1"], parts["fc2"] = layer.ffn.fc1, layer.ffn.fc2  # type: ignore[union-attr]
            self.layers.append(parts)
        self.head, self.output_bias = ours.head, ours.head.output_bias

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def attend(self, layer: Any, x: Tensor) -> Tensor:
        length, rows, dim = x.shape
        size = dim // self.heads

        def heads(y: Tensor) -> Tensor:  # (B * heads, T, size)
            return y.contiguous().view(length, rows * self.heads, size).transpose(0, 1)

        query = heads(layer["query"](x) * size**-0.5)
        weights = torch.bmm(query, heads(layer["key"](x)).transpose(1, 2))
        probabilities = F.softmax(weights, dim=-1, dtype=torch.float32).type_as(weights)
        out = torch.bmm(self.drop(probabilities), heads(layer["value"](x)))
        projected: Tensor = layer["out"](out.transpose(0, 1).contiguous().view(length, rows, dim))
        return projected

    def forward(self, batch: MaskedBatch) -> Tensor:
        """Logits of every position (B, T, V)."""
        ids = batch.input_ids
        padding = ids.eq(PAD)
        if not padding.any():  # a host synchronisation, as there
            padding = None  # type: ignore[assignment]
        assert self.positions is not None
        places = torch.cumsum(ids.ne(PAD).int(), dim=1).long() + (FIRST_POSITION_ROW - 1)
        x = self.tokens(ids) + self.positions(places) + self.languages(batch.languages)[:, None]
        x = self.drop(x)
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer["norm1"](x + self.drop(self.attend(layer, x)))  # type: ignore[index, operator]
            inner = F.gelu(layer["fc1"](x).float()).type_as(x)  # type: ignore[index, operator]
            x = layer["norm2"](x + self.drop(layer["fc2"](inner)))  # type: ignore[index, operator]
        x = x.transpose(0, 1)
        x = self.head.norm(F.gelu(self.head.transform(x).float()).type_as(x))
        return F.linear(x, self.tokens.weight) + self.output_bias


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.t().shape)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


class FairseqAdam:
    """Adam tensor by tensor in fp32, as fairseq's own without apex."""

    def __init__(self, masters: Iterable[Tensor]) -> None:
        self.state = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in masters]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        correction = math.sqrt(1 - BETA2**self.steps) / (1 - BETA1**self.steps)
        for parameter, first, second in self.state:
            gradient = parameter.grad
            assert gradient is not None
            first.mul_(BETA1).add_(gradient, alpha=1 - BETA1)
            second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            parameter.addcdiv_(first, second.sqrt().add_(EPS), value=-LR * correction)


def fairseq_update(size: Size, dtype: torch.dtype, device: torch.device) -> Update:
    """fp32 as the recipe is printed; a lower `dtype` as with its --bf16: one flat fp32 master of all parameters."""
    model = FairseqLike(size.model(), size).to(device)
    parameters = list(model.parameters())
    flat = (
        torch.cat([p.detach().float().flatten() for p in parameters])
        if dtype != torch.float32
        else None
    )
    model.to(dtype)
    model.train()
    adam = FairseqAdam(parameters if flat is None else [flat])

    def update(batch: MaskedBatch) -> Tensor:
        logits = model(batch).flatten(0, 1)
        targets = torch.full_like(batch.input_ids, PAD).flatten()
        targets[batch.masked_positions] = batch.targets
        log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        count = int(targets.ne(PAD).sum())  # a host synchronisation, as there
        loss = F.nll_loss(log_p, targets, reduction="sum", ignore_index=PAD) / count
        loss.backward()
        if flat is not None:
            flat.grad = torch.cat([p.grad.flatten() for p in parameters]).float()  # type: ignore[union-attr]
        torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(p.grad) for p, _, _ in adam.state])  # type: ignore[arg-type]
        )
        adam.step()
        if flat is not None:
            with torch.no_grad():
                sizes = [p.numel() for p in parameters]
                for parameter, values in zip(parameters, flat.split(sizes), strict=True):
                    parameter.copy_(values.view_as(parameter))
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return Update(model, update)


# --------------------------------------------------------------------------------------- HF's XLM


def huggingface_update(size: Size, dtype: torch.dtype, device: torch.device) -> Update:
    """XLMWithLMHeadModel of the same size with torch's fused AdamW, the Trainer's default; a lower `dtype` by autocast,
    as with its --bf16.
    """
    from transformers import XLMConfig, XLMWithLMHeadModel

    config = XLMConfig(
        vocab_size=size.vocab_size,
        emb_dim=size.dim,
        n_layers=size.layers,
        n_heads=size.shape().attention_heads,
        n_langs=LANGUAGES,
        dropout=size.dropout,
        attention_dropout=size.dropout,
        max_position_embeddings=max(512, size.tokens),
        pad_index=PAD,
    )
    torch.manual_seed(1)
    model = XLMWithLMHeadModel(config).to(device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def update(batch: MaskedBatch) -> Tensor:
        labels = torch.full_like(batch.input_ids, -100)
        labels.view(-1)[batch.masked_positions] = batch.targets
        langs = batch.languages[:, None].expand_as(batch.input_ids)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss: Tensor = model(batch.input_ids, langs=langs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Update(model, update)
