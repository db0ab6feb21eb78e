"""Files of torch.save, read without running anything in them.

    content = load_torch_file(Path("mlm_xnli15_1024.pth"))
    content["model"]["module.embeddings.weight"].array      # (V, d), in the mapped file

Such a file is a pickle, and Python's own reader of pickles calls whatever function the file names. The reader here has
no way to call one: it knows the opcodes that such files need, and of the classes only torch's tensors, numpy's arrays,
plain numeric dtypes and numbers, argparse's Namespace and XLM's Dictionary, all of which it puts together itself.
Everything else is refused. Numbers stay in the mapped file; what else is built is bounded by the file's size and by
MAX_OPCODES, and nothing takes longer than in proportion to them.

Source of the format: torch 0.4 to 2.13, torch/serialization.py and torch/_utils.py, as run.
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
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from xlm_ds.log import InputError

MAX_OPCODES = (
    20_000_000  # a word of a dictionary takes 7; each makes an object of at most some 100 bytes
)
CHUNK_BYTES = 1 << 22

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_ZIP_LOCAL_HEADER_BYTES = 30
_PLAIN_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_PLAIN_DTYPE_STATE = (None, None, None, -1, -1, 0)  # no fields, no subarray, native size
_LEGACY_SIZE_BYTES = 8  # before the bytes of a storage
_MAX_LONG_BYTES = 16
_MAX_DIMENSIONS = 8
_MAX_NUMBERS = 1 << 48
_MAX_KEY, _MAX_KEY_PARTS = (1 << 61) - 1, 4

# safetensors' name of a storage's numbers, and what numpy reads them as (it has no bfloat16).
_STORAGES = {
    "DoubleStorage": ("F64", "<f8"),
    "FloatStorage": ("F32", "<f4"),
    "HalfStorage": ("F16", "<f2"),
    "BFloat16Storage": ("BF16", "<u2"),
    "LongStorage": ("I64", "<i8"),
    "IntStorage": ("I32", "<i4"),
    "ShortStorage": ("I16", "<i2"),
    "CharStorage": ("I8", "i1"),
    "ByteStorage": ("U8", "u1"),
    "BoolStorage": ("BOOL", "?"),
}
_GLOBALS = {
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "numpy.core.multiarray._reconstruct": "reconstruct",
    "numpy._core.multiarray._reconstruct": "reconstruct",
    "numpy.core.multiarray.scalar": "scalar",
    "numpy._core.multiarray.scalar": "scalar",
    "_codecs.encode": "encode",  # bytes, in pickles of protocol 2
    "collections.OrderedDict": "OrderedDict",
    "torch._utils._rebuild_tensor": "rebuild_tensor",
    "torch._utils._rebuild_tensor_v2": "rebuild_tensor",
    "torch._utils._rebuild_parameter": "rebuild_parameter",
    **{f"torch.{name}": name for name in _STORAGES},
    "argparse.Namespace": "Namespace",
    "xlm.data.dictionary.Dictionary": "Dictionary",
    "src.data.dictionary.Dictionary": "Dictionary",  # files of older checkouts
}
_OBJECTS = ("Namespace", "Dictionary")


@dataclass(eq=False)
class PickledArray:
    """An array of numpy; None until its state has come."""

    array: NDArray[Any] | None = None


@dataclass(eq=False)
class _Storage:
    """Numbers that tensors are views of; `raw` is None until they are found, in the older format after all else."""

    kind: str
    numbers: int
    raw: memoryview | None = None


@dataclass(eq=False, frozen=True)
class PickledTensor:
    """A tensor: a view of numbers that stay in the file."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers

    @property
    def dtype(self) -> str:
        """As safetensors names it: F32, BF16, I64, …"""
        return _STORAGES[self.storage.kind][0]

    @property
    def array(self) -> NDArray[Any]:
        """The numbers; of BF16, which numpy has not, their bits as uint16."""
        assert self.storage.raw is not None  # load_torch_file has seen to it
        flat = np.frombuffer(self.storage.raw, _STORAGES[self.storage.kind][1])
        strides = tuple(stride * flat.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(
            flat[self.offset :], self.shape, strides, writeable=False
        )


@dataclass(eq=False)
class PickledObject:
    """An object of one of the classes that are known: what it is called, and its attributes."""

    kind: str
    attributes: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------ torch.save's files


def load_torch_file(path: Path) -> Any:
    """The object that torch.save wrote, in either of its two formats.

    Raises InputError for anything else, or for what such a file may not hold, naming what was found; OSError.
    """
    with path.open("rb") as file:
        try:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError as error:
            raise InputError(f"{path}: is empty") from error
    return _load_zip(path, data) if bytes(data[:4]) == b"PK\3\4" else _load_legacy(path, data)


def _load_zip(path: Path, data: memoryview) -> Any:
    """The format of torch 1.6 and later: a zip archive of a pickle and a file per storage, none of them compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise InputError(f"{path}: a damaged zip archive ({error}); copy it again") from error
    if sum(entry.compress_size for entry in entries.values()) > len(data):
        raise InputError(f"{path}: its files overlap, as torch.save never has them")
    pickles = [name for name in entries if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise InputError(f"{path}: a zip archive without data.pkl is not a file of torch.save")
    prefix = pickles[0].removesuffix("data.pkl")

    def span(name: str) -> tuple[int, int]:
        if prefix + name not in entries:
            raise InputError(f"{path}: its {name} is missing; copy it again")
        return _span(path, data, entries[prefix + name], name)

    if prefix + "byteorder" in entries and bytes(data[slice(*span("byteorder"))]) != b"little":
        raise InputError(f"{path}: was written on a big-endian machine; save it again on another")
    start, end = span("data.pkl")
    machine = _Machine(path, data[:end], start)
    content = machine.run()[0]
    for key, storage in machine.storages.items():
        machine.fill_storage(key, storage, data[slice(*span(f"data/{key}"))])
    return content


def _span(path: Path, data: memoryview, entry: zipfile.ZipInfo, name: str) -> tuple[int, int]:
    """Where an entry's bytes are in the file."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise InputError(
            f"{path}: its {name} is compressed or encrypted, which torch.save never does"
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
            f"{path}: the checksum of its {name} is wrong: it is damaged; copy it again"
        )
    return start, end


