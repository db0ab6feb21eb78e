"""Models of fairseq, XLM and Hugging Face: the same scores after each conversion, and the same bits after two."""

import argparse
import dataclasses
import functools
import importlib
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import xlm_ds
from test_model import VARIANTS, perturbed_model
from test_text_ids import made
from xlm_ds import checkpoint, convert, exchange, init_from, peers, torch_model
from xlm_ds.architectures import ModelShape
from xlm_ds.dictionary import PAD, SPECIAL_SYMBOLS, Dictionary
from xlm_ds.exchange import Network
from xlm_ds.log import InputError
from xlm_ds.model import XlmEncoder
from xlm_ds.text_ids import TextToIds
from xlm_ds.xlm_pth import XLM_SPECIALS

transformers: Any = importlib.import_module("transformers")  # whose own types say little

DATA = Path(__file__).parent / "data"
LANGUAGES = ("ar", "de", "en")
MODELS = {
    name: dataclasses.replace(shape, dropout=0.3, attention_dropout=0.2, activation_dropout=0.1)
    for name, shape in {
        **VARIANTS,
        "xlm_one_language": dataclasses.replace(VARIANTS["xlm"], num_segment=1),
        "xlm_no_languages": dataclasses.replace(VARIANTS["xlm"], num_segment=0),
        "normalized_one": dataclasses.replace(VARIANTS["normalized"], num_segment=1),
        "normalized_none": dataclasses.replace(
            VARIANTS["normalized"], num_segment=0, activation_fn="relu"
        ),
    }.items()
}
WIDE = {  # as Hugging Face's XLM has it
    name: dataclasses.replace(shape, ffn_embed_dim=4 * shape.embed_dim)
    for name, shape in MODELS.items()
}
FOR_FAIRSEQ = [name for name, shape in MODELS.items() if shape.head_transform]
FOR_HUGGING_FACE = [name for name, shape in MODELS.items() if shape.normalize_embeddings]


def network(shape: ModelShape) -> Network:
    """With every parameter far from its start, but for positions that nothing reads."""
    model = perturbed_model(shape)
    if model.position_embedding is not None:
        with torch.no_grad():
            model.position_embedding.weight[: shape.first_position_row].zero_()
    words = tuple(f"w{i}" + "@@" * (i % 2) for i in range(len(SPECIAL_SYMBOLS), shape.vocab_size))
    return Network(
        shape=shape,
        weights={name: value.detach() for name, value in model.named_parameters()},
        dictionary=Dictionary((*SPECIAL_SYMBOLS, *words), tuple(range(shape.vocab_size))),
        languages=LANGUAGES[: shape.num_segment or 3],
    )


@pytest.fixture
def ours(tmp_path: Path) -> Callable[[ModelShape], Path]:
    def write(shape: ModelShape) -> Path:
        convert.write_ours(network(shape), tmp_path / "ours")
        return tmp_path / "ours"

    return write


def converted(source: Path, out: Path, *flags: object) -> Path:
    assert convert.main([str(source), str(out), *map(str, flags)]) == 0
    return out


def tensors(folder: Path) -> bytes:
    return (folder / "weight.safetensors").read_bytes()


# ------------------------------------------------------------------------------------ there and back


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


# --------------------------------------------------------------------------------------- fairseq


def fairseq_file(path: Path, **changes: Any) -> Path:
    """The golden model as fairseq saves it, with a dictionary beside it; returns the file."""
    arrays = np.load(DATA / "model" / "base_pad.npz")
    args = json.loads((DATA / "model" / "base_pad.json").read_text(encoding="utf-8"))
    state = {
        name.removeprefix("param."): torch.from_numpy(value)
        for name, value in arrays.items()
        if name.startswith("param.")
    }
    state["encoder.masked_lm_pooler.weight"] = torch.ones(64, 64)
    state["encoder.masked_lm_pooler.bias"] = torch.ones(64)
    namespace = argparse.Namespace(**{"monolingual_langs": "ar,de,en,fr,hi", **args})
    content = {"args": namespace, "model": state, "extra_state": {"best": np.float64(2.5)}}
    torch.save(content | changes, path)
    rows = "".join(f"w{number} 1\n" for number in range(args["vocab_size"] - 5))
    (path.parent / "dict.txt").write_text(rows, encoding="utf-8")
    return path


