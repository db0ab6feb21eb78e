"""Every knob, on one page. Flags, TOML keys and --help are generated from these frozen dataclasses.

The names are those of fairseq's recipe; there is no second set to translate. A value comes from the flag, else from the
TOML file given with --config, else from the default here:

    config = parse(TrainConfig, ["OUT", "--lr", "1e-4", "--monolingual-langs", "ar,de"])
    config.optimization.lr  # 0.0001
"""

import argparse
import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from xlm_ds.log import InputError, logger

Config = TypeVar("Config")


def knob(
    help: str,
    *,
    default: Any = MISSING,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    positional: bool = False,
    aliases: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is also a flag; without a default it must be given."""
    metadata = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "positional": positional,
        "aliases": aliases,
    }
    return field(default=default, metadata=metadata)


class Answered(NamedTuple):
    """A flag of the recipe that no longer decides anything: accepted, and answered with one line."""

    flag: str
    takes_value: bool
    answer: str


# --------------------------------------------------------------------------------------- binarize


@dataclass(frozen=True, slots=True, kw_only=True)
class BinarizeConfig:
    """fairseq-preprocess, as far as the cross-lingual recipe uses it."""

    task: str = knob("kind of data", default="cross_lingual_lm", choices=("cross_lingual_lm",))
    langs: tuple[str, ...] = knob("languages to binarize in one go, as ar,de,en", default=())
    source_lang: str | None = knob(
        "one language (the recipe's loop); --langs does all at once", default=None, aliases=("-s",)
    )
    srcdict: Path | None = knob(
        "dictionary (lines `symbol count`); without it, one is built from the training text",
        default=None,
    )
    trainpref: str | None = knob("training text is PREF.LANG", default=None)
    validpref: str | None = knob("validation text is PREF.LANG", default=None)
    testpref: str | None = knob("test text is PREF.LANG", default=None)
    destdir: Path = knob("folder for dict.txt and the .bin/.idx pairs")
    workers: int = knob(
        "threads; the bytes written do not depend on it (default: all cores)", default=0, minimum=0
    )
    dataset_impl: str = knob(
        "layout on disk: mmap is MMIDIDX (ids as uint16/uint32), lazy and cached are TNTIDX (int32)",
        default="mmap",
        choices=("mmap", "lazy", "cached"),
    )
    max_vocab: int | None = knob(
        "keep only the first rows of the dictionary so that the model has N rows, our 5 special symbols included",
        default=None,
        minimum=6,
    )
    on_duplicate: str = knob(
        "a symbol that is twice in the dictionary: stop, or skip the later row as XLM does",
        default="error",
        choices=("error", "skip"),
    )
    thresholdsrc: int = knob("building: leave out words seen less often", default=0, minimum=0)
    nwordssrc: int = knob(
        "building: at most N symbols, special ones included (-1: all)", default=-1
    )
    padding_factor: int = knob(
        "building: fill up to a multiple of N with madeupword0000 …", default=8, minimum=1
    )


BINARIZE_ANSWERED = (
    Answered(
        "--only-source", False, ""
    ),  # it is all we do, and what the recipe means: nothing to say
    Answered("--target-lang", True, "--target-lang is ignored: there is no target side here"),
    Answered(
        "--joined-dictionary",
        False,
        "--joined-dictionary: one dict.txt serves all languages anyway",
    ),
)


# --------------------------------------------------------------------------------------- train


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is read, in which order, and what is masked."""

    data: Path = knob("folder with dict.txt and {train,valid}.LANG.{bin,idx}", positional=True)
    task: str = knob("kind of data", default="cross_lingual_lm", choices=("cross_lingual_lm",))
    monolingual_langs: tuple[str, ...] = knob(
        "languages, as ar,de,en; the order typed gives the language ids (default: all in the folder)",
        default=(),
    )
    tokens_per_sample: int = knob(
        "length of a sample: one eos and N - 1 tokens of text", default=256, minimum=2
    )
    sample_break_mode: str = knob(
        "none: blocks run across lines; eos: one line per sample, cut at --tokens-per-sample",
        default="none",
        choices=("none", "eos"),
    )
    sampling_alpha: float = knob(
        "a language with n blocks is drawn with p ∝ n^ALPHA (0.7: XLM paper; 0: uniform, as fairseq; 1: natural)",
        default=0.7,
        minimum=0,
    )
    mask_ratio: float = knob("share of a sample's tokens to predict", default=0.15, minimum=0)
    seed: int = knob("decides initial weights, order, masks and dropout", default=0, minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of the network; what is not given is the architecture's."""

    arch: str = knob("named sizes", default="xlm_base", choices=("xlm_base",))
    encoder_layers: int | None = knob("layers", default=None, minimum=1)
    encoder_embed_dim: int | None = knob("width", default=None, minimum=1)
    encoder_ffn_embed_dim: int | None = knob(
        "width inside the feed-forward part", default=None, minimum=1
    )
    encoder_attention_heads: int | None = knob("attention heads", default=None, minimum=1)
    dropout: float = knob(
        "dropout after embeddings, attention and feed-forward", default=0.1, minimum=0
    )
    attention_dropout: float = knob("dropout on attention weights", default=0.1, minimum=0)
    activation_dropout: float = knob(
        "dropout inside the feed-forward part", default=0.0, minimum=0, aliases=("--act-dropout",)
    )
    activation_fn: str | None = knob("activation", default=None, choices=("gelu", "relu"))
    num_segment: int | None = knob(
        "rows of the language embedding (default: the number of languages)", default=None, minimum=0
    )
    max_positions: int | None = knob(
        "rows of the position table (default: --tokens-per-sample)", default=None, minimum=1
    )
    no_token_positional_embeddings: bool = knob("no position embedding", default=False)
    encoder_normalize_before: bool = knob(
        "LayerNorm on the sum of the embeddings (layers stay post-LN)", default=False
    )
    init_output_bias: str = knob(
        "start of the output bias: log of the training unigram mixture, or zeros as fairseq",
        default="unigram",
        choices=("unigram", "zeros"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationConfig:
    """Batch, optimizer and learning rate: the numbers a DeepSpeed JSON must leave "auto"."""

    optimizer: str = knob(
        "optimizer (its class is the DeepSpeed JSON's)", default="adam", choices=("adam",)
    )
    max_tokens: int = knob(
        "tokens per rank and micro-batch: floor(N / tokens-per-sample) rows",
        default=2048,
        minimum=1,
    )
    update_freq: int = knob("micro-batches per update", default=1, minimum=1)
    global_batch_tokens: int | None = knob(
        "tokens per update over all ranks; decides the number of micro-batches instead of --update-freq",
        default=None,
        minimum=1,
    )
    max_update: int = knob("stop after N updates (0: no limit)", default=0, minimum=0)
    max_epoch: int = knob("stop after N epochs (0: no limit)", default=0, minimum=0)
    criterion: str = knob(
        "loss", default="legacy_masked_lm_loss", choices=("legacy_masked_lm_loss",)
    )
    lr: float = knob("learning rate", default=1e-4, minimum=0)
    adam_betas: tuple[float, float] = knob("Adam's betas", default=(0.9, 0.999))
    adam_eps: float = knob("Adam's epsilon (torch's form)", default=1e-8, minimum=0)
    weight_decay: float = knob("decoupled weight decay", default=0.0, minimum=0, aliases=("--wd",))
    clip_norm: float = knob("largest norm of the gradient (0: off)", default=0.0, minimum=0)
    lr_scheduler: str = knob(
        "learning rate over the run",
        default="reduce_lr_on_plateau",
        choices=("reduce_lr_on_plateau", "inverse_sqrt", "linear"),
    )
    warmup_updates: int = knob("updates of linear warm-up", default=0, minimum=0)
    warmup_init_lr: float = knob("learning rate at update 0 of the warm-up", default=0.0, minimum=0)
    decay_updates: int | None = knob(
        "linear: the last N updates decay to 0 (default: all after the warm-up)",
        default=None,
        minimum=0,
    )
    lr_shrink: float = knob("plateau: factor", default=0.1, minimum=0)
    lr_patience: int = knob(
        "plateau: shrink on the (N+1)-th validation without progress", default=0, minimum=0
    )
    lr_threshold: float = knob("plateau: relative progress that counts", default=1e-4, minimum=0)
    stop_min_lr: float = knob("stop when the learning rate is this low (-1: never)", default=-1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where the run lives, and when it saves, validates and speaks."""

    save_dir: Path = knob(
        "the run's folder: checkpoints, log, metrics, configuration", default=Path("checkpoints")
    )
    restore_file: str = knob(
        "checkpoint to continue from: a name in --save-dir, or a path", default="checkpoint_last"
    )
    save_interval: int = knob("save every N epochs", default=1, minimum=1)
    save_interval_updates: int = knob("also save every N updates (0: never)", default=0, minimum=0)
    no_epoch_checkpoints: bool = knob(
        "keep only checkpoint_last and checkpoint_best", default=False
    )
    keep_last_epochs: int = knob("keep the last N epoch checkpoints (-1: all)", default=-1)
    keep_interval_updates: int = knob(
        "keep the last N checkpoints of --save-interval-updates (-1: all)", default=-1
    )
    validate_interval: int = knob("validate every N epochs", default=1, minimum=1)
    validate_interval_updates: int = knob(
        "also validate every N updates (0: never)", default=0, minimum=0
    )
    log_interval: int = knob("one line every N updates", default=100, minimum=1)
    tensorboard_logdir: Path | None = knob(
        "TensorBoard's folder (default: SAVE_DIR/tensorboard)", default=None
    )
    deepspeed_config: Path | None = knob(
        "DeepSpeed JSON: ZeRO stage, precision, offload (default: fp32 ZeRO 1 on a CPU, bf16 ZeRO 1 on a GPU)",
        default=None,
    )
    local_rank: int = knob("set by the launcher", default=0, aliases=("--local-rank",))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    data: DataConfig
    model: ModelConfig
    optimization: OptimizationConfig
    run: RunConfig


TRAIN_ANSWERED = (
    Answered("--masked-lm-only", False, ""),  # the only objective there is: nothing to say
    Answered(
        "--dataset-impl",
        True,
        "--dataset-impl: the format is recognised from the files; the flag decides nothing",
    ),
    Answered(
        "--ddp-backend",
        True,
        "--ddp-backend: gradients go through DeepSpeed ZeRO; see --deepspeed_config",
    ),
    Answered(
        "--num-workers",
        True,
        "--num-workers: batches are filled in C++ as they are needed; there are no loader processes",
    ),
    Answered(
        "--fp16",
        False,
        "--fp16: precision is the DeepSpeed JSON's; give --deepspeed_config ds_configs/zero1_fp16.json",
    ),
    Answered(
        "--distributed-world-size",
        True,
        "--distributed-world-size: the launcher decides the number of ranks",
    ),
    Answered(
        "--required-batch-size-multiple",
        True,
        "--required-batch-size-multiple: no batch is dropped, so nothing needs a multiple",
    ),
    Answered("--deepspeed", False, ""),  # DeepSpeed's own examples pass it
)


# --------------------------------------------------------------------------------------- evaluate


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Perplexity and accuracy of a checkpoint on one split."""

    checkpoint: Path = knob("a checkpoint's folder", positional=True)
    data: Path = knob("folder with dict.txt and SPLIT.LANG.{bin,idx}", positional=True)
    split: str = knob("split to evaluate", default="test", choices=("train", "valid", "test"))
    monolingual_langs: tuple[str, ...] = knob("languages (default: the model's)", default=())
    mask_draws: int = knob("fixed mask draws to average over", default=3, minimum=1)
    max_tokens: int = knob(
        "tokens per rank and micro-batch; the result does not depend on it", default=8192, minimum=1
    )
    seed: int = knob("decides the mask draws", default=0, minimum=0)
    output: Path | None = knob(
        "JSON file for the figures (default: CHECKPOINT-SPLIT.json beside the checkpoint)",
        default=None,
    )
    local_rank: int = knob("set by the launcher", default=0, aliases=("--local-rank",))


# --------------------------------------------------------------------------------------- machinery


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    answered: tuple[Answered, ...] = (),
    description: str = "",
) -> Config:
    """`config_class` filled from `argv`, a TOML file named by --config, and the defaults, in this order.

    Raises InputError (with the nearest right name or value) for anything that does not fit.
    """
    parser = _Parser(
        prog=config_class.__name__.removesuffix("Config").lower(), description=description
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="values for flags not given"
    )
    for item in _knobs(config_class):
        _add_flag(parser, item, _kind(config_class, item))
    for entry in answered:
        action: dict[str, Any] = {} if entry.takes_value else {"action": "store_true"}
        parser.add_argument(entry.flag, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **action)
    given = vars(parser.parse_args(argv))
    toml = given.pop("config", None)
    for entry in answered:
        if given.pop(entry.flag.lstrip("-").replace("-", "_"), None) is not None and entry.answer:
            logger.info(entry.answer)
    values = {**(_read_toml(config_class, toml) if toml else {}), **given}
    for item in _knobs(config_class):
        if item.metadata["positional"] and item.name in given:
            values[item.name] = _from_text(given[item.name], _kind(config_class, item))
    return _build(config_class, values)


def from_dict(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`. Raises InputError on unknown keys or values out of range."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(value if isinstance(value, Mapping) else {key: value})
    converted = {}
    for item in _knobs(config_class):
        if item.name in flat:
            converted[item.name] = _from_plain(
                flat.pop(item.name), _kind(config_class, item), item.name
            )
    if flat:
        raise InputError(_unknown(next(iter(flat)), [k.name for k in _knobs(config_class)], "key"))
    return _build(config_class, converted)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON/TOML values, in sections as the dataclasses are nested; what is None is left out."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            result[item.name] = to_dict(value)
        elif value is not None:
            result[item.name] = str(value) if isinstance(value, Path) else value
    return result


def to_toml(config: Any) -> str:
    """The resolved configuration as a TOML file that --config reads back."""
    sections = to_dict(config)
    scalars = {k: v for k, v in sections.items() if not isinstance(v, dict)}
    blocks = [_toml_lines(scalars)] if scalars else []
    blocks += [f"[{k}]\n{_toml_lines(v)}" for k, v in sections.items() if isinstance(v, dict)]
    return "\n".join(blocks)


def _toml_lines(values: Mapping[str, Any]) -> str:
    # JSON's strings, numbers, booleans and arrays are TOML's too.
    return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in values.items())


class _Parser(argparse.ArgumentParser):
    """argparse that raises InputError, with the nearest right flag, instead of printing its usage."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, extra = self.parse_known_args(args, namespace)
        if extra:
            flag = extra[0].split("=")[0]
            if not flag.startswith("-"):
                raise InputError(f"unexpected argument {flag!r}; is a flag missing before it?")
            known = [s for action in self._actions for s in action.option_strings]
            raise InputError(_unknown(flag, known, "flag"))
        return parsed

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def _unknown(name: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {what} {name}; " + (
        f"did you mean {near[0]}?" if near else "see --help for those there are"
    )


def _knobs(config_class: type[Any]) -> Iterator[dataclasses.Field[Any]]:
    """The fields that are flags, sections opened."""
    hints = typing.get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _knobs(hints[item.name])
        else:
            yield item


def _kind(config_class: type[Any], item: dataclasses.Field[Any]) -> Any:
    """The type of a knob, without `| None`."""
    hints = typing.get_type_hints(config_class)
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            if item.name in typing.get_type_hints(hint):
                return _kind(hint, item)
        elif name == item.name:
            if isinstance(hint, types.UnionType):
                return next(a for a in typing.get_args(hint) if a is not types.NoneType)
            return hint
    raise KeyError(item.name)


def _add_flag(parser: argparse.ArgumentParser, item: dataclasses.Field[Any], kind: Any) -> None:
    meta = item.metadata
    default = (
        "" if item.default in (MISSING, None, (), False) else f" (default: {_shown(item.default)})"
    )
    text = (meta["help"] + ("" if "(default" in meta["help"] else default)).replace("%", "%%")
    if meta["positional"]:
        # No `type`: argparse would also convert the marker it puts where nothing was given.
        parser.add_argument(item.name, nargs="?", help=text, metavar=item.name.upper())
        return
    # The recipe's flags have hyphens; DeepSpeed's (--deepspeed_config, --local_rank) have underscores: both are taken.
    names = [f"--{item.name.replace('_', '-')}", f"--{item.name}", *meta["aliases"]]
    flags = list(dict.fromkeys(names))
    if kind is bool:
        parser.add_argument(*flags, dest=item.name, action="store_true", help=text)
    else:
        parser.add_argument(
            *flags,
            dest=item.name,
            type=lambda s: _from_text(s, kind),
            help=text,
            metavar="{" + ",".join(meta["choices"]) + "}" if meta["choices"] else "X",
        )


def _flag_name(item: dataclasses.Field[Any]) -> str:
    name = item.name
    return name.upper() if item.metadata["positional"] else f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _from_text(text: str, kind: Any) -> Any:
    try:
        if typing.get_origin(kind) is tuple:
            parts = [p.strip() for p in text.strip("()[] ").split(",")]
            element = typing.get_args(kind)[0]
            return tuple(element(p) for p in parts if p)
        return kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {_kind_name(kind)}") from error


def _from_plain(value: Any, kind: Any, name: str) -> Any:
    """A TOML or JSON value as the knob's type."""
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_plain(v, typing.get_args(kind)[0], name) for v in value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise InputError(f"{name} = {value!r} is not {_kind_name(kind)}")


def _kind_name(kind: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        Path: "a path",
    }
    return names.get(kind, "a list as a,b,c")


def _read_toml(config_class: type[Any], path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not a TOML file: {error}") from error
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    kinds = {item.name: _kind(config_class, item) for item in _knobs(config_class)}
    result = {}
    for key, value in flat.items():
        name = key.replace("-", "_")
        if name not in kinds:
            raise InputError(f"{path}: {_unknown(name, list(kinds), 'key')}")
        result[name] = _from_plain(value, kinds[name], f"{path}: {name}")
    return result


def _build(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    hints = typing.get_type_hints(config_class)
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hints[item.name]):
            arguments[item.name] = _build(hints[item.name], values)
        elif item.name in values:
            _check(item, values[item.name])
            arguments[item.name] = values[item.name]
        elif item.default is MISSING:
            raise InputError(f"{_flag_name(item)} is missing: {item.metadata['help']}")
    return config_class(**arguments)


def _check(item: dataclasses.Field[Any], value: Any) -> None:
    flag = _flag_name(item)
    choices, minimum = item.metadata["choices"], item.metadata["minimum"]
    if choices and value is not None and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{flag} {value} is not supported; there is {', '.join(choices)}{hint}")
    if minimum is not None and value is not None and not value >= minimum:
        raise InputError(f"{flag} {value}: must be at least {minimum}")
