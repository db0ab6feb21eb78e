"""A trained network in our terms, whatever it comes from, and the names that peers have for its tensors.

    network = Network(shape=…, weights=…, dictionary=…, languages=("ar", "de"), companions={})
    state = state_of(network.weights, network.shape, FAIRSEQ)       # fairseq's names
    weights = weights_from(state, network.shape, FAIRSEQ, "model.pt")

A peer's row of the dictionary is found by its symbol, and its row of positions by what it stands for, so that all
conversions go through this one form. Sources of the names: spec of each peer beside its table.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from xlm_ds.architectures import ARCHITECTURES, ActivationName, ModelShape
from xlm_ds.config import check_languages
from xlm_ds.dictionary import PAD, Dictionary
from xlm_ds.log import InputError
from xlm_ds.model import XlmEncoder

MADE_WITH = ("configuration", "blocks", "batch_samples")
# Of our special symbols, what XLM calls them: its mask is <special1> (xlm/model/__init__.py, params.mask_index).
XLM_NAMES_OF_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<special1>")

State: TypeAlias = Mapping[str, Tensor]
Logits: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Scores (B, T, V) of ids (B, T) padded with PAD, in languages (B,): our ids and languages, whoever computes them.

In float64: in fp32 the rounding alone of 16 layers of 1,280 comes to 1.6e-4 where scores reach 44.
"""


@dataclass(frozen=True, kw_only=True)
class Network:
    """All that is known of a trained network."""

    shape: ModelShape
    weights: State  # fp32, by the names of our parameters
    dictionary: Dictionary
    languages: tuple[str, ...]
    companions: Mapping[str, bytes] = field(default_factory=dict)  # codes, bpe_vocab, prepare.json
    made_with: Mapping[str, Any] = field(default_factory=dict)  # of our manifests: MADE_WITH
    remarks: tuple[str, ...] = ()  # what its source has and it has not, a sentence each

    def save_text_files(self, folder: Path) -> None:
        """Writes dict.txt and the companions."""
        self.dictionary.save(folder / "dict.txt")
        for name, content in self.companions.items():
            (folder / name).write_bytes(content)


class Names(NamedTuple):
    """Where a peer keeps our parameters; `{}` is a layer's number.

    Without `.weight` and `.bias`, but for the output's bias.
    """

    tokens: str
    positions: str
    languages: str
    embedding_norm: str
    query: str
    key: str
    value: str
    attention_out: str
    attention_norm: str
    fc1: str
    fc2: str
    ffn_norm: str
    transform: str
    head_norm: str
    output_bias: str
    first_position_row: int
    tied: tuple[
        str, ...
    ] = ()  # copies of tokens.weight and of output_bias, which are the same or not there


# fairseq 3d262bb, legacy/masked_lm.py and transformer_sentence_encoder.py.
FAIRSEQ = Names(
    tokens="encoder.sentence_encoder.embed_tokens",
    positions="encoder.sentence_encoder.embed_positions",
    languages="encoder.sentence_encoder.segment_embeddings",
    embedding_norm="encoder.sentence_encoder.emb_layer_norm",
    query="encoder.sentence_encoder.layers.{}.self_attn.q_proj",
    key="encoder.sentence_encoder.layers.{}.self_attn.k_proj",
    value="encoder.sentence_encoder.layers.{}.self_attn.v_proj",
    attention_out="encoder.sentence_encoder.layers.{}.self_attn.out_proj",
    attention_norm="encoder.sentence_encoder.layers.{}.self_attn_layer_norm",
    fc1="encoder.sentence_encoder.layers.{}.fc1",
    fc2="encoder.sentence_encoder.layers.{}.fc2",
    ffn_norm="encoder.sentence_encoder.layers.{}.final_layer_norm",
    transform="encoder.lm_head_transform_weight",
    head_norm="encoder.layer_norm",
    output_bias="encoder.lm_output_learned_bias",
    first_position_row=2,
    tied=("encoder.embed_out.weight",),
)
# XLM cd281d3, xlm/model/transformer.py.
XLM = Names(
    tokens="embeddings",
    positions="position_embeddings",
    languages="lang_embeddings",
    embedding_norm="layer_norm_emb",
    query="attentions.{}.q_lin",
    key="attentions.{}.k_lin",
    value="attentions.{}.v_lin",
    attention_out="attentions.{}.out_lin",
    attention_norm="layer_norm1.{}",
    fc1="ffns.{}.lin1",
    fc2="ffns.{}.lin2",
    ffn_norm="layer_norm2.{}",
    transform="",
    head_norm="",
    output_bias="pred_layer.proj.bias",
    first_position_row=0,
    tied=("pred_layer.proj.weight",),
)
# transformers 5.23.0, models/bert.
HF_BERT = Names(
    tokens="bert.embeddings.word_embeddings",
    positions="bert.embeddings.position_embeddings",
    languages="bert.embeddings.token_type_embeddings",
    embedding_norm="bert.embeddings.LayerNorm",
    query="bert.encoder.layer.{}.attention.self.query",
    key="bert.encoder.layer.{}.attention.self.key",
    value="bert.encoder.layer.{}.attention.self.value",
    attention_out="bert.encoder.layer.{}.attention.output.dense",
    attention_norm="bert.encoder.layer.{}.attention.output.LayerNorm",
    fc1="bert.encoder.layer.{}.intermediate.dense",
    fc2="bert.encoder.layer.{}.output.dense",
    ffn_norm="bert.encoder.layer.{}.output.LayerNorm",
    transform="cls.predictions.transform.dense",
    head_norm="cls.predictions.transform.LayerNorm",
    output_bias="cls.predictions.bias",
    first_position_row=0,
    tied=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
)