def write_fairseq_of(path: Path, name: str) -> Path:
    """One of tests/data/exchange, as fairseq saves it."""
    arrays = np.load(DATA / "exchange" / f"{name}.npz")
    args = json.loads((DATA / "exchange" / f"{name}.json").read_text(encoding="utf-8"))
    state = {
        k.removeprefix("param."): torch.from_numpy(v) for k, v in arrays.items() if "param." in k
    }
    torch.save(
        {"args": argparse.Namespace(monolingual_langs="ar, de,en,fr,hi", **args), "model": state},
        path,
    )
    rows = "".join(f"w{number} 1\n" for number in range(args["vocab_size"] - 5))
    (path.parent / "dict.txt").write_text(rows, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["normbefore", "nopos"])
def test_scores_of_its_other_networks_are_fairseqs(tmp_path: Path, name: str) -> None:
    arrays = np.load(DATA / "exchange" / f"{name}.npz")
    ids, languages, expected = (
        torch.from_numpy(arrays[key]) for key in ("src_tokens", "segment_labels", "logits")
    )
    source = write_fairseq_of(tmp_path / "x.pt", name)
    out = converted(source, tmp_path / "ours", "--to=xlm_ds")
    for model in (source, out):
        found = peers.open_model(model).logits(ids, languages[:, 0])
        assert largest(found, expected, ids) < 1e-5


def golden_fairseq() -> tuple[Tensor, Tensor, Tensor]:
    arrays = np.load(DATA / "model" / "base_pad.npz")
    ids, languages = (torch.from_numpy(arrays[name]) for name in ("src_tokens", "segment_labels"))
    return ids, languages[:, 0], torch.from_numpy(arrays["logits"])


def largest(one: Tensor, other: Tensor, ids: Tensor) -> float:
    return float((one - other).abs()[ids != PAD].max())


def test_scores_are_fairseqs(tmp_path: Path) -> None:
    ids, languages, expected = golden_fairseq()
    source = fairseq_file(tmp_path / "checkpoint_best.pt")
    assert largest(peers.open_model(source).logits(ids, languages), expected, ids) < 1e-5
    out = converted(source, tmp_path / "ours", "--to=xlm_ds")
    assert largest(peers.open_model(out).logits(ids, languages), expected, ids) < 1e-5
    assert xlm_ds.load(out).languages == ("ar", "de", "en", "fr", "hi")


