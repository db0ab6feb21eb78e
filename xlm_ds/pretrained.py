"""A trained model at work: texts to vectors, and words for a mask.

    model = xlm_ds.load("run")                                  # a run's folder, or a checkpoint's
    model.encode(["Wie geht es dir?", "Gut."], "de")            # (2, d) float32
    model.fill("The <mask> is here.", "en", top=3)              # [[Candidate("house", 0.21), …]]
    xlm_ds.load("finetuned").classify(["Wie geht es dir?"], "de")       # [Classified("question", 0.97)]

Texts are raw: the run's own tokenisation, codes and dictionary, which are in the checkpoint, make ids of them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlm_ds.batches import NO_LABEL, MaskedBatch, Rows, on_device, padded
from xlm_ds.checkpoint import (
    check_files,
    checkpoint_folder,
    is_finetuned,
    load_weights,
    read_manifest,
    trained_with,
)
from xlm_ds.classification import Classifier, Examples
from xlm_ds.config import TrainConfig
from xlm_ds.dictionary import MASK, PAD, SPECIAL_SYMBOLS, Dictionary
from xlm_ds.evaluate import load_model, shape_of
from xlm_ds.log import InputError, logger
from xlm_ds.model import XlmEncoder, build_model
from xlm_ds.pair_record import COMPANIONS
from xlm_ds.text_ids import Row, TextToIds, joined_row, rows_of_texts


class Candidate(NamedTuple):
    """A piece of the dictionary (`@@` at its end: the word goes on) and its share of the whole dictionary's."""

    piece: str
    probability: float


class Classified(NamedTuple):
    """The likeliest label of a text, and its share of all labels'."""

    label: str
    probability: float


