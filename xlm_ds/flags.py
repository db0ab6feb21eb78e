"""Flags and TOML keys generated from frozen dataclasses of knobs (config.py).

A value comes from its flag, else from the TOML file given with --config, else from the default. Whatever does not fit
raises InputError with the nearest right name or value.
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import signal
import sys
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from xlm_ds.log import InputError, logger
from xlm_ds.steps import Steps

Config = TypeVar("Config")


def knob(
    help: str,
    *,
    default: Any = MISSING,
    choices: tuple[str, ...] | None = None,
    bounds: str | None = None,
    positional: bool = False,
    aliases: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is also a flag; without a default it must be given.

    `bounds` of a number, or of each of several: "[0, 1)" is from 0 to below 1, "[1, inf)" at least 1.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "bounds": bounds,
        "positional": positional,
        "aliases": aliases,
    }
    return dataclasses.field(default=default, metadata=metadata)


def knob_like(config_class: type[Any], name: str, *, default: Any) -> Any:
    """The knob of another dataclass, with a default of its own."""
    item = next(f for f in dataclasses.fields(config_class) if f.name == name)
    return dataclasses.field(default=default, metadata=item.metadata)


class PeerFlag(NamedTuple):
    """What has become of a flag of another program (peer_flags.py)."""

    flag: str
    verdict: str  # same, changed, ignored or refused
    why: str
    takes_value: bool
    program: str


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    peers: Sequence[PeerFlag] = (),
    description: str | None = None,
    stage: str | None = None,
) -> Config:
    """`config_class` filled from `argv`, a TOML file named by --config, and the defaults, in this order.

    `stage` is what the user typed after xlm-ds, if it is not the class's name. A flag of `peers` that is none of the
    class's is answered if it is ignored, and else refused with its sentence.
    """
    parser = _Parser(
        peers=peers,
        prog=f"python -m xlm_ds.{stage or config_class.__name__.removesuffix('Config').lower()}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="values for flags not given"
    )
    knobs = {k.name: k for k in _knobs(config_class)}
    for item in knobs.values():
        _add_flag(parser, item)
    ignored = {_key(entry.flag): entry for entry in reversed(peers) if entry.verdict == "ignored"}
    for name, entry in ignored.items():
        spellings = dict.fromkeys(("--" + name.replace("_", "-"), f"--{name}"))
        action: dict[str, Any] = {} if entry.takes_value else {"action": "store_true"}
        parser.add_argument(*spellings, dest=name, help=argparse.SUPPRESS, **action)
    given = vars(parser.parse_args(_without_their_values(argv, ignored, peers)))
    toml = given.pop("config", None)
    for name, entry in ignored.items():
        if given.pop(name, None) is not None and entry.why:
            logger.info(f"{entry.flag}: {entry.why}")
    from_file = _converted(knobs, load_toml(toml), where=f"{toml}: ") if toml else {}
    try:
        flags = {name: _from_text(text, knobs[name]) for name, text in given.items()}
        return _build(config_class, {**from_file, **flags})
    except InputError as error:
        raise InputError(f"{error}{_what_peers_mean(str(error), peers)}") from error


def _what_peers_mean(error: str, peers: Sequence[PeerFlag]) -> str:
    """Of a value that is refused, where other programs take others."""
    flag = error.split(" ")[0].rstrip(":")
    meant = (p for p in peers if flag.startswith("--") and _key(p.flag) == _key(flag))
    said = [f"{p.program}'s is changed here: {p.why}" for p in meant if p.verdict == "changed"]
    return f" ({'; '.join(said)})" if said else ""


def _key(flag: str) -> str:
    """A flag's name, however it is spelt, and without a value behind =."""
    return flag.split("=")[0].lstrip("-").replace("-", "_")


_BOOLEANS = {"true", "false", "on", "off", "1", "0"}  # that XLM and transformers take after a flag


def _without_their_values(
    argv: Sequence[str], ignored: Mapping[str, PeerFlag], peers: Sequence[PeerFlag]
) -> list[str]:
    """`argv` without the value of an ignored flag that takes none here and may take true or false there.

    Raises InputError for one that is given a file, which in another program it takes (transformers' --deepspeed).
    """
    kept: list[str] = []
    for word in argv:
        flag = kept[-1] if kept and kept[-1].startswith("--") else ""
        before = ignored.get(_key(flag))
        if before is None or before.takes_value:
            kept.append(word)
            continue
        other = next(
            (p for p in peers if _key(p.flag) == _key(flag) and p.verdict == "changed"), None
        )
        if other is not None and word.endswith(".json"):
            raise InputError(f"{flag}: of {other.program}, {other.verdict} here: {other.why}")
        if word.lower() not in _BOOLEANS:
            kept.append(word)
    return kept


def config_file(argv: Sequence[str]) -> Path | None:
    """The file that --config names."""
    parser = _Parser(add_help=False)
    parser.add_argument("--config", type=Path)
    path: Path | None = vars(parser.parse_known_args(argv)[0]).get("config")
    return path