def test_later_and_earlier_checkpoints_of_fairseq(tmp_path: Path) -> None:
    ids, languages, expected = golden_fairseq()
    source = fairseq_file(tmp_path / "x.pt")
    content = torch.load(source, weights_only=False)
    config = {
        "_name": None,
        "task": argparse.Namespace(monolingual_langs="ar,de,en,fr,hi"),
        "model": content["args"],
    }
    state = dict(content["model"])
    for name in [name for name in state if "q_proj" in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    for changes in ({"args": None, "cfg": config}, {"model": state}):
        torch.save(content | changes, source)
        found = peers.open_model(source).logits(ids, languages)
        assert largest(found, expected, ids) < 1e-5


@pytest.mark.parametrize(
    ("changes", "flags", "expected"),
    [
        ({"args": None}, (), "its settings have no encoder_attention_heads"),
        ({"model": {}}, (), "has no weights of a model under model"),
        ({"model": {"a": torch.ones(2)}}, (), "has no matrix encoder.sentence_encoder.embed_tok"),
        ({}, ("--langs=ar,de",), "--langs ar,de: .* has 5 languages, ar,de,en,fr,hi"),
        ({}, ("--langs=ar,de,de,fr,hi",), "--langs: de is named twice"),
        ({}, ("--dict={folder}/none",), "No such file or directory"),
        ({}, ("--to=fairseq", "--dict={folder}/short"), "has 6 rows with the special symbols, and"),
    ],
)
def test_what_is_no_model_of_fairseq(
    tmp_path: Path, changes: dict[str, Any], flags: tuple[str, ...], expected: str
) -> None:
    source = fairseq_file(tmp_path / "x.pt", **changes)
    (tmp_path / "short").write_text("a 1\n", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    filled = [flag.format(folder=tmp_path) for flag in flags]
    with pytest.raises((InputError, OSError), match=expected) as caught:
        converted(source, tmp_path / "out", "--to=xlm_ds", *filled)
    assert "\n" not in xlm_ds.log.sentence_of(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda s: s.pop("encoder.lm_output_learned_bias"),
            "has no encoder.lm_output_learned_bias",
        ),
        (lambda s: s.update({"encoder.embed_out.weight": torch.ones(128, 64)}), "another tensor"),
        (lambda s: s.update({"encoder.x": torch.ones(1)}), "has encoder.x, which no network here"),
        (
            lambda s: s["encoder.layer_norm.weight"].fill_(float("nan")),
            "encoder.layer_norm.weight is not finite",
        ),
        (
            lambda s: s.update({"encoder.layer_norm.bias": torch.ones(3)}),
            r"makes head.norm.bias \(3,\), expected \(64,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], expected: str
) -> None:
    source = fairseq_file(tmp_path / "x.pt")
    content = torch.load(source, weights_only=False)
    change(content["model"])
    torch.save(content, source)
    with pytest.raises(InputError, match=expected):
        converted(source, tmp_path / "out", "--to=xlm_ds")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- XLM


def xlm_file(path: Path, name: str, *, prefix: str = "") -> Path:
    """One of XLM's golden networks, as XLM saves it; with the positions that are kept of it."""
    arrays = np.load(DATA / "xlm" / f"{name}.npz")
    state = {
        prefix + key.removeprefix("param."): torch.from_numpy(value)
        for key, value in arrays.items()
        if key.startswith("param.")
    }
    words = [*XLM_SPECIALS, *(f"w{number}" for number in range(126))]
    content = {
        "epoch": 3,
        "model": state,
        "dico_id2word": dict(enumerate(words)),
        "dico_word2id": {word: number for number, word in enumerate(words)},
        "dico_counts": dict.fromkeys(words, 7),
        "params": {
            "emb_dim": 64, "n_heads": 4, "dropout": 0.1, "attention_dropout": 0.1,
            "gelu_activation": "relu" not in name, "asm": False, "sinusoidal_embeddings": False,
            "id2lang": dict(enumerate(["ar", "de", "en", "fr", "hi"] if name == "langs5" else ["en"])),
        },
    }  # fmt: skip
    torch.save(content, path)
    return path


def golden_xlm(name: str, folder: str = "xlm") -> tuple[Tensor, Tensor, Tensor]:
    """Ids that have a meaning here, as ours; the scores of our words."""
    arrays = np.load(DATA / folder / f"{name}.npz")
    rows = [0, 2, 1, 3, 5, *range(14, 140)]
    ours = torch.full((140,), -1)
    ours[rows] = torch.arange(len(rows))
    scores = torch.from_numpy(arrays["scores"]).transpose(0, 1)[..., rows]
    return ours[torch.from_numpy(arrays["x"]).T], torch.from_numpy(arrays["langs"][0]), scores


@pytest.mark.parametrize("name", ["langs5", "one_relu"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_scores_are_xlms(tmp_path: Path, name: str, prefix: str) -> None:
    ids, languages, expected = golden_xlm(name)
    known = (ids >= 0).all(dim=1)  # rows without a special word that has no meaning here
    assert known.any()
    ids, languages, expected = ids[known], languages[known], expected[known]
    source = xlm_file(tmp_path / "x.pth", name, prefix=prefix)
    assert largest(peers.open_model(source).logits(ids, languages), expected, ids) < 1e-5
    out = converted(source, tmp_path / "ours", "--to=xlm_ds")
    assert largest(peers.open_model(out).logits(ids, languages), expected, ids) < 1e-5
    dictionary = Dictionary.load(out / "dict.txt")
    assert dictionary.symbols[5:7] == ("w0", "w1")
    assert dictionary.counts[5:7] == (7, 7)


def test_a_file_that_xlm_wrote(tmp_path: Path) -> None:
    source = tmp_path / "nolang.pth"
    source.write_bytes(lzma.decompress((DATA / "exchange" / "nolang.pth.xz").read_bytes()))
    ids, languages, expected = golden_xlm("nolang", "exchange")
    assert (ids >= 0).all()
    out = converted(source, tmp_path / "ours", "--to=xlm_ds")
    for model in (source, out):
        assert largest(peers.open_model(model).logits(ids, languages), expected, ids) < 1e-5
    assert xlm_ds.load(out).languages == ("ar", "de", "en", "fr", "hi")


def test_what_training_on_pairs_leaves_in_its_settings(tmp_path: Path) -> None:
    """XLM's params.para_dataset has pairs of languages for keys; a word that is spelt as our mask is no word here."""
    source = xlm_file(tmp_path / "x.pth", "one_relu")
    content = torch.load(source, weights_only=False)
    content["params"]["para_dataset"] = {("en", "fr"): {"train": ("a", "b")}, ("en", None): 1}
    words = [*content["dico_id2word"].values()]
    words[20] = "<mask>"
    content["dico_id2word"] = dict(enumerate(words))
    content["dico_counts"] = dict.fromkeys(words, 7)
    torch.save(content, source)
    network = peers.open_model(source).network
    assert len(network.dictionary) == 130
    assert network.dictionary.symbols.count("<mask>") == 1


class Call:
    def __init__(self, function: Callable[..., object], *arguments: object):
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("key", ["epoch", "params", "model"])
def test_a_malicious_file_is_refused(tmp_path: Path, key: str) -> None:
    source = xlm_file(tmp_path / "x.pth", "one_relu")
    content = torch.load(source, weights_only=False)
    canary = tmp_path / "canary"
    torch.save(content | {key: Call(os.system, f"touch {canary}")}, source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"x\.pth: not read: it has 'posix\.system' before byte"):
        converted(source, tmp_path / "out", "--to=xlm_ds")
    assert sorted(tmp_path.iterdir()) == before


def test_files_are_read_in_a_process_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = xlm_file(tmp_path / "x.pth", "one_relu")

    def unreachable(path: Path) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(torch_model, "load_torch_file", unreachable)
    peers.open_model(source)
    monkeypatch.setattr(torch_model, "_STAGE", "other")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="the process that read it ended with 1"):
        peers.open_model(source)


def test_modules_where_the_command_is_given_are_not_run(tmp_path: Path) -> None:
    """Python puts that folder first, where a stranger's model may lie with a numpy.py beside it."""
    source = xlm_file(tmp_path / "x.pth", "one_relu")
    for name in ("numpy", "json", "safetensors"):
        (tmp_path / f"{name}.py").write_text("open('canary', 'w').close()\n", encoding="utf-8")
    program = (
        "from pathlib import Path; from xlm_ds.peers import open_model; open_model(Path('x.pth'))"
    )
    environment = os.environ | {"PYTHONPATH": str(DATA.parent.parent)}
    command = [sys.executable, "-P", "-c", program]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert source.exists()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("program", "ended"),
    [("bytearray(5 << 30)", "MemoryError"), ("while True: pass", "-24"), ("pass", "")],
)
def test_the_process_is_bounded(program: str, ended: str) -> None:
    """Also below a hard limit that is there already; -24 is SIGXCPU."""
    begin = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (5 << 30, 5 << 30)); "
        "from xlm_ds import torch_model; torch_model._CPU_SECONDS = 1; torch_model.limit(1 << 20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{begin}\n{program}"], capture_output=True, text=True, timeout=60
    )
    assert ended in f"{done.returncode} {done.stderr}"


