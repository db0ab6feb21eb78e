"""Files of torch.save: the tensors that were saved, bit for bit, and nothing run. See also test_xlm_pth.py."""

import argparse
import collections
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xlm_ds import torch_file
from xlm_ds.log import InputError
from xlm_ds.torch_file import PickledObject, PickledTensor, load_torch_file

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def saved(path: Path, value: object, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def as_torch(found: Any) -> Tensor:
    assert isinstance(found, PickledTensor)
    tensor = torch.from_numpy(np.array(found.array))
    return tensor.view(torch.bfloat16) if found.dtype == "BF16" else tensor


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("dtype", "name"), DTYPES.items())
def test_every_kind_of_number(tmp_path: Path, dtype: torch.dtype, name: str, legacy: bool) -> None:
    value = torch.randn(3, 5).mul(50).to(dtype)
    found = load_torch_file(saved(tmp_path / "x.pt", {"x": value}, legacy=legacy))["x"]
    assert found.dtype == name
    assert torch.equal(as_torch(found), value)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_a_checkpoint_is_made_of(tmp_path: Path, legacy: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    table = torch.arange(12.0).reshape(3, 4)
    content: dict[str, Any] = {
        "args": argparse.Namespace(arch="xlm_base", lr=[1e-4], deep={"a": (1, None, True)}),
        "model": model.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "views": [table, table.T, table[1:, ::2], table[:0], torch.tensor(3.0)],
        "best": np.float64(2.5),
        "array": np.arange(3),
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    }
    found = load_torch_file(saved(tmp_path / "x.pt", content, legacy=legacy))
    args = found["args"]
    assert isinstance(args, PickledObject)
    assert (args.kind, args.attributes) == ("Namespace", vars(content["args"]))
    for name, value in model.state_dict().items():
        assert torch.equal(as_torch(found["model"][name]), value)
    assert torch.equal(as_torch(found["parameter"]), torch.ones(2))
    for one, other in zip(found["views"], content["views"], strict=True):
        assert torch.equal(as_torch(one), other)
    assert found["best"] == 2.5
    assert found["array"].array.tolist() == [0, 1, 2]
    assert list(found["ordered"].items()) == [("b", 1), ("a", 2)]


def test_numbers_stay_in_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"x": torch.zeros(1000)})
    array = load_torch_file(path)["x"].array
    assert not array.flags.owndata
    assert not array.flags.writeable


# ---------------------------------------------------------------------------------- what is refused


class Pid:
    """Pickled as a storage by `Pickler`."""

    def __init__(self, *pid: object) -> None:
        self.pid = pid


class Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return value.pid if isinstance(value, Pid) else None


class Call:
    def __init__(self, function: Callable[..., object], *arguments: object, state: object = None):
        self.reduced = (function, arguments, *([state] if state is not None else []))

    def __reduce__(self) -> Any:
        return self.reduced


def written(path: Path, value: object, storages: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("m/data.pkl", "w") as file:
            Pickler(file, protocol=2).dump(value)
        for key, raw in storages.items():
            archive.writestr(f"m/data/{key}", raw)
    return path


def pid(**changes: object) -> Pid:
    parts = {
        "what": "storage", "kind": torch.FloatStorage, "key": "0", "device": "cpu", "numbers": 4,
    } | changes  # fmt: skip
    return Pid(*parts.values())


def view(storage: object, offset: object = 0, shape: object = (2, 2), strides: object = (2, 1)):  # type: ignore[no-untyped-def]
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, storage, offset, shape, strides, False, collections.OrderedDict())


STORAGE = {"0": bytes(16)}


