"""Models of fairseq and XLM: the scores that fairseq and XLM computed themselves; strangers' files."""

import argparse
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
from models_of_peers import (
    DATA,
    converted,
    fairseq_file,
    golden_fairseq,
    golden_xlm,
    largest,
    write_fairseq_of,
    xlm_file,
)
from xlm_ds import peers, torch_model
from xlm_ds.dictionary import Dictionary
from xlm_ds.log import InputError
from xlm_ds.model import XlmEncoder

# --------------------------------------------------------------------------------------- fairseq


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


# ------------------------------------------------------------------------------------------- XLM


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


# ------------------------------------------------------------------------------ strangers' pickles


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
    xlm_file(tmp_path / "x.pth", "one_relu")
    for name in ("numpy", "json", "safetensors"):
        (tmp_path / f"{name}.py").write_text("open('canary', 'w').close()\n", encoding="utf-8")
    program = (
        "from pathlib import Path; from xlm_ds.peers import open_model; open_model(Path('x.pth'))"
    )
    environment = os.environ | {"PYTHONPATH": str(DATA.parent.parent)}
    command = [sys.executable, "-P", "-c", program]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
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
