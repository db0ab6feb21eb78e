"""XLM's binarized text, TEXT.pth, read without running anything in it.

    text = load_xlm_text(Path("valid.en.pth"))
    text.words, text.sentences, text.positions

A .pth is a pickle, and Python's own reader of pickles calls whatever function the file names. The reader here has no
way to call one: it knows the opcodes that such a file needs, and of the classes only numpy's arrays, plain numeric
dtypes and numbers, and XLM's Dictionary, all of which it puts together itself. Everything else is refused. Arrays stay
in the mapped file; what else is built is bounded by the file's size and by MAX_OPCODES.

Source of the format: XLM cd281d3, xlm/data/dictionary.py and preprocess.py; torch 1.0 to 2.13, torch/serialization.py.
"""

import math
import mmap
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from xlm_ds.log import InputError

XLM_SPECIALS = ("<s>", "</s>", "<pad>", "<unk>", *(f"<special{i}>" for i in range(10)))
XLM_EOS, XLM_UNK = 1, 3
MAX_OPCODES = (
    20_000_000  # a word of the dictionary takes 7; each makes an object of at most some 100 bytes
)
CHUNK_BYTES = 1 << 22

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_ZIP_LOCAL_HEADER_BYTES = 30
_PLAIN_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_PLAIN_DTYPE_STATE = (None, None, None, -1, -1, 0)  # no fields, no subarray, native size
_MAX_LONG_BYTES = 16

_GLOBALS = {
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "numpy.core.multiarray._reconstruct": "reconstruct",
    "numpy._core.multiarray._reconstruct": "reconstruct",
    "numpy.core.multiarray.scalar": "scalar",
    "numpy._core.multiarray.scalar": "scalar",
    "xlm.data.dictionary.Dictionary": "Dictionary",
    "src.data.dictionary.Dictionary": "Dictionary",  # files of older checkouts
}


class XlmText(NamedTuple):
    """What a .pth holds, checked."""

    words: tuple[str, ...]  # in the order of their ids, from len(XLM_SPECIALS) on
    counts: tuple[int, ...]  # of the words
    sentences: NDArray[Any]  # (tokens,) ids, each sentence ended by XLM_EOS
    positions: NDArray[np.int64]  # (lines, 2): where a sentence begins, and where its eos is
    unknown_words: dict[str, int]


def load_xlm_text(path: Path) -> XlmText:
    """Maps `path`. Raises InputError for anything but a .pth of XLM's preprocess.py, naming what was found; OSError."""
    content = _load(path)
    keys = ("dico", "sentences", "positions", "unk_words")
    if not isinstance(content, dict) or not all(key in content for key in keys):
        raise InputError(f"{path}: has not {', '.join(keys)}, so it is no binarized text of XLM")
    words, counts = _words_of(content["dico"], path)
    sentences, positions = (_array_of(content[key], key, path) for key in keys[1:3])
    if positions.size == 0:
        positions = positions.reshape(0, 2)
    if sentences.ndim != 1 or positions.ndim != 2 or positions.shape[1] != 2:
        raise InputError(
            f"{path}: sentences of shape {sentences.shape} and positions of shape {positions.shape}, "
            "expected (tokens,) and (lines, 2)"
        )
    if sentences.dtype.kind not in "iu" or positions.dtype != np.int64:
        raise InputError(
            f"{path}: sentences of {sentences.dtype} and positions of {positions.dtype}, expected integers and int64"
        )
    unknown = content["unk_words"]
    if not isinstance(unknown, dict) or not all(type(n) is int for n in unknown.values()):
        raise InputError(f"{path}: unk_words is not counts of words")
    return XlmText(words, counts, sentences, positions, unknown)


