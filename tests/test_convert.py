"""Conversions: the same bits after two, a wrong one is found, and what is lost or refused is said."""

import dataclasses
import functools
import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

import xlm_ds
from models_of_peers import (
    DATA,
    MODELS,
    WIDE,
    converted,
    hugging_face,
    network,
    tensors,
    transformers,
    xlm_file,
)
from test_text_ids import made
from xlm_ds import checkpoint, convert, exchange, peers
from xlm_ds.architectures import ModelShape
from xlm_ds.dictionary import Dictionary
from xlm_ds.exchange import Network
from xlm_ds.log import InputError
from xlm_ds.text_ids import TextToIds

FOR_FAIRSEQ = [name for name, shape in MODELS.items() if shape.head_transform]


FOR_HUGGING_FACE = [name for name, shape in MODELS.items() if shape.normalize_embeddings]


@pytest.fixture
def ours(tmp_path: Path) -> Callable[[ModelShape], Path]:
    def write(shape: ModelShape) -> Path:
        convert.write_ours(network(shape), tmp_path / "ours")
        return tmp_path / "ours"

    return write


# ----------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    ("to", "name"),
    [
        *(("fairseq", name) for name in FOR_FAIRSEQ),
        *(("hugging-face", name) for name in FOR_HUGGING_FACE),
        ("xlm_ds", "base"),
    ],
)
def test_what_comes_back_is_the_same_bit_for_bit(
    tmp_path: Path, ours: Callable[[ModelShape], Path], to: str, name: str
) -> None:
    source = ours(WIDE[name])
    there = converted(source, tmp_path / "there", "--to", to)
    back = converted(there, tmp_path / "back", "--to=xlm_ds")
    assert tensors(back) == tensors(source)
    assert (back / "dict.txt").read_bytes() == (source / "dict.txt").read_bytes()
    found, wanted = (
        json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for folder in (back, source)
    )
    for key in ("configuration", "languages", "dictionary_sha256"):
        assert found[key] == wanted[key]
    xlm_ds.load(back)


def test_a_trained_model_keeps_what_makes_ids_of_text(tmp_path: Path) -> None:
    """Its codes and tokenisation go along; the tokenizer that is written gives the same ids."""
    data = made(tmp_path, "--bpe-codes=300")
    source = tmp_path / "ours"
    whole = network(MODELS["normalized"])
    dictionary = Dictionary.load(data / "dict.txt")
    shape = dataclasses.replace(whole.shape, vocab_size=len(dictionary), num_segment=5)
    companions = {name: (data / name).read_bytes() for name in ("codes", "prepare.json")}
    languages = ("ar", "de", "en", "fr", "hi")
    whole = dataclasses.replace(
        network(shape), dictionary=dictionary, companions=companions, languages=languages
    )
    convert.write_ours(whole, source)
    there = converted(source, tmp_path / "there", "--to=hugging-face")
    tokenizer = transformers.AutoTokenizer.from_pretrained(there)
    to_ids = TextToIds.load(source)
    for language in languages:
        text = (DATA / "demo" / f"test.{language}").read_text(encoding="utf-8")
        for line in filter(str.isprintable, text.split("\n")):  # joiners are dropped there
            pieces = tokenizer._tokenize(line, lang=language)  # as it is, it takes all for English
            assert tokenizer.convert_tokens_to_ids(pieces) == to_ids(line, language).tolist()
    row = tokenizer("The <mask> is here.")["input_ids"]
    assert (row[0], row[-1], row.count(4)) == (2, 2, 1)
    back = converted(there, tmp_path / "back", "--to=xlm_ds")
    fairseq = converted(source, tmp_path / "fairseq", "--to=fairseq")
    from_fairseq = converted(fairseq, tmp_path / "from_fairseq", "--to=xlm_ds")
    for name in companions:
        assert (back / name).read_bytes() == companions[name]
        assert (from_fairseq / name).read_bytes() == companions[name]
    for model in (source, back):
        assert [c.piece for c in xlm_ds.load(model).fill("The <mask> is.", "en")[0]]


def test_without_codes_the_tokenizer_looks_pieces_up(
    tmp_path: Path, ours: Callable[[ModelShape], Path]
) -> None:
    there = converted(ours(MODELS["normalized"]), tmp_path / "there", "--to=hugging-face")
    tokenizer = transformers.AutoTokenizer.from_pretrained(there)
    assert tokenizer("w5@@ w6 zzz <mask>")["input_ids"] == [2, 5, 6, 3, 4, 2]


# ---------------------------------------------------------------------------------------- the check