def _load_legacy(path: Path, data: memoryview) -> Any:
    """The format up to torch 1.5: pickles one after another, and the storages' bytes behind the last."""
    end = 0
    for wanted in (_LEGACY_MAGIC, _LEGACY_VERSION):
        found, end = _Machine(path, data, end).run()
        if type(found) is not int or found != wanted:
            raise InputError(f"{path}: is not a file of torch.save")
    written_on, end = _Machine(path, data, end).run()
    if type(written_on) is dict and written_on.get("little_endian") is False:
        raise InputError(f"{path}: was written on a big-endian machine; save it again on another")
    machine = _Machine(path, data, end)
    content, end = machine.run()
    if machine.storages:
        keys, end = _Machine(path, data, end).run()
        if type(keys) is not list or sorted(map(str, keys)) != sorted(machine.storages):
            raise InputError(f"{path}: does not list the numbers of its tensors; copy it again")
        for key in map(str, keys):
            storage = machine.storages[key]
            begin = end + _LEGACY_SIZE_BYTES
            end = begin + storage.numbers * _itemsize(storage.kind)
            if data[begin - _LEGACY_SIZE_BYTES : begin] != storage.numbers.to_bytes(8, "little"):
                raise InputError(
                    f"{path}: the numbers of a tensor are not where they should be; copy it again"
                )
            machine.fill_storage(key, storage, data[begin:end])
    return content


def _itemsize(kind: str) -> int:
    return np.dtype(_STORAGES[kind][1]).itemsize


# ------------------------------------------------------------------------------------- the pickle


@dataclass(frozen=True)
class _Global:
    """One of the classes and functions that are understood: a name, nothing that could be called."""

    name: str


@dataclass(eq=False)
class _Dtype:
    dtype: np.dtype[Any]