# ------------------------------------------------------------------------------------- there and back


def correspondence(shape: ModelShape, names: Names) -> dict[str, tuple[str, ...]]:
    """Of each of our parameters the peer's tensors that it consists of, one after another."""
    tables = {"token_embedding": names.tokens}
    if shape.num_segment:
        tables["language_embedding"] = names.languages
    if shape.token_positions:
        tables["position_embedding"] = names.positions
    modules: dict[str, tuple[str, ...]] = {}
    if shape.normalize_embeddings:
        modules["embedding_norm"] = (names.embedding_norm,)
    for layer in range(shape.layers):
        ours = f"layers.{layer}"
        modules[f"{ours}.attention.qkv_proj"] = (names.query, names.key, names.value)
        modules[f"{ours}.attention.out_proj"] = (names.attention_out,)
        modules[f"{ours}.attention_norm"] = (names.attention_norm,)
        modules[f"{ours}.ffn.fc1"] = (names.fc1,)
        modules[f"{ours}.ffn.fc2"] = (names.fc2,)
        modules[f"{ours}.ffn_norm"] = (names.ffn_norm,)
        for module in [name for name in modules if name.startswith(f"{ours}.")]:
            modules[module] = tuple(name.format(layer) for name in modules[module])
    if shape.head_transform:
        modules["head.transform"] = (names.transform,)
        modules["head.norm"] = (names.head_norm,)
    return {
        **{f"{ours}.weight": (f"{theirs}.weight",) for ours, theirs in tables.items()},
        **{
            f"{ours}.{part}": tuple(f"{name}.{part}" for name in theirs)
            for ours, theirs in modules.items()
            for part in ("weight", "bias")
        },
        "head.output_bias": (names.output_bias,),
    }


def weights_from(
    state: State, shape: ModelShape, names: Names, where: str, *, parts: bool = False
) -> dict[str, Tensor]:
    """Our parameters, fp32, of a peer's tensors; the rows of the dictionary stay in the peer's order.

    Raises InputError if a tensor is not there (unless `parts` are enough), has another shape than `shape` gives it, or
    is not finite.
    """
    wanted = parameter_shapes(shape)
    weights = {}
    for ours, theirs in correspondence(shape, names).items():
        missing = [name for name in theirs if name not in state]
        if missing and parts:
            continue
        if missing:
            raise InputError(f"{where}: has no {missing[0]}, which its other tensors ask for")
        found = torch.cat([state[name].float() for name in theirs])
        if ours == "position_embedding.weight":
            found = moved_positions(found, names.first_position_row, shape.first_position_row)
        if found.shape != wanted[ours]:
            raise InputError(
                f"{where}: {theirs[0]} makes {ours} {tuple(found.shape)}, expected {tuple(wanted[ours])}"
            )
        if not bool(found.isfinite().all()):
            raise InputError(f"{where}: {theirs[0]} is not finite; use another checkpoint")
        weights[ours] = found
    return weights


def state_of(weights: State, shape: ModelShape, names: Names) -> dict[str, Tensor]:
    """The peer's tensors, of our parameters; without the copies that tied ones have."""
    state = {}
    for ours, theirs in correspondence(shape, names).items():
        found = weights[ours]
        if ours == "position_embedding.weight":
            found = moved_positions(found, shape.first_position_row, names.first_position_row)
        for name, part in zip(theirs, found.chunk(len(theirs)), strict=True):
            state[name] = part.contiguous()
    return state


