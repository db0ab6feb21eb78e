"""Small models of fairseq, XLM, Hugging Face and ours, every parameter far from its start, for tests of conversions."""

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from test_model import VARIANTS, perturbed_model
from xlm_ds import convert
from xlm_ds.architectures import ModelShape
from xlm_ds.dictionary import PAD, SPECIAL_SYMBOLS, Dictionary
from xlm_ds.exchange import Network
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


def converted(source: Path, out: Path, *flags: object) -> Path:
    assert convert.main([str(source), str(out), *map(str, flags)]) == 0
    return out


def tensors(folder: Path) -> bytes:
    return (folder / "weight.safetensors").read_bytes()


def largest(one: Tensor, other: Tensor, ids: Tensor) -> float:
    return float((one - other).abs()[ids != PAD].max())


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


def golden_fairseq() -> tuple[Tensor, Tensor, Tensor]:
    arrays = np.load(DATA / "model" / "base_pad.npz")
    ids, languages = (torch.from_numpy(arrays[name]) for name in ("src_tokens", "segment_labels"))
    return ids, languages[:, 0], torch.from_numpy(arrays["logits"])


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