def before_slow_imports(config_class: type[Any], description: str | None) -> None:
    """Called by a stage before torch is imported, which takes seconds: --help is instant, Ctrl-C ends quietly."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if {"-h", "--help"} & set(sys.argv[1:]):
        parse(config_class, ["--help"], description=description)


def from_dict(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`."""
    knobs = {k.name: k for k in _knobs(config_class)}
    return _build(config_class, _converted(knobs, values, where=""))


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON/TOML values, in sections as the dataclasses are nested; what is None is left out."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            result[item.name] = to_dict(value)
        elif value is not None:
            result[item.name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Steps) and len(value.values) == 1:
        return value.values[0]
    return str(value) if isinstance(value, (Path, Steps)) else value


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


class _Knob(NamedTuple):
    """A field of a config class that is a flag: its type without `| None`, and what knob() was told."""

    name: str
    kind: Any
    meta: Mapping[str, Any]
    default: Any

    @property
    def shown(self) -> str:
        """How the user types it."""
        return self.name.upper() if self.meta["positional"] else "--" + self.name.replace("_", "-")


def _sections(config_class: type[Any]) -> dict[str, type[Any]]:
    hints = typing.get_type_hints(config_class)
    return {k: v for k, v in hints.items() if isinstance(v, type) and dataclasses.is_dataclass(v)}


def _own_knobs(config_class: type[Any]) -> Iterator[_Knob]:
    hints = typing.get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        kind = hints[item.name]
        if isinstance(kind, types.UnionType):
            kind = next(a for a in typing.get_args(kind) if a is not types.NoneType)
        if not dataclasses.is_dataclass(kind):
            yield _Knob(item.name, kind, item.metadata, item.default)


def _knobs(config_class: type[Any]) -> Iterator[_Knob]:
    """The fields that are flags, those of the sections first."""
    for section in _sections(config_class).values():
        yield from _knobs(section)
    yield from _own_knobs(config_class)


class _Parser(argparse.ArgumentParser):
    """argparse that raises InputError, with the nearest right flag, instead of printing its usage."""

    def __init__(self, peers: Sequence[PeerFlag] = (), **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **kwargs)
        self._peers = {_key(entry.flag): entry for entry in reversed(peers)}

    def print_help(self, file: Any = None) -> None:
        """Ends well also where nobody reads it; argparse of Python 3.11.2 lets the broken pipe through."""
        with contextlib.suppress(BrokenPipeError):
            super().print_help(file)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Intermixed: `merge OUT --overwrite A B` means the same as `merge OUT A B --overwrite`.
        parsed, extra = self.parse_known_intermixed_args(args, namespace)
        foreign = dict.fromkeys(word.split("=")[0] for word in extra if _key(word) in self._peers)
        told = {flag: self._peers[_key(flag)] for flag in foreign if flag.startswith("-")}
        if told:  # all at once: whoever types one of another program types several
            raise InputError(
                "; ".join(
                    f"{f}: of {p.program}, {p.verdict} here: {p.why}" for f, p in told.items()
                )
            )
        if extra:
            flag = extra[0].split("=")[0]
            if not flag.startswith("-"):
                raise InputError(
                    f"unexpected argument {flag!r}; is a flag missing before it, or a blank in a list?"
                )
            shown = (action for action in self._actions if action.help != argparse.SUPPRESS)
            options = [s for action in shown for s in action.option_strings]
            known = [s for s in options if s.replace("_", "-") == s] or options
            raise InputError(_unknown(flag.replace("_", "-"), known, "flag"))
        return parsed

    def error(self, message: str) -> NoReturn:
        flag, _, what = message.removeprefix("argument ").partition(": ")
        what = what.replace("ignored explicit argument", "takes no value, but is given")
        if what == "expected one argument":
            what = "a value must follow it (after = if it begins with -)"
        raise InputError(f"{flag}: {what}")