def test_a_file_of_these_tests_is_read(tmp_path: Path) -> None:
    found = load_torch_file(written(tmp_path / "x.pt", {"x": view(pid())}, STORAGE))
    assert found["x"].array.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (view(pid(), offset=1), "a call before byte"),
        (view(pid(), offset=-1), "a call before byte"),
        (view(pid(), shape=(1 << 40,), strides=(0,)), "a call before byte"),
        (view(pid(), shape=(5,), strides=(0,)), "a call before byte"),
        (view(pid(), shape=(2, 2), strides=(-2, 1)), "a call before byte"),
        (view(pid(), shape=(2, 2), strides=(4, 1)), "a call before byte"),
        (view(pid(), shape=(1,) * 9, strides=(1,) * 9), "a call before byte"),
        (view(pid(), shape=(2,)), "a call before byte"),
        (view(4), "a call before byte"),
        (view(pid(numbers=1 << 60)), "something else than the numbers of a tensor"),
        (view(pid(numbers=-1)), "something else than the numbers of a tensor"),
        (view(pid(what="module")), "something else than the numbers of a tensor"),
        (view(pid(kind=np.ndarray)), "something else than the numbers of a tensor"),
        (view(pid(key=("0",))), "something else than the numbers of a tensor"),
        (view(pid(view=("1", 0, 2))), "something else than the numbers of a tensor"),
        (
            [view(pid()), view(pid(kind=torch.IntStorage))],
            "numbers of two kinds under one name",
        ),
        (view(pid(key="1")), "its data/1 is missing"),
        (view(pid(key="../../etc/passwd")), r"its data/\.\./\.\./etc/passwd is missing"),
        (view(pid(numbers=3), shape=(3,), strides=(1,)), "has 16 bytes for 3 numbers"),
        (Call(os.system, "true"), "'posix.system' before byte"),
        (Call(torch.load, "x"), "'torch.serialization.load' before byte"),
        (Call(getattr, "", "join"), "'(__builtin__|builtins).getattr'"),
        (Call(torch.FloatStorage, 3), "a call before byte"),
        (Call(collections.OrderedDict, [("a", 1)]), "a call before byte"),
        (Call(collections.OrderedDict, state={"x": 1}), "the state of an object"),
        (Call(argparse.Namespace), "a call before byte"),
    ],
)
def test_what_no_tensor_may_be(tmp_path: Path, value: object, expected: str) -> None:
    path = written(tmp_path / "x.pt", value, STORAGE)
    with pytest.raises(InputError, match=expected) as caught:
        load_torch_file(path)
    assert str(caught.value).startswith(str(path))


def test_work_is_in_proportion_to_the_file(tmp_path: Path) -> None:
    """Keys that Python hashes to one number, bytes that are made again and again, files in one another's place."""
    path = tmp_path / "x.pt"
    with pytest.raises(InputError, match="something else than a dictionary of words and numbers"):
        load_torch_file(written(path, {((1 << 61) - 1) * n: 0 for n in range(1, 9)}, {}))
    assert load_torch_file(written(path, {("a", None, 1): 2}, {})) == {("a", None, 1): 2}
    with pytest.raises(InputError, match="something else than a dictionary of words and numbers"):
        load_torch_file(written(path, {("a", ("b",)): 2}, {}))
    text = "x" * 1000
    again = b"c_codecs\nencode\nq\1" + b"X\xe8\3\0\0" + text.encode() + b"q\2"
    calls = b"".join(b"h\1h\2X\6\0\0\0latin1\x86R" for _ in range(9))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\2" + again + calls + b".")
    with pytest.raises(InputError, match="more bytes than the file has"):
        load_torch_file(path)


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "x.pt", {}, {})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/byteorder", "big")
    with pytest.raises(InputError, match="big-endian"):
        load_torch_file(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_is_cut(tmp_path: Path, legacy: bool) -> None:
    whole = saved(tmp_path / "x.pt", {"x": torch.arange(40.0)}, legacy=legacy).read_bytes()
    cut = tmp_path / "cut.pt"
    for size in range(0, len(whole) - (1 if legacy else 30), 3):
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError):
            load_torch_file(cut)


def test_damaged_numbers_are_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"x": torch.full((9,), 1.5)})
    path.write_bytes(path.read_bytes().replace(np.float32(1.5).tobytes(), b"abcd", 1))
    with pytest.raises(InputError, match="the checksum of its data/0 is wrong"):
        load_torch_file(path)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.pt"
    raw = bytearray(
        saved(
            path, {"x": torch.arange(6.0).reshape(2, 3), "y": [torch.ones(2)]}, legacy=True
        ).read_bytes()
    )
    for at, value in changes:
        raw[at % len(raw)] = value
    path.write_bytes(raw)

    def touch(value: object) -> None:
        if isinstance(value, PickledTensor):
            value.array.sum()
        for part in (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        ):
            touch(part)

    refusal = ""
    try:
        touch(load_torch_file(path))
    except InputError as error:
        refusal = str(error)
    assert not refusal or refusal.startswith(str(path))


def test_it_is_read_without_torch() -> None:
    assert "torch" not in torch_file.__dict__