def _words_of(dico: Any, path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if not isinstance(dico, _PickledDictionary):
        raise InputError(f"{path}: dico is not XLM's Dictionary")
    words, counts = dico.attributes.get("id2word"), dico.attributes.get("counts")
    if not isinstance(words, dict) or not isinstance(counts, dict):
        raise InputError(f"{path}: its Dictionary has no id2word or no counts")
    symbols = [words.get(i) for i in range(len(words))]
    if not all(isinstance(s, str) and type(counts.get(s)) is int for s in symbols):
        raise InputError(
            f"{path}: its Dictionary does not give every id a word and every word a count"
        )
    if tuple(symbols[: len(XLM_SPECIALS)]) != XLM_SPECIALS:
        raise InputError(
            f"{path}: its Dictionary begins with {symbols[: len(XLM_SPECIALS)]!r:.120}, not with XLM's special words"
        )
    plain = tuple(str(symbol) for symbol in symbols[len(XLM_SPECIALS) :])
    for word in plain:
        if word.split() != [word]:
            raise InputError(f"{path}: {word!r:.100} in its Dictionary is not one word")
    return plain, tuple(int(counts[word]) for word in plain)


def _array_of(value: Any, key: str, path: Path) -> NDArray[Any]:
    if not isinstance(value, _Array) or value.array is None:
        raise InputError(f"{path}: {key} is not an array")
    return value.array


# ------------------------------------------------------------------------------ torch.save's files


def _load(path: Path) -> Any:
    """The object that torch.save wrote, in either of its two formats."""
    with path.open("rb") as file:
        try:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError as error:
            raise InputError(f"{path}: is empty") from error
    if bytes(data[:4]) == b"PK\3\4":
        start, end = _find_data_pkl(path, data)
        return _Machine(path, data[:end], start).run()[0]
    expected = (_LEGACY_MAGIC, _LEGACY_VERSION)
    end = 0
    for wanted in expected:
        found, end = _Machine(path, data, end).run()
        if type(found) is not int or found != wanted:
            raise InputError(f"{path}: is not a file of torch.save")
    _, end = _Machine(path, data, end).run()  # of the machine it was written on: dtypes say it too
    return _Machine(path, data, end).run()[0]


def _find_data_pkl(path: Path, data: memoryview) -> tuple[int, int]:
    """Where the pickle is in torch's zip archive. It is stored uncompressed, so that it can stay where it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if e.filename.split("/")[-1] == "data.pkl"]
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise InputError(f"{path}: a damaged zip archive ({error}); copy it again") from error
    if len(entries) != 1:
        raise InputError(f"{path}: a zip archive without data.pkl is not a file of torch.save")
    entry = entries[0]
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise InputError(
            f"{path}: its data.pkl is compressed or encrypted, which torch.save never does"
        )
    header = data[entry.header_offset :][:_ZIP_LOCAL_HEADER_BYTES]
    names = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    start = entry.header_offset + _ZIP_LOCAL_HEADER_BYTES + names
    end = start + entry.file_size
    checksum = 0
    for at in range(start, min(end, len(data)), CHUNK_BYTES):
        checksum = zlib.crc32(data[at : min(at + CHUNK_BYTES, end)], checksum)
    if checksum != entry.CRC:
        raise InputError(
            f"{path}: the checksum of its data.pkl is wrong: it is damaged; copy it again"
        )
    return start, end


# ------------------------------------------------------------------------------------- the pickle


@dataclass(frozen=True)
class _Global:
    """One of the classes and functions that are understood: a name, nothing that could be called."""

    name: str


@dataclass(eq=False)
class _Dtype:
    dtype: np.dtype[Any]


@dataclass(eq=False)
class _Array:
    array: NDArray[Any] | None = None


@dataclass(eq=False)
class _PickledDictionary:
    attributes: dict[str, Any] = field(default_factory=dict)


class _Machine:
    """Runs one pickle's opcodes on a stack, as pickletools describes them."""

    def __init__(self, path: Path, data: memoryview, start: int) -> None:
        self._path = path
        self._data = data
        self._at = start
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        """The object, and where its pickle ends."""
        for _ in range(MAX_OPCODES):
            opcode = bytes(self._take(1))
            if opcode == pickle.STOP:
                return self._pop(), self._at
            if opcode not in _HANDLERS:
                self._refuse(f"opcode {_opcode_name(opcode)} at byte {self._at - 1}")
            _HANDLERS[opcode](self)
        raise InputError(
            f"{self._path}: not read: its pickle has more than {MAX_OPCODES:,} opcodes"
        )

    def _refuse(self, found: str) -> NoReturn:
        raise InputError(
            f"{self._path}: not read: it has {found}, and a .pth of XLM's preprocess.py holds nothing but arrays, "
            "numbers, words and its Dictionary"
        )

    def _take(self, count: int) -> memoryview:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise InputError(
                f"{self._path}: ends at byte {len(self._data)}, within a value; copy it again"
            )
        self._at += count
        return taken

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            self._refuse(f"a missing value before byte {self._at}")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            self._refuse(f"a missing mark before byte {self._at}")
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def skip(self, width: int) -> None:
        self._take(width)

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def integer(self, width: int, signed: bool) -> None:
        self.push(int.from_bytes(self._take(width), "little", signed=signed))

    def long(self, width: int) -> None:
        size = self._number(width)
        if size > _MAX_LONG_BYTES:
            self._refuse(f"a whole number of {size} bytes")
        self.integer(size, signed=True)

    def floating(self) -> None:
        self.push(float(np.frombuffer(self._take(8), ">f8")[0]))

    def text(self, width: int) -> None:
        raw = self._take(self._number(width))
        try:
            self.push(str(raw, "utf-8"))
        except UnicodeDecodeError:
            self._refuse(f"a word that is not UTF-8 before byte {self._at}")

    def raw(self, width: int) -> None:
        self.push(self._take(self._number(width)))

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def tuple_to_mark(self) -> None:
        self.push(tuple(self._pop_to_mark()))

    def append(self) -> None:
        self._extend([self._pop()])

    def appends(self) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._pop()
        if type(target) is not list:
            self._refuse(f"an append to something else than a list before byte {self._at}")
        target.extend(items)
        self.push(target)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def set_items(self) -> None:
        self._update(self._pop_to_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._pop()
        keys = items[::2]
        # Only keys whose hash costs nothing: that of nested tuples can take for ever.
        if (
            type(target) is not dict
            or len(items) % 2
            or not all(type(k) in (str, int) for k in keys)
        ):
            self._refuse(
                f"something else than a dictionary of words and numbers before byte {self._at}"
            )
        target.update(zip(keys, items[1::2], strict=True))
        self.push(target)

    def put(self, width: int) -> None:
        self._memo[self._number(width)] = self._peek()

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._peek()

    def _peek(self) -> Any:
        value = self._pop()
        self.push(value)
        return value

    def get(self, width: int) -> None:
        key = self._number(width)
        if key not in self._memo:
            self._refuse(f"a reference to nothing before byte {self._at}")
        self.push(self._memo[key])

    def global_by_lines(self) -> None:
        self._push_global(self._line(), self._line())

    def _line(self) -> str:
        raw = bytes(self._data[self._at : self._at + 200])
        line, newline, _ = raw.partition(b"\n")
        self._take(len(line) + len(newline) if newline else len(raw) + 1)
        return line.decode("utf-8", errors="replace")

    def global_by_stack(self) -> None:
        name, module = self._pop(), self._pop()
        self._push_global(module, name)

    def _push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            self._refuse(f"a class without a name before byte {self._at}")
        full = f"{module}.{name}"
        if full not in _GLOBALS:
            self._refuse(f"{full!r:.100} before byte {self._at}")
        self.push(_Global(_GLOBALS[full]))

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if function == _Global("reconstruct") and self._is_array_stub(arguments):
            self.push(_Array())
        elif function == _Global("dtype") and self._is_dtype(arguments):
            self.push(_Dtype(np.dtype(arguments[0])))
        elif function == _Global("scalar") and self._is_scalar(arguments):
            self.push(np.frombuffer(arguments[1], arguments[0].dtype)[0].item())
        else:
            self._refuse(f"a call before byte {self._at} that is not one for an array or a number")

    @staticmethod
    def _is_array_stub(arguments: Any) -> bool:
        return type(arguments) is tuple and arguments[:2] == (_Global("ndarray"), (0,))

    @staticmethod
    def _is_dtype(arguments: Any) -> bool:
        return (
            type(arguments) is tuple
            and len(arguments) == 3
            and type(arguments[0]) is str
            and _PLAIN_DTYPE.fullmatch(arguments[0]) is not None
        )

    @staticmethod
    def _is_scalar(arguments: Any) -> bool:
        return (
            type(arguments) is tuple
            and len(arguments) == 2
            and type(arguments[0]) is _Dtype
            and type(arguments[1]) is memoryview
            and len(arguments[1]) == arguments[0].dtype.itemsize
        )

    def new_object(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if kind != _Global("Dictionary") or arguments != ():
            self._refuse(f"an object before byte {self._at} that is not XLM's Dictionary")
        self.push(_PickledDictionary())

    def build(self) -> None:
        state, target = self._pop(), self._pop()
        if type(target) is _Array:
            self._fill_array(target, state)
        elif type(target) is _PickledDictionary and type(state) is dict and not target.attributes:
            target.attributes.update({k: v for k, v in state.items() if type(k) is str})
        elif type(target) is _Dtype and self._is_dtype_state(state):
            target.dtype = target.dtype.newbyteorder(state[1])
        else:
            self._refuse(f"the state of an object before byte {self._at} that has none here")
        self.push(target)

    @staticmethod
    def _is_dtype_state(state: Any) -> bool:
        return (
            type(state) is tuple
            and len(state) >= 8
            and type(state[1]) is str
            and state[1] in ("<", ">", "|", "=")
            and state[2:8] == _PLAIN_DTYPE_STATE
        )

    def _fill_array(self, target: _Array, state: Any) -> None:
        """`state` is (version, shape, dtype, whether in Fortran's order, bytes)."""
        if type(state) is not tuple or len(state) != 5 or type(state[2]) is not _Dtype:
            self._refuse(f"an array of something else than numbers before byte {self._at}")
        shape, dtype, fortran, raw = state[1], state[2].dtype, state[3], state[4]
        if (
            type(shape) is not tuple
            or len(shape) > 2
            # Without elements any size fits the bytes, and numpy raises for some.
            or not all(type(n) is int and 0 <= n <= len(self._data) for n in shape)
            or type(raw) is not memoryview
            or math.prod(shape) * dtype.itemsize != len(raw)
            or target.array is not None
        ):
            self._refuse(f"an array before byte {self._at} whose shape and bytes do not agree")
        target.array = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")


def _opcode_name(opcode: bytes) -> str:
    names = (op.name for op in pickletools.opcodes if op.code.encode("latin-1") == opcode)
    return next(names, f"0x{opcode[0]:02x}")


def _handlers() -> dict[bytes, Callable[[_Machine], None]]:
    def push_new(make: Callable[[], Any]) -> Callable[[_Machine], None]:
        return lambda machine: machine.push(make())

    return {
        pickle.PROTO: lambda m: m.skip(1),
        pickle.FRAME: lambda m: m.skip(8),
        pickle.MARK: _Machine.mark,
        pickle.NONE: push_new(lambda: None),
        pickle.NEWTRUE: push_new(lambda: True),
        pickle.NEWFALSE: push_new(lambda: False),
        pickle.EMPTY_DICT: push_new(dict),
        pickle.EMPTY_LIST: push_new(list),
        pickle.EMPTY_TUPLE: push_new(tuple),
        pickle.BININT: lambda m: m.integer(4, signed=True),
        pickle.BININT1: lambda m: m.integer(1, signed=False),
        pickle.BININT2: lambda m: m.integer(2, signed=False),
        pickle.LONG1: lambda m: m.long(1),
        pickle.LONG4: lambda m: m.long(4),
        pickle.BINFLOAT: _Machine.floating,
        pickle.SHORT_BINUNICODE: lambda m: m.text(1),
        pickle.BINUNICODE: lambda m: m.text(4),
        pickle.BINUNICODE8: lambda m: m.text(8),
        pickle.SHORT_BINBYTES: lambda m: m.raw(1),
        pickle.BINBYTES: lambda m: m.raw(4),
        pickle.BINBYTES8: lambda m: m.raw(8),
        pickle.TUPLE: _Machine.tuple_to_mark,
        pickle.TUPLE1: lambda m: m.tuple_of(1),
        pickle.TUPLE2: lambda m: m.tuple_of(2),
        pickle.TUPLE3: lambda m: m.tuple_of(3),
        pickle.APPEND: _Machine.append,
        pickle.APPENDS: _Machine.appends,
        pickle.SETITEM: _Machine.set_item,
        pickle.SETITEMS: _Machine.set_items,
        pickle.BINPUT: lambda m: m.put(1),
        pickle.LONG_BINPUT: lambda m: m.put(4),
        pickle.MEMOIZE: _Machine.memoize,
        pickle.BINGET: lambda m: m.get(1),
        pickle.LONG_BINGET: lambda m: m.get(4),
        pickle.GLOBAL: _Machine.global_by_lines,
        pickle.STACK_GLOBAL: _Machine.global_by_stack,
        pickle.REDUCE: _Machine.reduce,
        pickle.NEWOBJ: _Machine.new_object,
        pickle.BUILD: _Machine.build,
    }


_HANDLERS = _handlers()