def _unknown(name: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    hint = f"did you mean {near[0]}?" if near else "see --help for those there are"
    return f"unknown {what} {name}; {hint}"


def _add_flag(parser: argparse.ArgumentParser, item: _Knob) -> None:
    """Values stay text here (see _from_text), so that argparse's own messages never show."""
    help_text = item.meta["help"]
    if item.default not in (MISSING, None, (), False) and "(default" not in help_text:
        help_text += f" (default: {_shown(item.default)})"
    help_text = help_text.replace("%", "%%")
    if item.meta["positional"]:
        nargs = "*" if typing.get_origin(item.kind) is tuple else "?"
        parser.add_argument(item.name, nargs=nargs, help=help_text, metavar=item.name.upper())
        return
    flags = [item.shown, *item.meta["aliases"]]
    # The recipe's flags have hyphens, DeepSpeed's (--deepspeed_config, --local_rank) underscores: both are taken.
    silent = [f"--{item.name}"] if f"--{item.name}" not in flags else []
    for names, shown in ((flags, help_text), (silent, argparse.SUPPRESS)):
        if names and item.kind is bool:
            parser.add_argument(
                *names, dest=item.name, action="store_const", const="true", help=shown
            )
        elif names:
            parser.add_argument(*names, dest=item.name, help=shown, metavar=_metavar(item))


def _metavar(item: _Knob) -> str:
    if item.meta["choices"]:
        return "{" + ",".join(item.meta["choices"]) + "}"
    if typing.get_origin(item.kind) is tuple:
        return "A,B,…"
    kinds = {int: "N", float: "X", Path: "PATH", Steps: "X|X@0,X@UPDATE,…"}
    return kinds.get(item.kind, "TEXT")


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and not isinstance(value, Steps):
        return ",".join(map(str, value))
    return str(value)


def _from_text(text: str | list[str], item: _Knob) -> Any:
    _check_utf8(text, item)
    if item.kind is Path and isinstance(text, str):
        return _path(text, item.shown)
    try:
        if isinstance(text, list):  # a positional that is given several times
            return tuple(typing.get_args(item.kind)[0](part) for part in text)
        if item.kind is bool:
            return text == "true"
        if typing.get_origin(item.kind) is tuple:
            parts = [part.strip() for part in text.strip("()[] ").split(",")]
            element = typing.get_args(item.kind)[0]
            return tuple(element(part) for part in parts if part)
        return Steps.parse(text) if item.kind is Steps else item.kind(text)
    except ValueError as error:
        wrong = str(error) if item.kind is Steps else f"not {_kind_name(item.kind)}"
        raise InputError(f"{item.shown} {text}: {wrong}") from error


def _path(text: str, where: str) -> Path:
    if not text:
        raise InputError(
            f"{where}: an empty path would be the current folder; give . if that is meant"
        )
    return Path(text)


def _check_utf8(text: str | list[str], item: _Knob) -> None:
    """Of bytes that are not, Python makes lone surrogates, which no file can have that says what a run was given."""
    for part in [text] if isinstance(text, str) else text:
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{item.shown} {part!a}: is not UTF-8; type it as UTF-8, or rename the file or folder"
            ) from error


def _from_plain(value: Any, kind: Any, where: str) -> Any:
    """A TOML or JSON value as the knob's type."""
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_plain(v, typing.get_args(kind)[0], where) for v in value)
    if kind is Path and isinstance(value, str):
        return _path(value, where)
    if kind is float and type(value) is int:
        return float(value)
    if kind is Steps and type(value) in (int, float):
        return Steps((float(value),))
    if kind is Steps and isinstance(value, str):
        try:
            return Steps.parse(value)
        except ValueError as error:
            raise InputError(f"{where} = {value!r}: {error}") from error
    if type(value) is kind:
        return value
    raise InputError(f"{where} = {value!r}: not {_kind_name(kind)}")


def _kind_name(kind: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        Path: "a path",
        Steps: "a number, or numbers as X@0,X@UPDATE",
    }
    numbers = typing.get_args(kind)[:1] == (float,)
    return names.get(kind, "numbers as a,b" if numbers else "a list as a,b,c")


def load_toml(path: Path) -> dict[str, Any]:
    """Raises InputError for anything else; OSError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from error


def _converted(
    knobs: Mapping[str, _Knob], content: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """Values of the knobs' types, sections opened."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(value if isinstance(value, Mapping) else {key: value})
    result = {}
    for key, value in flat.items():
        name = key.replace("-", "_")
        if name not in knobs:
            known = [knob.replace("_", "-") for knob in knobs]
            raise InputError(where + _unknown(key, known, "key"))
        result[name] = _from_plain(value, knobs[name].kind, where + name)
    return result


def _build(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    sections = _sections(config_class).items()
    arguments = {name: _build(section, values) for name, section in sections}
    for item in _own_knobs(config_class):
        if item.name in values:
            _check(item, values[item.name])
            arguments[item.name] = values[item.name]
        elif item.default is MISSING:
            raise InputError(f"{item.shown} is missing: {item.meta['help']}")
    return config_class(**arguments)


def _check(item: _Knob, value: Any) -> None:
    choices = item.meta["choices"]
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value).lower(), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"{item.shown} {value} is not supported; there is {', '.join(choices)}{hint}"
        )
    kinds = typing.get_args(item.kind)
    if kinds and kinds[-1] is not Ellipsis and len(value) != len(kinds):
        raise InputError(f"{item.shown} {_shown(value)}: must be {len(kinds)} values")
    numbers = value.values if isinstance(value, Steps) else value if kinds else (value,)
    for number in numbers:
        if item.meta["bounds"] and not _within(number, item.meta["bounds"]):
            raise InputError(f"{item.shown} {_shown(value)}: must be in {item.meta['bounds']}")


def _within(number: float, bounds: str) -> bool:
    """NaN is within nothing."""
    low, high = (float(part) for part in bounds[1:-1].split(","))
    above = number >= low if bounds[0] == "[" else number > low
    below = number <= high if bounds[-1] == "]" else number < high
    return above and below
