"""A run that begins with another model's weights: every row by what it stands for, and what begins anew is counted."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models_of_peers import LANGUAGES, MODELS, fairseq_file, hugging_face, network, xlm_file
from test_train import last_weights, train_here
from xlm_ds import convert
from xlm_ds.architectures import ModelShape
from xlm_ds.config import TrainConfig
from xlm_ds.dictionary import SPECIAL_SYMBOLS, Dictionary
from xlm_ds.engine import Ranks
from xlm_ds.exchange import Network
from xlm_ds.flags import parse
from xlm_ds.init_from import Taken, open_source, take_weights
from xlm_ds.log import InputError
from xlm_ds.model import XlmEncoder, build_model
from xlm_ds.run import check

STILL = (
    "--max-update=1",
    "--lr=1e-30",
    "--validate-interval-updates=0",
)  # an update that changes nothing


def largest_change(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """STILL moves what is 0 by some 1e-30, and nothing else."""
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def begun(
    source: Network, shape: ModelShape, words: Sequence[str], languages: Sequence[str]
) -> tuple[XlmEncoder, XlmEncoder, Taken]:
    """A network before it took the weights of `source`, and after."""
    shape = dataclasses.replace(shape, vocab_size=len(SPECIAL_SYMBOLS) + len(words))
    before, model = build_model(shape, seed=3), build_model(shape, seed=3)
    symbols = (*SPECIAL_SYMBOLS, *words)
    dictionary = Dictionary(symbols, (1,) * len(symbols))
    return before, model, take_weights(model, shape, source, dictionary, languages, "M")


def test_a_word_is_found_by_its_symbol() -> None:
    source = network(MODELS["base"])
    words = ("new", source.dictionary.symbols[-1], "newer", source.dictionary.symbols[7])
    before, model, taken = begun(source, MODELS["base"], words, LANGUAGES)
    rows = [0, 1, 2, 3, 4, None, len(source.dictionary) - 1, None, 7]
    bias = source.weights["head.output_bias"]
    level = (bias[len(source.dictionary) - 1] + bias[7]) / 2  # what was before was 0
    for name, anew in (("token_embedding.weight", 0.0), ("head.output_bias", level)):
        for row, place in enumerate(rows):
            expected = source.weights[name][place or 0]
            if place is None:
                expected = before.get_parameter(name)[row] + anew
            assert torch.allclose(model.get_parameter(name)[row], expected), (name, row)
    counts = np.array([0, 0, 5, 0, 0, 1, 2, 0, 2], np.uint64)
    assert taken.report(counts)[:2] == [
        "begins with the weights of M",
        "words: 2 of 4 are its words, 80.0% of those in the training text; 2 begin anew",
    ]
    assert taken.words.tolist() == [place is not None for place in rows]


@pytest.mark.parametrize("mark", ["\u2581", "\u0120"])
def test_of_marked_pieces_a_word_is_the_one_that_begins_a_word(mark: str) -> None:
    source = network(MODELS["base"])
    symbols = list(source.dictionary.symbols)
    symbols[7:9] = ["the", f"{mark}the"]
    source = dataclasses.replace(source, dictionary=Dictionary(tuple(symbols), (1,) * len(symbols)))
    _, model, taken = begun(source, MODELS["base"], ("the", symbols[9]), LANGUAGES)
    table = source.weights["token_embedding.weight"]
    assert torch.equal(model.get_parameter("token_embedding.weight")[5], table[8])
    assert taken.words.tolist() == [True] * 6 + [False]
    assert (
        f"its pieces are marked {mark} where a word begins: x here is its {mark}x"
        in taken.sentences
    )


def test_rows_of_languages_without_a_name_begin_anew(tmp_path: Path) -> None:
    path = fairseq_file(tmp_path / "x.pt")
    content = torch.load(path, weights_only=False)
    del content["args"].monolingual_langs
    torch.save(content, path)
    source = open_source(path, ("en", "de"))
    assert source.languages == ()
    shape = dataclasses.replace(source.shape, num_segment=2)
    before, model, taken = begun(source, shape, ("w3",), ("en", "de"))
    name = "language_embedding.weight"
    assert torch.equal(model.get_parameter(name), before.get_parameter(name))
    assert "languages: none as they are there; en, de begin anew" in taken.sentences


def test_a_language_is_found_by_its_name() -> None:
    source = network(MODELS["base"])
    before, model, taken = begun(
        source, dataclasses.replace(MODELS["base"], num_segment=4), ["w6"], ("en", "sw", "ar")
    )
    table = model.get_parameter("language_embedding.weight")
    theirs = source.weights["language_embedding.weight"]
    assert torch.equal(table[0], theirs[LANGUAGES.index("en")])
    assert torch.equal(table[2], theirs[LANGUAGES.index("ar")])
    start = before.get_parameter("language_embedding.weight")
    assert torch.equal(table[[1, 3]], start[[1, 3]])
    assert "languages: en, ar as they are there; sw begin anew" in taken.sentences


@pytest.mark.parametrize(("there", "here"), [("base", "base"), ("xlm", "base"), ("base", "xlm")])
@pytest.mark.parametrize("longer", [-4, 0, 4])
def test_a_position_is_found_by_its_number(there: str, here: str, longer: int) -> None:
    source, shape = network(MODELS[there]), MODELS[here]
    shape = dataclasses.replace(shape, max_positions=shape.max_positions + longer)
    before, model, taken = begun(source, shape, ["w6"], LANGUAGES)
    both = min(shape.max_positions, source.shape.max_positions)
    first, theirs = shape.first_position_row, source.shape.first_position_row
    table = model.get_parameter("position_embedding.weight")
    expected = source.weights["position_embedding.weight"][theirs : theirs + both]
    assert torch.equal(table[first : first + both], expected)
    start = before.get_parameter("position_embedding.weight")
    assert torch.equal(table[first + both :], start[first + both :])
    assert torch.equal(table[:first], start[:first])
    said = f"positions: {both} of {shape.max_positions} are of its {source.shape.max_positions}"
    assert said in taken.sentences


def test_what_one_of_them_has_not() -> None:
    source = network(dataclasses.replace(MODELS["xlm"], layers=3, activation_fn="relu"))
    before, model, taken = begun(source, MODELS["base"], ["w6"], LANGUAGES)
    for name, parameter in model.named_parameters():
        if name.startswith("layers."):
            assert torch.equal(parameter, source.weights[name]), name
        if name.startswith(("head.transform", "head.norm")):
            assert torch.equal(parameter, before.get_parameter(name)), name
    assert taken.sentences[0] == "layers: 2 of 2 are its 3"
    assert "begins anew: head.norm, head.transform" in taken.sentences
    assert "left out: embedding_norm, layers.2" in taken.sentences
    assert "activation_fn is gelu here and was relu there" in taken.sentences
    assert "layer_norm_eps is 1e-05 here and was 1e-12 there" in taken.sentences
    _, _, taken = begun(
        network(MODELS["base"]), dataclasses.replace(MODELS["base"], layers=3), ["w6"], LANGUAGES
    )
    assert taken.sentences[0] == "layers: 2 of 3 are its 2"
    assert "begins anew: layers.2" in taken.sentences


def test_models_that_do_not_fit() -> None:
    source = network(MODELS["base"])
    with pytest.raises(
        InputError, match=r"has other widths .* --encoder-embed-dim 16 --encoder-att"
    ):
        begun(
            source,
            dataclasses.replace(MODELS["base"], embed_dim=32, attention_heads=2),
            ["w6"],
            LANGUAGES,
        )
    with pytest.raises(
        InputError, match=r"has no word of the run's dictionary \('w49@@' is one of"
    ):
        begun(source, MODELS["base"], ["▁other"], LANGUAGES)


# ------------------------------------------------------------------------------------------- runs


def test_a_run_begins_with_the_weights_of_another(
    tiny_data: Path, tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="xlm_ds")
    train_here(tiny_data, tmp_path / "a", ranks, "--max-update=2", "--seed=1")
    train_here(tiny_data, tmp_path / "b", ranks, f"--init-from={tmp_path / 'a'}", *STILL)
    theirs, ours = last_weights(tmp_path / "a"), last_weights(tmp_path / "b")
    assert set(theirs) == set(ours)
    assert largest_change(theirs, ours) < 1e-25
    assert "words: 595 of 595 are its words, 100.0% of those in the training text" in caplog.text
    caplog.clear()
    more = [f"--init-from={tmp_path / 'gone'}", *STILL, "--max-update=2"]
    train_here(tiny_data, tmp_path / "b", ranks, *more)  # goes on, whatever has become of it
    assert "--init-from: decides nothing, as the run goes on from" in caplog.text
    assert "begins with the weights" not in caplog.text
    toml = (tmp_path / "b" / "config.toml").read_text(encoding="utf-8")
    assert f'init_from = "{tmp_path / "a"}"' in toml  # what it was begun with


def test_a_converted_model_is_begun_from_and_not_gone_on_from(
    tiny_data: Path, tmp_path: Path, ranks: Ranks
) -> None:
    train_here(tiny_data, tmp_path / "a", ranks, "--max-update=2")
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "c"), "--to=xlm_ds"]) == 0
    with pytest.raises(InputError, match=r"is a converted model, .* train --init-from"):
        train_here(tiny_data, tmp_path / "b", ranks, f"--restore-file={tmp_path / 'c'}", *STILL)
    shutil.rmtree(tmp_path / "b")
    config = parse(
        TrainConfig,
        [str(tiny_data), f"--save-dir={tmp_path / 'b'}", f"--restore-file={tmp_path / 'c'}"],
    )
    with pytest.raises(InputError, match="is a converted model"):
        check(config, ranks)
    train_here(tiny_data, tmp_path / "b", ranks, f"--init-from={tmp_path / 'c'}", *STILL)
    theirs, ours = last_weights(tmp_path / "a"), last_weights(tmp_path / "b")
    assert largest_change(theirs, ours) < 1e-25


@pytest.mark.parametrize("kind", ["fairseq", "XLM", "xlm", "bert", "xlm-roberta"])
def test_any_of_them_can_be_begun_from(tmp_path: Path, kind: str) -> None:
    files: dict[str, Any] = {
        "fairseq": lambda: fairseq_file(tmp_path / "x.pt"),
        "XLM": lambda: xlm_file(tmp_path / "x.pth", "langs5"),
    }
    if kind in files:
        path = files[kind]()
    else:
        path = tmp_path / "hf"
        hugging_face(path, kind, layer_norm_eps=1e-12)  # also what no architecture here has
    source = open_source(path, ("en", "de"))
    assert source.languages == {
        "fairseq": ("ar", "de", "en", "fr", "hi"), "XLM": ("ar", "de", "en", "fr", "hi"), "xlm": ("en", "de"),
    }.get(kind, ("en", "de"))  # fmt: skip
    shape = dataclasses.replace(
        source.shape, num_segment=2, head_transform=True, normalize_embeddings=False
    )
    _, model, taken = begun(source, shape, ("w3", "other"), ("en", "de"))
    assert taken.words.tolist() == [True] * 6 + [False]
    name = "layers.1.ffn.fc1.weight"
    assert torch.equal(model.get_parameter(name), source.weights[name])


def test_a_wrong_model_is_refused_before_anything_is_made(
    tiny_data: Path, tmp_path: Path, ranks: Ranks
) -> None:
    flags = [str(tiny_data), f"--save-dir={tmp_path / 'run'}", "--max-update=1"]
    convert.write_ours(network(MODELS["base"]), tmp_path / "narrow")
    for name, expected in (("none", "none"), ("narrow", "--encoder-embed-dim 16")):
        config = parse(TrainConfig, [*flags, f"--init-from={tmp_path / name}"])
        with pytest.raises((InputError, OSError), match=expected):
            check(config, ranks)
    assert not (tmp_path / "run").exists()
