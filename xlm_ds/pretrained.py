"""A trained model at work: texts to vectors, and words for a mask.

    model = xlm_ds.load("run")                                  # a run's folder, or a checkpoint's
    model.encode(["Wie geht es dir?", "Gut."], "de")            # (2, d) float32
    model.fill("The <mask> is here.", "en", top=3)              # [[Candidate("house", 0.21), …]]
    xlm_ds.load("finetuned").classify(["Wie geht es dir?"], "de")       # [Classified("question", 0.97)]

Texts are raw: the run's own tokenisation, codes and dictionary, which are in the checkpoint, make ids of them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlm_ds.batches import NO_LABEL, MaskedBatch, Rows
from xlm_ds.checkpoint import (
    BEST,
    check_files,
    is_finetuned,
    load_weights,
    read_manifest,
    trained_with,
)
from xlm_ds.classification import Classifier, Examples, rows_of_texts
from xlm_ds.classification import on_device as labelled_on_device
from xlm_ds.config import TrainConfig
from xlm_ds.dictionary import EOS, MASK, PAD, SPECIAL_SYMBOLS, Dictionary
from xlm_ds.evaluate import load_model, shape_of
from xlm_ds.log import InputError, logger
from xlm_ds.model import XlmEncoder, build_model
from xlm_ds.pair_record import COMPANIONS
from xlm_ds.text_ids import TextToIds

Ids = NDArray[np.int64]


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
    ) -> None:
        """`longest`: ids that a text may have, its two eos included (None: any number).

        `classifier`: what `model` is part of where it was fine-tuned; it scores the labels.
        """
        self.model = model.to(device).eval()
        self.classifier = None if classifier is None else classifier.to(device).eval()
        self.labels = tuple(labels)
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
        labels = manifest["finetuned"]["labels"] if classifier else ()
        return cls(model, to_ids, manifest["languages"], longest, device, classifier, labels)

    def encode(
        self, texts: Sequence[str], language: str, batch_size: int = 32
    ) -> NDArray[np.float32]:
        """(N, d): of each text the mean of the last hidden states of its ids, without the eos at its begin and end.

        Raises: InputError for a language that the model does not know, or a text without a word.
        """
        if isinstance(texts, str):
            raise InputError("encode takes a list of texts; put the one in [ ]")
        self.language_id(language)  # said before the texts are looked at
        rows = rows_of(texts, language, self.to_ids, self.longest)
        if not rows:
            return np.empty((0, self.model.token_embedding.embedding_dim), np.float32)
        vectors = mean_vectors(
            self.model,
            rows,
            self.language_id(language),
            rows_at_once=batch_size,
            device=self.device,
        )
        found: NDArray[np.float32] = vectors.numpy()
        return found

    @torch.inference_mode()
    def classify(
        self, texts: Sequence[str] | Sequence[tuple[str, str]], language: str, batch_size: int = 32
    ) -> list[Classified]:
        """Of each text, or pair of texts, the likeliest label.

        Raises: InputError for a model that is not fine-tuned, a language that it does not know, or a text without a
        word.
        """
        if self.classifier is None:
            raise InputError(
                "the model is not fine-tuned, so it knows no labels; xlm-ds finetune makes one that does"
            )
        if isinstance(texts, str):
            raise InputError("classify takes a list of texts; put the one in [ ]")
        number = self.language_id(language)
        examples = [(text,) if isinstance(text, str) else text for text in texts]
        rows = rows_of_texts(
            examples, language, self.to_ids, self.longest, lambda n: f"text {n + 1} of {len(texts)}"
        )
        whole = Examples(rows, np.full(len(rows), NO_LABEL), np.full(len(rows), number))
        found = []
        for first in range(0, len(rows), batch_size):
            some = np.arange(first, min(first + batch_size, len(rows)))
            scores = self.classifier(labelled_on_device(whole.batch(some), self.device))
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
        if not 1 <= top <= len(symbols) - len(SPECIAL_SYMBOLS):
            raise InputError(f"top {top}: the dictionary has {len(symbols) - len(SPECIAL_SYMBOLS)}")
        language_id = self.language_id(language)
        row = with_ends(self.to_ids.masked(text, language), None)
        (masks,) = np.nonzero(row == MASK)
        if len(masks) == 0:
            raise InputError(f"{_shown(text)}: has no {SPECIAL_SYMBOLS[MASK]} to fill")
        if self.longest is not None and masks[-1] >= self.longest - 1:
            raise InputError(
                f"{_shown(text)}: a {SPECIAL_SYMBOLS[MASK]} is at position {masks[-1] + 1}, and the model has "
                f"{self.longest}; shorten the text before it"
            )
        batch = MaskedBatch(
            input_ids=torch.from_numpy(_cut(row, self.longest))[None].to(self.device),
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


def checkpoint_folder(path: Path) -> Path:
    """Of a run's folder its best checkpoint; any other path as it is."""
    is_run = not (path / "manifest.json").exists() and (path / BEST).exists()
    return path / BEST if is_run else path


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


# ------------------------------------------------------------------------------------ texts to rows


def rows_of(
    texts: Sequence[str], language: str, to_ids: TextToIds, longest: int | None
) -> list[Ids]:
    """Of each text eos, its ids and eos, at most `longest`; says how many are cut.

    Raises InputError for a text without a word.
    """
    rows = []
    cut = 0
    for number, text in enumerate(texts, start=1):
        ids = to_ids(text, language)
        if len(ids) == 0:
            raise InputError(f"text {number} of {len(texts)} ({_shown(text)}) has no word")
        cut += longest is not None and len(ids) + 2 > longest
        rows.append(with_ends(ids, longest))
    if cut:
        logger.warning(
            f"{cut} of {len(texts)} texts in {language} are longer than the {longest} positions of the model and are "
            "cut"
        )
    return rows


def with_ends(ids: Ids, longest: int | None) -> Ids:
    """eos, as many of the ids as there is room for, and eos: as a line stands between two others in training."""
    eos = np.array([EOS], np.int64)
    return _cut(np.concatenate([eos, ids, eos]), longest)


def _cut(row: Ids, longest: int | None) -> Ids:
    if longest is None or len(row) <= longest:
        return row
    return np.concatenate([row[: longest - 1], row[-1:]])


def padded(rows: Sequence[Ids], language: int, device: torch.device) -> Rows:
    """The rows as one batch, PAD behind the shorter ones."""
    lengths = [len(row) for row in rows]
    input_ids = torch.full((len(rows), max(lengths)), PAD)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.from_numpy(row)
    languages = torch.full((len(rows),), language)
    return Rows(input_ids.to(device), languages.to(device), min(lengths) < max(lengths))


# ---------------------------------------------------------------------------------- rows to vectors


@torch.no_grad()  # not inference_mode: what ZeRO 3 gathers then could not be trained on
def mean_vectors(
    encode: Callable[[Rows], Tensor],
    rows: Sequence[Ids],
    language: int,
    *,
    rows_at_once: int,
    device: torch.device,
) -> Tensor:
    """(N, d) float32 on the CPU: the mean of what `encode` makes of each row, its first and last id left out."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))  # little padding
    means = []
    for first in range(0, len(order), rows_at_once):
        batch = padded([rows[n] for n in order[first : first + rows_at_once]], language, device)
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


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