class Pretrained:
    """The network in eval mode, so that the same texts give the same figures, and its way from text to ids."""

    def __init__(
        self,
        model: XlmEncoder,
        to_ids: TextToIds,
        languages: Sequence[str],
        longest: int | None,
        device: torch.device,
        classifier: Classifier | None = None,
        labels: Sequence[str] = (),
        texts_per_example: int = 1,
    ) -> None:
        """`longest`: ids that a text may have, its two eos included (None: any number).

        `classifier`: what `model` is part of where it was fine-tuned; it scores the labels of a text, or of two.
        """
        self.model = model.to(device).eval()
        self.classifier = None if classifier is None else classifier.to(device).eval()
        self.labels = tuple(labels)
        self.texts_per_example = texts_per_example
        self.to_ids = to_ids
        self.languages = tuple(languages)
        self.longest = longest
        self.device = device

    @classmethod
    def load(cls, path: Path | str) -> "Pretrained":
        """From a checkpoint's folder, or a run's: its best. On a GPU where there is one. Raises InputError, OSError."""
        folder = checkpoint_folder(Path(path)).resolve()
        manifest = read_manifest(folder)
        there = [name for name in ("dict.txt", *COMPANIONS) if name in manifest["sha256"]]
        check_files(folder, manifest, there)
        to_ids = TextToIds.load(folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        classifier = None
        if is_finetuned(manifest):
            classifier = load_classifier(folder, manifest, len(to_ids.dictionary))
            model = classifier.encoder
            trained = base_configuration(folder, manifest)
        else:
            model, trained = load_model(folder, len(to_ids.dictionary))
        longest = longest_row(trained, to_ids.dictionary, manifest["languages"])
        known = manifest["languages"]
        if classifier is None:
            return cls(model, to_ids, known, longest, device)
        labels, width = (manifest["finetuned"][name] for name in ("labels", "texts_per_example"))
        return cls(model, to_ids, known, longest, device, classifier, labels, width)

    def encode(
        self, texts: Iterable[str], language: str, batch_size: int = 32
    ) -> NDArray[np.float32]:
        """(N, d): of each text the mean of the last hidden states of its ids, without the eos at its begin and end.

        Raises: InputError for a language that the model does not know, or a text without a word.
        """
        check_whole_number("batch_size", batch_size, 1)
        self.language_id(language)  # said before the texts are looked at
        examples, where = examples_of(texts, 1)
        rows = rows_of_texts(examples, language, self.to_ids, self.longest, where)
        if not rows:
            return np.empty((0, self.model.token_embedding.embedding_dim), np.float32)
        found: NDArray[np.float32] = self.vectors(rows, language, batch_size).numpy()
        return found

    def vectors(self, rows: Sequence[Row], language: str, batch_size: int) -> Tensor:
        """(N, d) float32 on the CPU, of rows of ids (text_ids.rows_of_texts); see `encode`."""
        return mean_vectors(
            self.model,
            rows,
            self.language_id(language),
            rows_at_once=batch_size,
            device=self.device,
        )

    @torch.inference_mode()
    def classify(
        self, texts: Iterable[str] | Iterable[tuple[str, str]], language: str, batch_size: int = 32
    ) -> list[Classified]:
        """Of each text, or pair of texts where the model was fine-tuned on pairs, the likeliest label.

        Raises: InputError for a model that is not fine-tuned, a language that it does not know, or a text without a
        word.
        """
        if self.classifier is None:
            raise InputError(
                "the model is not fine-tuned, so it knows no labels; xlm-ds finetune makes one that does"
            )
        check_whole_number("batch_size", batch_size, 1)
        number = self.language_id(language)
        examples, where = examples_of(texts, self.texts_per_example)
        rows = rows_of_texts(examples, language, self.to_ids, self.longest, where)
        whole = Examples(rows, np.full(len(rows), NO_LABEL), np.full(len(rows), number))
        found = []
        for first in range(0, len(rows), batch_size):
            some = np.arange(first, min(first + batch_size, len(rows)))
            scores = self.classifier(on_device(whole.batch(some), self.device))
            best = scores.softmax(dim=1).max(dim=1)
            found += [
                Classified(self.labels[label], probability)
                for label, probability in zip(
                    best.indices.tolist(), best.values.tolist(), strict=True
                )
            ]
        return found

    @torch.inference_mode()
    def fill(self, text: str, language: str, top: int = 5) -> list[list[Candidate]]:
        """For each `<mask>` of the text, which stands for a word, the best pieces for it, the best first.

        Raises: InputError for an unknown language, a text without `<mask>`, or with one beyond the position table.
        """
        if self.classifier is not None:
            raise InputError(
                "the model is fine-tuned and predicts no words any more; load the one that it was made from"
            )
        symbols = self.to_ids.dictionary.symbols
        check_whole_number("top", top, 1, len(symbols) - len(SPECIAL_SYMBOLS))
        language_id = self.language_id(language)
        check_text(text, _shown(text))
        ids = self.to_ids.masked(text, language)
        whole, _ = joined_row([ids], None)
        (masks,) = np.nonzero(whole == MASK)
        if len(masks) == 0:
            raise InputError(f"{_shown(text)}: has no {SPECIAL_SYMBOLS[MASK]} to fill")
        if self.longest is not None and masks[-1] >= self.longest - 1:
            raise InputError(
                f"{_shown(text)}: a {SPECIAL_SYMBOLS[MASK]} is at position {masks[-1] + 1}, and the model has "
                f"{self.longest}; shorten the text before it"
            )
        row, was_cut = joined_row([ids], self.longest)
        if was_cut:
            logger.warning(
                f"{_shown(text)}: is longer than the {self.longest} positions of the model and is cut"
            )
        batch = MaskedBatch(
            input_ids=torch.from_numpy(row.astype(np.int64))[None].to(self.device),
            languages=torch.tensor([language_id], device=self.device),
            masked_positions=torch.from_numpy(masks).to(self.device),
            targets=torch.full((len(masks),), PAD, device=self.device),
            has_padding=False,
        )
        probabilities = self.model.logits(batch).softmax(dim=-1)
        probabilities[:, : len(SPECIAL_SYMBOLS)] = (
            0  # they are no words; the others keep their share
        )
        best = probabilities.topk(top)
        return [
            [Candidate(symbols[number], value) for number, value in zip(*mask, strict=True)]
            for mask in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def language_id(self, language: str) -> int:
        return language_id(language, self.languages)


def load_classifier(folder: Path, manifest: Mapping[str, Any], vocab_size: int) -> Classifier:
    """The network of a fine-tuned checkpoint, with its weights."""
    finetuned = manifest["finetuned"]
    trained = base_configuration(folder, manifest)
    shape = shape_of(trained, vocab_size=vocab_size, languages=len(manifest["languages"]))
    classifier = Classifier(
        build_model(shape, seed=0),
        labels=len(finetuned["labels"]),
        pooling=finetuned["pooling"],
        dropout=0.0,
    )
    load_weights(classifier, folder, manifest)
    return classifier.eval()


def base_configuration(folder: Path, manifest: Mapping[str, Any]) -> TrainConfig:
    """What the model was trained with that a fine-tuned checkpoint was made from."""
    return trained_with(folder, manifest, manifest["finetuned"]["configuration"])


def longest_row(
    trained: TrainConfig, dictionary: Dictionary, languages: Sequence[str]
) -> int | None:
    """Ids that a row may have: as many as the position table (None: there is none)."""
    shape = shape_of(trained, vocab_size=len(dictionary), languages=len(languages))
    return shape.max_positions if shape.token_positions else None


def language_id(language: str, known: Sequence[str]) -> int:
    if language not in known:
        raise InputError(f"language {language}: the model knows {', '.join(known)}")
    return known.index(language)


# ----------------------------------------------------------------------------------------- texts


def examples_of(
    texts: Iterable[str | Sequence[str]], width: int
) -> tuple[list[tuple[str, ...]], Callable[[int], str]]:
    """Each of `texts` as a tuple of `width` texts, and what to call it by its number.

    Raises InputError for what is no text, another number of them than `width`, or one text in place of a list.
    """
    if isinstance(texts, str | bytes):
        raise InputError("expected a list of texts; put the one in [ ]")
    given = list(texts)

    def where(number: int) -> str:
        return f"text {number + 1} of {len(given)} ({_shown(given[number])})"

    examples = []
    for number, value in enumerate(given):
        example = tuple(value) if isinstance(value, tuple | list) else (value,)
        if len(example) != width:
            expected = "one text" if width == 1 else "a pair of texts"
            raise InputError(
                f"{where(number)}: the model takes {expected} here, not {len(example)}"
            )
        for text in example:
            check_text(text, where(number))
        examples.append(example)
    return examples, where


def check_text(text: object, where: str) -> None:
    """Raises InputError for what is no str, or one with half a character in it."""
    if not isinstance(text, str):
        raise InputError(f"{where}: is of type {type(text).__name__}; expected a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start + 1} is a lone surrogate, of bytes that are not UTF-8; decode them with "
            "their own encoding"
        ) from error


def check_whole_number(name: str, value: int, least: int, most: float = math.inf) -> None:
    if type(value) is not int or not least <= value <= most:
        to = "up" if most == math.inf else f"to {most}"
        raise InputError(f"{name} {value}: expected a whole number from {least} {to}")


# ---------------------------------------------------------------------------------- rows to vectors


@torch.no_grad()  # not inference_mode: what ZeRO 3 gathers then could not be trained on
def mean_vectors(
    encode: Callable[[Rows], Tensor],
    rows: Sequence[Row],
    language: int,
    *,
    rows_at_once: int,
    device: torch.device,
) -> Tensor:
    """(N, d) float32 on the CPU: the mean of what `encode` makes of each row, its first and last id left out."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))  # little padding
    means = []
    for first in range(0, len(order), rows_at_once):
        some = [rows[n] for n in order[first : first + rows_at_once]]
        batch = on_device(padded(some, np.full(len(some), language)), device)
        means.append(_means(encode(batch), batch.input_ids).cpu())
    vectors = torch.cat(means)
    return torch.empty_like(vectors).index_copy_(0, torch.tensor(order), vectors)


def _means(hidden: Tensor, input_ids: Tensor) -> Tensor:
    """Hidden states (B, T, d) of padded rows (B, T) to float32 (B, d)."""
    lengths = input_ids.ne(PAD).sum(dim=1, keepdim=True)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    inside = ((places > 0) & (places < lengths - 1)).float()
    summed = torch.einsum("bt,btd->bd", inside, hidden.float())
    return summed / inside.sum(dim=1, keepdim=True)


def _shown(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 42 else shown[:41] + "…"