def moved_positions(table: Tensor, first: int, wanted: int) -> Tensor:
    """A position table whose first position is in row `first`, with it in row `wanted`; rows before it are 0."""
    if first == wanted:
        return table
    return torch.cat([table.new_zeros(wanted, table.shape[1]), table[first:]])


def parameter_shapes(shape: ModelShape) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in XlmEncoder(shape).named_parameters()}


def left_over(state: State, shape: ModelShape, names: Names) -> list[str]:
    """The peer's tensors that none of our parameters is made of, nor is a copy of one."""
    used = {name for theirs in correspondence(shape, names).values() for name in theirs}
    return sorted(set(state) - used - set(names.tied))


def check_tied(state: State, names: Names, where: str) -> None:
    """Raises InputError if the output has a matrix of its own, which no network here has."""
    for name in names.tied:
        original = names.output_bias if name.endswith("bias") else f"{names.tokens}.weight"
        if name in state and original in state and not torch.equal(state[name], state[original]):
            raise InputError(
                f"{where}: {name} is another tensor than {original}; here the output's matrix is the token embedding"
            )


def architecture_of(shape: ModelShape) -> str | None:
    """The name of the architecture that a network of this shape can be built from, with flags for its sizes."""
    for name, known in ARCHITECTURES.items():
        fixed = (known.first_position_row, known.layer_norm_eps, known.head_transform)
        if fixed == (shape.first_position_row, shape.layer_norm_eps, shape.head_transform) and (
            shape.normalize_embeddings or not known.normalize_embeddings
        ):
            return name
    return None


# ------------------------------------------------------------------------------- of a peer's tensors


def network_from(
    state: State,
    shape: ModelShape,
    names: Names,
    dictionary: Dictionary,
    languages: tuple[str, ...],
    where: str,
    remarks: Sequence[str] = (),
    *,
    parts: bool = False,
) -> Network:
    """A peer's network; `state` has the rows of `dictionary`. Raises InputError as weights_from and check_tied."""
    check_tied(state, names, where)
    odd = next((s for s in dictionary.symbols if s.splitlines() != [s] or s != s.rstrip()), None)
    if odd is not None:
        raise InputError(f"{where}: {odd!r:.60} is a piece that no line of a dictionary can have")
    if 0 < shape.num_segment < len(languages):
        raise InputError(
            f"{where}: has {shape.num_segment} rows of languages for {len(languages)} languages; "
            "it is damaged, or --langs names too many"
        )
    return Network(
        shape=shape,
        weights=weights_from(state, shape, names, where, parts=parts),
        dictionary=dictionary,
        languages=languages,
        remarks=tuple(remarks),
    )


def with_rows(state: State, rows: Sequence[int], names: Names) -> dict[str, Tensor]:
    """A peer's tensors with the given rows of its dictionary, in this order, also of the copies."""
    chosen = torch.tensor(rows)
    by_word = {f"{names.tokens}.weight", names.output_bias, *names.tied}
    return {name: value[chosen] if name in by_word else value for name, value in state.items()}


class Hints(NamedTuple):
    """What a model may not say of itself."""

    dictionary: Path | None = None
    languages: Sequence[str] = ()  # by their ids; as many as it has
    otherwise: Sequence[str] | None = None  # its languages if it names none and has no rows of them
    parts: bool = False  # what there is of it is enough, and what no network here has is left out


NO_HINTS = Hints()


def languages_of(
    own: Sequence[str], hints: Hints, where: str, *, has_rows: bool
) -> tuple[str, ...]:
    """By id: those of the hints, or the model's own. Raises InputError if there are none, or another number of them.

    `has_rows`: whether it has a row for each. Where `hints.otherwise` is given, such rows may be without a name.
    """
    given = hints.languages
    if not own and not given and hints.otherwise is not None:
        return () if has_rows else tuple(hints.otherwise)
    if not own and not given:
        raise InputError(
            f"{where}: does not say which languages it knows; give them with --langs, by their ids"
        )
    if own and given and len(own) != len(given):
        raise InputError(
            f"--langs {','.join(given)}: {where} has {len(own)} languages, {','.join(own)}"
        )
    languages = tuple(given or own)
    check_languages(languages, "--langs")
    return languages


