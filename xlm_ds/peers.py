"""Opens a model of fairseq, XLM or Hugging Face, or one of ours, as a Network and as what computes its scores.

    opened = open_model(Path("mlm_xnli15_1024.pth"))
    opened.network.languages, opened.network.shape
    opened.logits(ids, languages)                 # (B, T, V), computed as the peer does

What a path is, its content says: a run's or a checkpoint's folder, one with config.json, or a file of torch.save.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from xlm_ds.architectures import FIRST_POSITION_ROW, ModelShape
from xlm_ds.checkpoint import (
    BEST,
    LAST,
    check_files,
    checkpoint_folder,
    load_tensors,
    read_configuration,
    read_manifest,
)
from xlm_ds.dictionary import SPECIAL_SYMBOLS, Dictionary
from xlm_ds.evaluate import load_model, shape_of
from xlm_ds.exchange import (
    FAIRSEQ,
    MADE_WITH,
    NO_HINTS,
    XLM,
    XLM_NAMES_OF_SPECIALS,
    Hints,
    Logits,
    Network,
    State,
    activation_of,
    languages_of,
    left_over,
    matrix_of,
    names_by_id,
    network_from,
    peers_logits,
    refuse_unknown,
    share_of,
    sizes_of,
    whole_number_of,
    with_rows,
)
from xlm_ds.hugging_face import open_hugging_face
from xlm_ds.log import InputError
from xlm_ds.model import XlmEncoder
from xlm_ds.pair_record import COMPANIONS, load_companions
from xlm_ds.torch_model import SavedModel, opened_torch_model
from xlm_ds.xlm_pth import XLM_SPECIALS


class Opened(NamedTuple):
    kind: str
    network: Network
    logits: Logits


def open_model(path: Path, hints: Hints = NO_HINTS) -> Opened:
    """Raises InputError, OSError."""
    if (path / "manifest.json").exists() or (path / BEST).exists():
        _refuse_hints(path, "a model of ours", hints.dictionary, hints.languages)
        return open_ours(path)
    if (path / LAST).exists():
        raise InputError(f"{path}: is a run without {BEST} so far; give {path / LAST}")
    try:
        return _open_peers(path, hints)
    except InputError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        # What strangers have written can be wrong in more ways than can be foreseen.
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(
            f"{path}: is damaged, or of a kind that is not read here ({what:.200})"
        ) from error


def _open_peers(path: Path, hints: Hints) -> Opened:
    if (path / "config.json").exists():
        _refuse_hints(path, "a model of Hugging Face", hints.dictionary)
        return Opened("Hugging Face", *open_hugging_face(path, hints))
    if not path.exists():
        raise InputError(f"{path}: no such file or folder (nothing is downloaded)")
    if path.suffix == ".safetensors":
        raise InputError(f"{path}: is weights alone; give the folder that it is in")
    if path.is_dir():
        files = sorted([*path.glob("*.pt"), *path.glob("*.pth")])
        if len(files) != 1:
            raise InputError(
                f"{path}: is no model: it has neither manifest.json (ours) nor config.json (Hugging Face), and "
                f"{len(files)} files of torch (.pt or .pth), expected one"
            )
        path = files[0]
    with opened_torch_model(path) as saved:
        state = load_file(saved.tensors)
        if "params" in saved.settings:
            _refuse_hints(path, "a model of XLM", hints.dictionary)
            return open_xlm(path, saved, state, hints)
        if {"args", "cfg"} & set(saved.settings):
            return open_fairseq(path, saved, state, hints)
    raise InputError(
        f"{path}: has neither params (XLM) nor args or cfg (fairseq) beside its weights; of Hugging Face give the "
        "folder with config.json"
    )


def _refuse_hints(
    path: Path, what: str, dictionary: Path | None, languages: Sequence[str] = ()
) -> None:
    if dictionary is not None or languages:
        flag = "--dict" if dictionary is not None else "--langs"
        raise InputError(f"{flag}: {path} is {what}, which has its own; leave it out")


# ------------------------------------------------------------------------------------------- ours


def open_ours(path: Path) -> Opened:
    folder = checkpoint_folder(path).resolve()
    manifest = read_manifest(folder)
    trained = read_configuration(folder, manifest)
    there = [name for name in ("dict.txt", *COMPANIONS) if name in manifest["sha256"]]
    check_files(folder, manifest, there)
    dictionary = Dictionary.load(folder / "dict.txt")
    languages = tuple(manifest["languages"])
    network = Network(
        shape=shape_of(trained, vocab_size=len(dictionary), languages=len(languages)),
        weights=dict(load_tensors(folder, manifest, "weight")),
        dictionary=dictionary,
        languages=languages,
        companions={name: (folder / name).read_bytes() for name in there if name != "dict.txt"},
        made_with={key: manifest[key] for key in MADE_WITH},
    )
    return Opened("xlm_ds", network, our_logits(lambda: load_model(folder, len(dictionary))[0]))


def our_logits(load: Callable[[], XlmEncoder]) -> Logits:
    """Loads the network when it is first asked."""
    load = functools.cache(load)

    @torch.no_grad()
    def logits(ids: Tensor, languages: Tensor) -> Tensor:
        model = load().double()
        hidden = model.head(model.encode(ids, languages))
        return F.linear(hidden, model.token_embedding.weight, model.head.output_bias)

    return logits


# ---------------------------------------------------------------------------------------- fairseq

# Of the sentence loss and of what computes it, which the recipe switches off (--masked-lm-only).
_UNUSED = ("encoder.masked_lm_pooler.", "encoder.sentence_projection_layer.")
_FUSED = "self_attn.in_proj_"  # fairseq before 2019-11: queries, keys and values in one


def open_fairseq(path: Path, saved: SavedModel, state: State, hints: Hints) -> Opened:
    where = str(path)
    state = _with_separate_projections(state)
    given = _fairseq_settings(saved.settings)
    sizes = sizes_of(state, FAIRSEQ, where)
    positions = state.get(f"{FAIRSEQ.positions}.weight")
    if positions is None and not given.get("no_token_positional_embeddings"):
        raise InputError(
            f"{path}: has no {FAIRSEQ.positions}.weight: its positions are computed, not learnt, and no network here "
            "has such"
        )
    shape = ModelShape(
        **sizes,
        max_positions=whole_number_of(given, "tokens_per_sample", where)
        if positions is None
        else len(positions) - FIRST_POSITION_ROW,
        attention_heads=whole_number_of(given, "encoder_attention_heads", where),
        dropout=share_of(given, "dropout"),
        attention_dropout=share_of(given, "attention_dropout"),
        activation_dropout=share_of(given, "act_dropout"),
        activation_fn=activation_of(given.get("activation_fn"), where),
        token_positions=positions is not None,
        normalize_embeddings=f"{FAIRSEQ.embedding_norm}.weight" in state,
    )
    unknown = left_over(state, shape, FAIRSEQ)
    unused = [name for name in unknown if name.startswith(_UNUSED)]
    if not hints.parts:
        refuse_unknown(sorted(set(unknown) - set(unused)), where)
    own = given.get("monolingual_langs") or ()
    known = [name.strip() for name in (own.split(",") if isinstance(own, str) else own)]
    network = network_from(
        state,
        shape,
        FAIRSEQ,
        _dictionary_beside(path, hints.dictionary, shape.vocab_size),
        languages_of(known, hints, where, has_rows=shape.num_segment > 0),
        where,
        [f"left out: {', '.join(unknown)}"] if unknown else (),
        parts=hints.parts,
    )
    if hints.dictionary is None:  # what convert --to fairseq has put beside it
        network = dataclasses.replace(network, companions=load_companions(path.parent))
    return Opened("fairseq", network, peers_logits(state, shape, FAIRSEQ))


def _fairseq_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flags by name: of args, or of cfg with its sections."""
    given: dict[str, Any] = {}
    config = settings.get("cfg")
    for section in config.values() if isinstance(config, dict) else ():
        given |= section if isinstance(section, dict) else {}
    args = settings.get("args")
    return given | args if isinstance(args, dict) else given


