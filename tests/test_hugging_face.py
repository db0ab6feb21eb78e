"""Models of transformers: what it computes of them, however they were saved, and nothing of theirs is run."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import xlm_ds
from models_of_peers import MODELS, converted, hugging_face, network, tensors, transformers
from test_text_ids import made
from xlm_ds import convert, init_from, peers
from xlm_ds.dictionary import SPECIAL_SYMBOLS, Dictionary
from xlm_ds.log import InputError


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


@pytest.mark.parametrize("pickled", [False, True])
def test_a_configuration_does_not_choose_what_is_run(tmp_path: Path, pickled: bool) -> None:
    """attn_implementation may name a repository, whose code transformers would download and run."""
    model = hugging_face(tmp_path / "hf", "bert")
    if pickled:
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
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