def names_by_id(ids: Any, where: str) -> list[str]:
    """Of {name: id}, whose ids must be 0, 1, 2, …; [] where there is nothing."""
    by_id = (
        {int(number): str(name) for name, number in ids.items()} if isinstance(ids, dict) else {}
    )
    if ids and (not by_id or set(by_id) != set(range(len(ids)))):
        raise InputError(f"{where}: the ids of its languages are not 0, 1, 2, …: {ids!r:.100}")
    return [by_id[number] for number in range(len(by_id))]


def matrix_of(state: State, name: str, where: str) -> Tensor:
    if name not in state or state[name].dim() != 2:
        raise InputError(f"{where}: has no matrix {name}, so it is no model that is read here")
    return state[name]


def sizes_of(state: State, names: Names, where: str) -> dict[str, Any]:
    """What of a ModelShape the shapes of the peer's tensors say, but for its positions."""
    table = matrix_of(state, f"{names.tokens}.weight", where)
    segments = state.get(f"{names.languages}.weight")
    prefix, _, _ = names.query.partition("{}")
    layers = {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
    return {
        "vocab_size": len(table),
        "embed_dim": table.shape[1],
        "num_segment": 0 if segments is None else len(segments),
        "layers": len(layers),
        "ffn_embed_dim": len(matrix_of(state, f"{names.fc1.format(0)}.weight", where)),
    }


def whole_number_of(settings: Mapping[str, Any], name: str, where: str) -> int:
    value = settings.get(name)
    if type(value) is not int or value < 1:
        raise InputError(f"{where}: its settings have no {name}, without which it cannot be read")
    return value


def share_of(settings: Mapping[str, Any], name: str) -> float:
    """A dropout, which decides nothing but how the model is trained on; 0 where it is not said."""
    value = settings.get(name)
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 else 0.0


def activation_of(name: Any, where: str) -> ActivationName:
    if name not in ("gelu", "relu"):
        raise InputError(f"{where}: its activation is {name}; there is gelu and relu here")
    return cast(ActivationName, name)


def refuse_unknown(names: Sequence[str], where: str) -> None:
    """`names`: of tensors that are in no network here."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InputError(f"{where}: has {names[0]}{more}, which no network here has")


# --------------------------------------------------------------------------------- the other side


def peers_logits(state: State, shape: ModelShape, names: Names) -> Logits:
    """What a peer's network computes, from its own tensors by its own names, step by step as the peer has it.

    Not XlmEncoder, which it is compared with. `state` has the rows of our dictionary.
    """

    def part(name: str, layer: int | None = None) -> tuple[Tensor, Tensor]:
        name = name if layer is None else name.format(layer)
        return state[f"{name}.weight"].double(), state[f"{name}.bias"].double()

    def norm(hidden: Tensor, name: str, layer: int | None = None) -> Tensor:
        return F.layer_norm(hidden, hidden.shape[-1:], *part(name, layer), eps=shape.layer_norm_eps)

    activation = F.gelu if shape.activation_fn == "gelu" else F.relu

    @torch.no_grad()
    def logits(ids: Tensor, languages: Tensor) -> Tensor:
        keep = ids != PAD
        table = state[f"{names.tokens}.weight"].double()
        hidden = table[ids]
        if shape.token_positions:
            rows = (keep.cumsum(dim=1) - 1 + names.first_position_row).clamp(min=0)
            hidden = hidden + state[f"{names.positions}.weight"].double()[rows]
        if shape.num_segment:
            hidden = hidden + state[f"{names.languages}.weight"].double()[languages][:, None]
        if shape.normalize_embeddings:
            hidden = norm(hidden, names.embedding_norm)
        hidden = hidden * keep[:, :, None]
        for layer in range(shape.layers):
            query, key, value = (
                F.linear(hidden, *part(name, layer)).view(*ids.shape, shape.attention_heads, -1)
                for name in (names.query, names.key, names.value)
            )
            scores = torch.einsum("bthd,bshd->bhts", query, key) / math.sqrt(query.shape[-1])
            weights = scores.masked_fill(~keep[:, None, None], -math.inf).softmax(dim=-1)
            context = torch.einsum("bhts,bshd->bthd", weights, value).flatten(2)
            attended = F.linear(context, *part(names.attention_out, layer))
            hidden = norm(hidden + attended, names.attention_norm, layer)
            inner = activation(F.linear(hidden, *part(names.fc1, layer)))
            hidden = norm(hidden + F.linear(inner, *part(names.fc2, layer)), names.ffn_norm, layer)
        if shape.head_transform:
            hidden = norm(activation(F.linear(hidden, *part(names.transform))), names.head_norm)
        return F.linear(hidden, table, state[names.output_bias].double())

    return logits