def _with_separate_projections(state: State) -> dict[str, Tensor]:
    result = {}
    for name, value in state.items():
        if _FUSED in name:
            for part, values in zip("qkv", value.chunk(3), strict=True):
                result[name.replace(_FUSED, f"self_attn.{part}_proj.")] = values
        else:
            result[name] = value
    return result


def _dictionary_beside(path: Path, given: Path | None, rows: int) -> Dictionary:
    file = given or path.parent / "dict.txt"
    if given is None and not file.exists():
        raise InputError(
            f"{path}: fairseq keeps the dictionary beside the data, not in the model; give it with --dict"
        )
    dictionary = Dictionary.load(file, on_duplicate="skip")
    if len(dictionary) != rows:
        raise InputError(
            f"{file}: has {len(dictionary)} rows with the special symbols, and {path} has {rows}; give the dict.txt of "
            "the data that it was trained on"
        )
    return dictionary


# -------------------------------------------------------------------------------------------- XLM


def open_xlm(path: Path, saved: SavedModel, state: State, hints: Hints) -> Opened:
    where = str(path)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    params = saved.settings["params"]
    if not isinstance(params, dict):
        raise InputError(f"{path}: its params are no dictionary; is it a checkpoint of XLM?")
    for flag, what in (("asm", "an adaptive softmax"), ("use_memory", "memory layers")):
        if params.get(flag):
            raise InputError(f"{path}: was trained with {what} ({flag}), which no network here has")
    table = matrix_of(state, f"{XLM.tokens}.weight", where)
    place = {word: number for number, word in enumerate(saved.words)}
    if saved.words[: len(XLM_SPECIALS)] != XLM_SPECIALS or len(place) != len(table):
        raise InputError(
            f"{path}: its dictionary of {len(place)} words does not fit its {len(table)} rows, or does not begin with "
            "XLM's special words"
        )
    words = [word for word in saved.words[len(XLM_SPECIALS) :] if word not in SPECIAL_SYMBOLS]
    rows = [place[word] for word in (*XLM_NAMES_OF_SPECIALS, *words)]
    counts = [1] * len(SPECIAL_SYMBOLS) + [saved.counts[place[word]] for word in words]
    state = with_rows(state, rows, XLM)
    shape = ModelShape(
        **sizes_of(state, XLM, where),
        max_positions=len(matrix_of(state, f"{XLM.positions}.weight", where)),
        attention_heads=whole_number_of(params, "n_heads", where),
        dropout=share_of(params, "dropout"),
        attention_dropout=share_of(params, "attention_dropout"),
        activation_dropout=0.0,
        activation_fn="gelu" if params.get("gelu_activation") else "relu",
        token_positions=True,
        first_position_row=0,
        normalize_embeddings=True,
        layer_norm_eps=1e-12,
        head_transform=False,
        initialisation="xlm",
    )
    unknown = left_over(state, shape, XLM)
    if not hints.parts:
        refuse_unknown(unknown, where)
    by_id = params.get("id2lang")
    by_name = {name: number for number, name in by_id.items()} if isinstance(by_id, dict) else None
    network = network_from(
        state,
        shape,
        XLM,
        Dictionary((*SPECIAL_SYMBOLS, *words), tuple(counts)),
        languages_of(names_by_id(by_name, where), hints, where, has_rows=shape.num_segment > 0),
        where,
        [f"left out: {', '.join([f'{len(place) - len(rows)} rows of special words', *unknown])}"],
        parts=hints.parts,
    )
    return Opened("XLM", network, peers_logits(state, shape, XLM))