class _Machine:
    """Runs one pickle's opcodes on a stack, as pickletools describes them."""

    def __init__(self, path: Path, data: memoryview, start: int) -> None:
        self._path = path
        self._data = data
        self._at = start
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._encoded = 0
        self.storages: dict[str, _Storage] = {}

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
            f"{self._path}: not read: it has {found}, and what is read here holds nothing but tensors, arrays, "
            "numbers, words, settings (argparse's Namespace) and XLM's Dictionary"
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
        if type(target) is not dict or len(items) % 2 or not all(map(_is_key, keys)):
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
        if type(arguments) is not tuple:
            self._refuse(f"a call without arguments before byte {self._at}")
        if function == _Global("rebuild_tensor") and self._is_view(arguments):
            self.push(PickledTensor(*arguments[:4]))
        elif function == _Global("rebuild_parameter") and self._is_parameter(arguments):
            self.push(arguments[0])
        elif function == _Global("OrderedDict") and not arguments:
            self.push({})
        elif function == _Global("encode") and self._is_latin_text(arguments):
            self._encoded += len(arguments[0])
            if self._encoded > len(self._data):
                self._refuse(f"more bytes than the file has before byte {self._at}")
            self.push(memoryview(arguments[0].encode("latin-1")))
        elif function == _Global("reconstruct") and self._is_array_stub(arguments):
            self.push(PickledArray())
        elif function == _Global("dtype") and self._is_dtype(arguments):
            self.push(_Dtype(np.dtype(arguments[0])))
        elif function == _Global("scalar") and self._is_scalar(arguments):
            self.push(np.frombuffer(arguments[1], arguments[0].dtype)[0].item())
        else:
            self._refuse(f"a call before byte {self._at} that is not one for an array or a number")

    @staticmethod
    def _is_view(arguments: tuple[Any, ...]) -> bool:
        """(storage, offset, shape, strides, …), all within the storage and with no number twice."""
        if len(arguments) < 4 or type(arguments[0]) is not _Storage:
            return False
        storage, offset, shape, strides = arguments[:4]
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            return False
        if len(shape) > _MAX_DIMENSIONS or not all(
            type(n) is int and 0 <= n <= storage.numbers for n in (offset, *shape, *strides)
        ):
            return False
        numbers = math.prod(shape)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        return numbers == 0 or (numbers <= storage.numbers and last < storage.numbers)

    @staticmethod
    def _is_parameter(arguments: tuple[Any, ...]) -> bool:
        return len(arguments) == 3 and type(arguments[0]) is PickledTensor

    @staticmethod
    def _is_latin_text(arguments: tuple[Any, ...]) -> bool:
        return (
            len(arguments) == 2
            and type(arguments[0]) is str
            and arguments[1] == "latin1"
            and all(ord(character) < 256 for character in arguments[0])
        )

    @staticmethod
    def _is_array_stub(arguments: tuple[Any, ...]) -> bool:
        return arguments[:2] == (_Global("ndarray"), (0,))

    @staticmethod
    def _is_dtype(arguments: tuple[Any, ...]) -> bool:
        return (
            len(arguments) == 3
            and type(arguments[0]) is str
            and _PLAIN_DTYPE.fullmatch(arguments[0]) is not None
        )

    @staticmethod
    def _is_scalar(arguments: tuple[Any, ...]) -> bool:
        return (
            len(arguments) == 2
            and type(arguments[0]) is _Dtype
            and type(arguments[1]) is memoryview
            and len(arguments[1]) == arguments[0].dtype.itemsize
        )

    def new_object(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if type(kind) is not _Global or kind.name not in _OBJECTS or arguments != ():
            self._refuse(f"an object before byte {self._at} of a class that has none here")
        self.push(PickledObject(kind.name))

    def persistent(self) -> None:
        """A storage, by what torch calls it: ("storage", its class, its key, its device, how many numbers)."""
        found = self._pop()
        if (
            type(found) is not tuple
            or len(found) not in (5, 6)
            or found[0] != "storage"
            or type(found[1]) is not _Global
            or found[1].name not in _STORAGES
            or type(found[2]) is not str
            or type(found[4]) is not int
            or not 0
            <= found[4]
            <= _MAX_NUMBERS  # fill_storage compares it with the bytes that there are
            or found[5:] not in ((), (None,))  # a view of another storage: of torch 0.3 and before
        ):
            self._refuse(f"something else than the numbers of a tensor before byte {self._at}")
        kind, key, numbers = found[1].name, found[2], found[4]
        storage = self.storages.setdefault(key, _Storage(kind, numbers))
        if (storage.kind, storage.numbers) != (kind, numbers):
            self._refuse(f"numbers of two kinds under one name before byte {self._at}")
        self.push(storage)

    def fill_storage(self, key: str, storage: _Storage, raw: memoryview) -> None:
        if len(raw) != storage.numbers * _itemsize(storage.kind):
            raise InputError(
                f"{self._path}: tensor {key!r:.20} has {len(raw)} bytes for {storage.numbers} numbers of "
                f"{storage.kind}; copy it again"
            )
        storage.raw = raw

    def build(self) -> None:
        state, target = self._pop(), self._pop()
        if type(target) is PickledArray:
            self._fill_array(target, state)
        elif type(target) is dict and type(state) is dict and set(state) <= {"_metadata"}:
            pass  # of a state_dict: versions of its modules
        elif type(target) is PickledObject and type(state) is dict and not target.attributes:
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

    def _fill_array(self, target: PickledArray, state: Any) -> None:
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
            self._refuse(
                f"an array before byte {self._at} of more than two dimensions, or whose shape and bytes do not agree"
            )
        target.array = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")


def _is_key(key: Any) -> bool:
    """Only what is hashed at once and to other numbers than the rest: nested tuples could take for ever, and all
    multiples of 2^61 - 1 are the same to Python.
    """
    if type(key) is tuple:  # of XLM's params, of a pair of languages
        return len(key) <= _MAX_KEY_PARTS and all(type(k) is not tuple and _is_key(k) for k in key)
    return key is None or type(key) is str or (type(key) is int and abs(key) < _MAX_KEY)


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
        pickle.BINPERSID: _Machine.persistent,
        pickle.REDUCE: _Machine.reduce,
        pickle.NEWOBJ: _Machine.new_object,
        pickle.BUILD: _Machine.build,
    }


_HANDLERS = _handlers()