# ----------------------------------------------------------------------------------- Hugging Face


def hugging_face(folder: Path, kind: str, **changes: Any) -> Any:
    """A network of transformers' own, every parameter away from its start, with a vocabulary of words."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "max_position_embeddings": 20} | changes
    bert = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    if kind == "xlm":
        config: Any = transformers.XLMConfig(emb_dim=16, n_layers=2, n_heads=2, **sizes)
        config.lang2id = {"de": 1, "en": 0}
        model: Any = transformers.XLMWithLMHeadModel(config)
        words = [*XLM_SPECIALS, *(f"w{n}" + "</w>" * (n % 2) for n in range(26))]
    elif kind == "xlm-roberta":
        sizes = {"layer_norm_eps": 1e-5, "pad_token_id": 1, "type_vocab_size": 1} | sizes
        config = transformers.XLMRobertaConfig(**bert, **sizes)
        model = transformers.XLMRobertaForMaskedLM(config)
        words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{n}" for n in range(35)), "<mask>"]
    else:
        config = transformers.BertConfig(**bert, **{"layer_norm_eps": 1e-5} | sizes)
        model = transformers.BertForMaskedLM(config)
        words = ["[PAD]", *(f"w{n}" for n in range(35)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return model.eval()


@pytest.mark.parametrize("kind", ["xlm", "bert", "xlm-roberta"])
@pytest.mark.parametrize("pickled", [False, True])
def test_models_of_transformers_are_read(tmp_path: Path, kind: str, pickled: bool) -> None:
    n_langs = {"n_langs": 2} if kind == "xlm" else {}
    model = hugging_face(tmp_path / "hf", kind, **n_langs)
    if pickled:  # as older models are
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    out = converted(tmp_path / "hf", tmp_path / "ours", "--to=xlm_ds", "--langs=x,y")
    known = xlm_ds.load(out)
    symbols = known.to_ids.dictionary.symbols
    assert symbols[:7] == (*SPECIAL_SYMBOLS, *(("w0@@", "w1") if kind == "xlm" else ("w0", "w1")))
    vocabulary = json.loads((tmp_path / "hf" / "vocab.json").read_text(encoding="utf-8"))
    there = {"xlm": ("</s>", "w0", "w1</w>"), "bert": ("[SEP]", "w0", "w1")}
    place = [vocabulary[w] for w in there.get(kind, ("</s>", "w0", "w1"))]
    row = torch.tensor([[place[0], place[1], place[2], place[0]]])
    more = {"langs": torch.ones_like(row)} if kind == "xlm" else {}
    with torch.no_grad():
        expected = model(input_ids=row, **more).logits[0, 1, place]
        found = peers.our_logits(lambda: known.model)(
            torch.tensor([[2, 5, 6, 2]]), torch.tensor([1])
        )
    assert found[0, 1, [2, 5, 6]].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        (
            "bert",
            {"layer_norm_eps": 1e-12},
            "no architecture here has norms with eps 1e-12 and a tran",
        ),
        ("bert", {"hidden_act": "silu"}, "its activation is silu; there is gelu and relu"),
        ("xlm", {"causal": True}, "has a mask of what comes after"),
        ("xlm", {"n_langs": 3}, None),
    ],
)
def test_models_of_transformers_that_are_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], expected: str | None
) -> None:
    hugging_face(tmp_path / "hf", kind, **changes)
    if expected is None:  # it has a language without a name, which is no harm
        converted(tmp_path / "hf", tmp_path / "out", "--to=xlm_ds", "--langs=a,b")
        return
    with pytest.raises(InputError, match=expected):
        converted(tmp_path / "hf", tmp_path / "out", "--to=xlm_ds", "--langs=a,b")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lang2id": ["ar"]}, "the ids of its languages are not 0, 1, 2"),
        ({"lang2id": {"ar": 0, "de": 5}}, "the ids of its languages are not 0, 1, 2"),
        ({"layer_norm_eps": None}, "is damaged, or of a kind that is not read here"),
        ({"xlm_ds": 3}, "is damaged, or of a kind that is not read here"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"model_type": "gpt2"}, "is of type gpt2"),
    ],
)
def test_configurations_that_are_wrong(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    hugging_face(tmp_path / "hf", "bert")
    path = tmp_path / "hf" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8"
    )
    with pytest.raises(InputError, match=expected) as caught:
        converted(tmp_path / "hf", tmp_path / "out", "--to=xlm_ds", "--langs=ar,de")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_configuration_does_not_choose_what_is_run(tmp_path: Path) -> None:
    """attn_implementation may name a repository, whose code transformers would download and run."""
    hugging_face(tmp_path / "hf", "bert")
    path = tmp_path / "hf" / "config.json"
    change = {"attn_implementation": "evil/repo", "dtype": "float16"}
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8"
    )
    converted(tmp_path / "hf", tmp_path / "out", "--to=xlm_ds", "--langs=ar,de")


def test_names_of_tensorflow_and_no_head(tmp_path: Path) -> None:
    model = hugging_face(tmp_path / "hf", "bert")
    state = model.state_dict()
    (tmp_path / "hf" / "model.safetensors").unlink()
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {
        functools.reduce(lambda n, pair: n.replace(*pair), names.items(), k): v
        for k, v in state.items()
    }
    torch.save(old, tmp_path / "hf" / "pytorch_model.bin")
    converted(tmp_path / "hf", tmp_path / "out", "--to=xlm_ds", "--langs=ar,de")
    bare = {k.removeprefix("bert."): v for k, v in state.items() if k.startswith("bert.")}
    torch.save(bare | {"pooler.dense.bias": torch.ones(3)}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"has pooler.dense.bias|has no cls.predictions"):
        converted(tmp_path / "hf", tmp_path / "out2", "--to=xlm_ds", "--langs=ar,de")
    found = init_from.open_source(tmp_path / "hf", ("ar", "de"))  # of what there is
    assert "layers.1.ffn.fc1.weight" in found.weights
    assert "head.output_bias" not in found.weights


def test_a_folder_that_transformers_saves_again(tmp_path: Path) -> None:
    data = made(tmp_path, "--bpe-codes=300")
    dictionary = Dictionary.load(data / "dict.txt")
    shape = dataclasses.replace(MODELS["normalized"], vocab_size=len(dictionary))
    companions = {name: (data / name).read_bytes() for name in ("codes", "prepare.json")}
    whole = dataclasses.replace(network(shape), dictionary=dictionary, companions=companions)
    convert.write_ours(whole, tmp_path / "ours")
    hf = converted(tmp_path / "ours", tmp_path / "hf", "--to=hugging-face")
    again = tmp_path / "again"
    transformers.AutoModelForMaskedLM.from_pretrained(hf).save_pretrained(again)
    transformers.AutoTokenizer.from_pretrained(hf).save_pretrained(again)
    back = converted(again, tmp_path / "back", "--to=xlm_ds")
    assert tensors(back) == tensors(tmp_path / "ours")
    assert Dictionary.load(back / "dict.txt").symbols == dictionary.symbols


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


# ------------------------------------------------------------------------------------ the check


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


def test_the_other_side_does_not_use_our_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fairseq_file(tmp_path / "x.pt")
    opened = peers.open_model(source)
    monkeypatch.setattr(XlmEncoder, "_encode", None)
    ids, languages, expected = golden_fairseq()
    assert largest(opened.logits(ids, languages), expected, ids) < 1e-5
    with pytest.raises(TypeError):
        converted(source, tmp_path / "ours", "--to=xlm_ds")
    assert not (tmp_path / "ours").exists()


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
    ("flag", "kind"), [("--langs=ar,de,en", "ours"), ("--dict=d", "ours"), ("--dict=d", "xlm")]
)
def test_hints_that_decide_nothing_are_refused(
    tmp_path: Path, ours: Callable[[ModelShape], Path], flag: str, kind: str
) -> None:
    source = ours(MODELS["base"]) if kind == "ours" else xlm_file(tmp_path / "x.pth", "one_relu")
    with pytest.raises(
        InputError, match=f"^{flag.split('=')[0]}: .* which has its own; leave it out"
    ):
        converted(source, tmp_path / "out", "--to=xlm_ds", flag)


def test_a_run_without_a_best_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint_last").mkdir(parents=True)
    with pytest.raises(InputError, match=r"is a run without checkpoint_best so far; give .*_last"):
        converted(tmp_path / "run", tmp_path / "out", "--to=fairseq")
    with pytest.raises(InputError, match="no such file or folder"):
        converted(tmp_path / "gone", tmp_path / "out", "--to=fairseq")
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(InputError, match="is weights alone; give the folder"):
        converted(tmp_path / "x.safetensors", tmp_path / "out", "--to=fairseq")


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
