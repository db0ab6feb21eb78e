"""A model of fairseq, XLM or Hugging Face becomes one of ours, or one of ours theirs.

    python -m xlm_ds.convert run hf --to hugging-face               # BertForMaskedLM or XLMWithLMHeadModel
    python -m xlm_ds.convert run fs --to fairseq                    # fs/model.pt and fs/dict.txt
    python -m xlm_ds.convert mlm_xnli15_1024.pth x --to xlm_ds      # xlm_ds.load("x"); train --init-from x
    python -m xlm_ds.convert checkpoint_best.pt x --to xlm_ds --dict data/dict.txt

Files of torch.save are read by a reader that can run nothing in them. What is written is read again, both models score
the same rows of words, and the largest difference is said; above 1e-4 nothing is kept. Hugging Face's models are
run by transformers (pip install 'xlm_ds[hf]'), fairseq's and XLM's, which do not install any more, step by step from
their own tensors.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from xlm_ds.architectures import ModelShape
from xlm_ds.checkpoint import save_weights
from xlm_ds.config import (
    ConvertConfig,
    DataConfig,
    ModelConfig,
    OptimizationConfig,
    RunConfig,
    TrainConfig,
)
from xlm_ds.dictionary import EOS, PAD
from xlm_ds.exchange import FAIRSEQ, Hints, Logits, Network, architecture_of, state_of
from xlm_ds.files import naming
from xlm_ds.flags import parse, to_dict
from xlm_ds.hugging_face import write_hugging_face
from xlm_ds.log import EXIT_OK, InputError, logger, run_stage
from xlm_ds.peers import open_model

LARGEST_DIFFERENCE = 1e-4
SHORT_ROW = 12  # tokens of the rows that languages and padding are compared on


def convert(config: ConvertConfig) -> int:
    out = config.out
    if os.path.lexists(out):
        raise InputError(f"{out}: is there already; delete it, or give another folder")
    if not out.parent.is_dir():
        raise InputError(f"{out}: {out.parent} is no folder; make it first")
    source = open_model(config.source, Hints(config.dict, config.langs))
    logger.info(f"{config.source}: {source.kind}'s, {described(source.network)}")
    for remark in source.network.remarks:
        logger.info(f"{config.source}: {remark}")
    with naming(out):
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    temporary = beside / out.name
    try:
        with naming(out):
            said = WRITERS[config.to](source.network, temporary)
        written = open_model(temporary)
        difference = largest_difference(source.network, source.logits, written.logits)
        for remark in said:
            logger.info(f"{out}: {remark}")
        logger.info(
            f"largest difference of the scores, {config.source} and {out}: {difference:.2e} "
            f"(at most {LARGEST_DIFFERENCE:.0e})"
        )
        if not difference <= LARGEST_DIFFERENCE:
            raise InputError(
                f"{config.source}: its scores and those of the converted model differ by {difference:.2e}, more than "
                f"{LARGEST_DIFFERENCE:.0e}; nothing was kept"
            )
        temporary.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    logger.info(f"{out}: written")
    return EXIT_OK


def described(network: Network) -> str:
    shape = network.shape
    return (
        f"{shape.layers} layers of {shape.embed_dim}, {shape.vocab_size:,} words, {shape.max_positions} positions, "
        f"languages {','.join(network.languages)}"
        + ("" if shape.num_segment else " (no table of them)")
    )


# ------------------------------------------------------------------------------------------ write


def write_ours(network: Network, folder: Path) -> list[str]:
    """A checkpoint without moments; of one of ours with what it was trained with, else with what is known of that."""
    languages = network.languages
    dictionary = network.dictionary
    trained = TrainConfig(
        data=DataConfig(
            data=Path(),
            monolingual_langs=languages,
            tokens_per_sample=min(256, network.shape.max_positions),
        ),
        model=model_config(network.shape),
        optimization=OptimizationConfig(),
        run=RunConfig(),
    )
    made_with = network.made_with or {
        "configuration": to_dict(trained), "blocks": {}, "batch_samples": 0,
    }  # fmt: skip
    description = {
        **made_with,
        "languages": list(languages),
        "dictionary_sha256": dictionary.sha256,
        "converted": True,
    }
    companions = {"dict.txt": dictionary.text.encode(), **network.companions}
    save_weights(folder, network.weights, description, companions)
    if "codes" in network.companions:
        return []
    return [
        "texts must be tokenised and split already, as it has no codes; put codes (and prepare.json) beside it"
    ]


def model_config(shape: ModelShape) -> ModelConfig:
    """Flags that give a network of this shape. Raises InputError if there are none."""
    name = architecture_of(shape)
    if name is None:
        raise InputError(
            f"no architecture here has norms with eps {shape.layer_norm_eps:g} and "
            f"{'a' if shape.head_transform else 'no'} transform before the output; begin a run with its weights: train "
            "--init-from"
        )
    return ModelConfig(
        arch=name,
        encoder_layers=shape.layers,
        encoder_embed_dim=shape.embed_dim,
        encoder_ffn_embed_dim=shape.ffn_embed_dim,
        encoder_attention_heads=shape.attention_heads,
        dropout=shape.dropout,
        attention_dropout=shape.attention_dropout,
        activation_dropout=shape.activation_dropout,
        activation_fn=shape.activation_fn,
        num_segment=shape.num_segment,
        max_positions=shape.max_positions,
        no_token_positional_embeddings=not shape.token_positions,
        encoder_normalize_before=shape.normalize_embeddings and name == "xlm_base",
    )


def write_fairseq(network: Network, folder: Path) -> list[str]:
    """model.pt as fairseq 3d262bb loads it, and its dictionary."""
    shape = network.shape
    if architecture_of(shape) != "xlm_base":
        raise InputError(
            "fairseq's xlm_base has a transform before the output and norms with eps 1e-5, and this network, as XLM's, "
            "has not both; convert it with --to hugging-face, or train with --arch xlm_base"
        )
    state = state_of(network.weights, shape, FAIRSEQ)
    for part, size in (
        ("weight", (shape.embed_dim, shape.embed_dim)),
        ("bias", (shape.embed_dim,)),
    ):
        state[f"encoder.masked_lm_pooler.{part}"] = torch.zeros(size)
    args = argparse.Namespace(
        task="cross_lingual_lm", criterion="legacy_masked_lm_loss", arch="xlm_base", data="", seed=0,
        monolingual_langs=",".join(network.languages), masked_lm_only=True, fp16=False,
        tokens_per_sample=shape.max_positions, max_positions=shape.max_positions,
        encoder_layers=shape.layers, encoder_embed_dim=shape.embed_dim, encoder_ffn_embed_dim=shape.ffn_embed_dim,
        encoder_attention_heads=shape.attention_heads, num_segment=shape.num_segment,
        dropout=shape.dropout, attention_dropout=shape.attention_dropout, act_dropout=shape.activation_dropout,
        activation_fn=shape.activation_fn, pooler_activation_fn="tanh",
        encoder_learned_pos=True, no_token_positional_embeddings=not shape.token_positions,
        encoder_normalize_before=shape.normalize_embeddings, share_encoder_input_output_embed=True,
        apply_bert_init=True, sent_loss=False, sentence_class_num=2,
    )  # fmt: skip
    history = {
        "criterion_name": "LegacyMaskedLmLoss", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {},
        "num_updates": 0,
    }  # fmt: skip
    folder.mkdir()
    checkpoint = {
        "args": args,
        "model": state,
        "optimizer_history": [history],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }
    # Given a path, torch has an error of its own for a full disk.
    with (folder / "model.pt").open("wb") as file:
        torch.save(checkpoint, file)
    network.save_text_files(folder)
    return ["its masked_lm_pooler, which the loss does not depend on and no network here has, is 0"]


WRITERS = {"xlm_ds": write_ours, "fairseq": write_fairseq, "hugging-face": write_hugging_face}


# ---------------------------------------------------------------------------------------- compare


def largest_difference(network: Network, one: Logits, other: Logits) -> float:
    """Of the scores of all words, on rows that have every position, every language, padding and random words."""
    shape = network.shape
    generator = torch.Generator().manual_seed(0)

    def row(tokens: int, width: int) -> Tensor:
        words = torch.randint(EOS + 1, shape.vocab_size, (tokens - 2,), generator=generator)
        eos, padding = torch.tensor([EOS]), torch.full((width - tokens,), PAD)
        return torch.cat([eos, words, eos, padding])

    whole = shape.max_positions if shape.token_positions else 256
    short = min(SHORT_ROW, whole)
    batches = [(row(whole, whole)[None], torch.zeros(1, dtype=torch.int64))]
    for language in range(len(network.languages)):
        ids = torch.stack([row(short, short), row(short // 2 + 1, short)])
        batches.append((ids, torch.full((2,), language)))
    found = 0.0
    for ids, languages in batches:
        difference = (one(ids, languages) - other(ids, languages)).abs()[ids != PAD]
        found = max(found, float(difference.nan_to_num(nan=torch.inf).max()))
    return found


def main(argv: Sequence[str]) -> int:
    return convert(parse(ConvertConfig, argv, description=__doc__))


if __name__ == "__main__":
    sys.exit(run_stage("convert", main))