@pytest.mark.parametrize("to", ["xlm_ds", "fairseq", "hugging-face"])
@pytest.mark.parametrize("damage", ["one number", "not a number"])
def test_a_conversion_that_is_wrong_is_found(
    tmp_path: Path,
    ours: Callable[[ModelShape], Path],
    monkeypatch: pytest.MonkeyPatch,
    to: str,
    damage: str,
) -> None:
    """One number of any parameter is enough."""
    source = ours(WIDE["normalized"])
    write = convert.WRITERS[to]
    names = sorted(network(WIDE["normalized"]).weights)

    def damaged(name: str, whole: Network, folder: Path) -> list[str]:
        weights = dict(whole.weights)
        weights[name] = weights[name].clone()
        last = weights[name].view(-1)[-1]
        last += float("nan") if damage == "not a number" else 0.5
        return write(dataclasses.replace(whole, weights=weights), folder)

    harmless = []
    for name in names if to == "xlm_ds" else names[:: len(names) // 3]:
        monkeypatch.setitem(convert.WRITERS, to, functools.partial(damaged, name))
        try:
            converted(source, tmp_path / "out", "--to", to)
            harmless.append(name)
        except InputError as error:
            assert "differ by" in str(error) or "is not finite" in str(error)  # noqa: PT017
            assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
    assert harmless == []


# --------------------------------------------------------------------------- what is said and refused


def test_one_of_ours_keeps_what_it_was_trained_with(
    tmp_path: Path, ours: Callable[[ModelShape], Path]
) -> None:
    source = ours(MODELS["base"])
    path = source / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["configuration"]["data"] |= {"mask_ratio": 0.3, "whole_word_masking": True, "seed": 5}
    manifest["blocks"] = {"ar": 3}
    manifest["manifest_sha256"] = checkpoint._manifest_sha256(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    out = converted(source, tmp_path / "out", "--to=xlm_ds")
    found = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    for key in exchange.MADE_WITH:
        assert found[key] == manifest[key]


def test_rows_that_nothing_reads_are_said_to_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = network(MODELS["normalized"])
    whole.weights["position_embedding.weight"][0] = 1.0
    convert.write_ours(whole, tmp_path / "ours")
    caplog.set_level("INFO", logger="xlm_ds")
    converted(tmp_path / "ours", tmp_path / "hf", "--to=hugging-face")
    assert "left out: rows of its position table that nothing reads" in caplog.text
    assert "token_type_ids=, by config.lang2id; without, it takes all text as ar" in caplog.text


@pytest.mark.parametrize(
    ("name", "to", "expected"),
    [
        ("base", "hugging-face", "no class for a network without a norm .* --encoder-normalize-b"),
        ("no_positions", "hugging-face", "no class for a network"),
        ("xlm", "hugging-face", "train with --encoder-ffn-embed-dim 64"),
        ("xlm", "fairseq", "fairseq's xlm_base has a transform before the output"),
    ],
)
def test_what_a_peer_has_no_class_for(
    tmp_path: Path, ours: Callable[[ModelShape], Path], name: str, to: str, expected: str
) -> None:
    source = ours(MODELS[name])
    with pytest.raises(InputError, match=expected):
        converted(source, tmp_path / "out", "--to", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


@pytest.mark.parametrize(
    ("flag", "kind"),
    [("--langs=ar,de,en", "ours"), ("--dict=d", "ours"), ("--dict=d", "xlm"), ("--dict=d", "bert")],
)
def test_hints_that_decide_nothing_are_refused(
    tmp_path: Path, ours: Callable[[ModelShape], Path], flag: str, kind: str
) -> None:
    source = ours(MODELS["base"]) if kind == "ours" else xlm_file(tmp_path / "x.pth", "one_relu")
    if kind == "bert":
        source = tmp_path / "hf"
        hugging_face(source, kind)
    with pytest.raises(
        InputError, match=f"^{flag.split('=')[0]}: .* which has its own; leave it out"
    ):
        converted(source, tmp_path / "out", "--to=xlm_ds", flag)


def test_a_fault_of_ours_is_not_called_a_damaged_file(
    ours: Callable[[ModelShape], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "shape_of", None)
    source = ours(MODELS["base"])
    with pytest.raises(TypeError):
        peers.open_model(source)


def test_a_run_without_a_best_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint_last").mkdir(parents=True)
    with pytest.raises(InputError, match=r"is a run without checkpoint_best so far; give .*_last"):
        converted(tmp_path / "run", tmp_path / "out", "--to=fairseq")
    with pytest.raises(InputError, match="no such file or folder"):
        converted(tmp_path / "gone", tmp_path / "out", "--to=fairseq")
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(InputError, match="is weights alone; give the folder"):
        converted(tmp_path / "x.safetensors", tmp_path / "out", "--to=fairseq")


@pytest.mark.parametrize("to", ["fairseq", "hugging-face", "xlm_ds"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, ours: Callable[[ModelShape], Path], to: str
) -> None:
    """A file may have no more bytes than this, which says the system as it says that there is no room."""
    source = ours(MODELS[next(name for name in FOR_FAIRSEQ if name in FOR_HUGGING_FACE)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*File too large"):
            converted(source, tmp_path / "out", f"--to={to}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


def test_what_is_there_stays(tmp_path: Path, ours: Callable[[ModelShape], Path]) -> None:
    source = ours(MODELS["base"])
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out: is there already"):
        converted(source, tmp_path / "out", "--to=fairseq")
    (tmp_path / "dangling").symlink_to("gone")
    for name, expected in (
        ("dangling", "is there already"),
        ("a/b", "a is no folder; make it first"),
    ):
        with pytest.raises(InputError, match=expected):
            converted(source, tmp_path / name, "--to=fairseq")
    with pytest.raises(InputError, match="is no model"):
        converted(tmp_path, tmp_path / "new", "--to=fairseq")
    with pytest.raises(InputError, match="--to onnx is not supported; there is xlm_ds, fairseq"):
        converted(source, tmp_path / "new", "--to=onnx")
