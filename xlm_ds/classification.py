"""Classification on top of an encoder: examples as rows of ids, their order, the network, and its figures.

examples = Examples(rows, labels, languages)              # of all training languages
batch = examples.batch(order.samples(first, 8).blocks)    # on the CPU
scores = Classifier(encoder, labels=3, pooling="first", dropout=0.1)(batch)     # (8, 3)
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from xlm_ds.batches import NO_LABEL, LabelledBatch, Rows, copied_to
from xlm_ds.dictionary import EOS, PAD
from xlm_ds.log import InputError, logger
from xlm_ds.model import INIT_STD, XlmEncoder
from xlm_ds.text_ids import TextToIds

Ids = NDArray[np.int64]
BITS_PER_NAT = 1 / math.log(2)
# Rows are filled up to a multiple of this: few shapes, and what tensor cores multiply fastest.
ROW_UNIT = 8


# ------------------------------------------------------------------------------------------ examples


def joined_row(parts: Sequence[Ids], longest: int | None) -> tuple[NDArray[np.int32], bool]:
    """eos, the text and eos, and of a pair the second text and eos, as one row; whether it was cut to `longest`.

    Of a pair the longer text loses what is too much, down to half of the room.
    """
    room = None if longest is None else longest - len(parts) - 1
    was_cut = room is not None and sum(map(len, parts)) > room
    if room is not None and was_cut:
        first = min(len(parts[0]), max(room - sum(map(len, parts[1:])), -(-room // len(parts))))
        parts = [parts[0][:first], *(part[: room - first] for part in parts[1:])]
    eos = np.array([EOS])
    row = np.concatenate([eos, *(piece for part in parts for piece in (part, eos))])
    return row.astype(np.int32), was_cut


def rows_of_texts(
    examples: Sequence[Sequence[str]],
    language: str,
    to_ids: TextToIds,
    longest: int | None,
    where: Callable[[int], str],
) -> list[NDArray[np.int32]]:
    """Of each example, which is one text or two, its row; says how many are cut.

    `where` says of an example's number where it is from. Raises InputError for a text without a word.
    """
    rows = []
    cut = 0
    for number, texts in enumerate(examples):
        parts = [to_ids(text, language) for text in texts]
        if any(len(part) == 0 for part in parts):
            raise InputError(f"{where(number)}: a text has no word")
        row, was_cut = joined_row(parts, longest)
        rows.append(row)
        cut += was_cut
    if cut:
        logger.warning(
            f"{cut} of {len(rows)} examples in {language} are longer than the {longest} positions of the model and are "
            "cut"
        )
    return rows


class Examples(NamedTuple):
    """Rows of ids with a label and a language each."""

    rows: list[NDArray[np.int32]]
    labels: NDArray[np.int64]
    languages: NDArray[np.int64]

    def batch(self, numbers: Sequence[int] | NDArray[np.int64]) -> LabelledBatch:
        """These examples as tensors on the CPU, PAD behind the shorter ones."""
        rows = [self.rows[number] for number in numbers]
        longest = max(map(len, rows))
        width = -(-longest // ROW_UNIT) * ROW_UNIT
        input_ids = torch.full((len(rows), width), PAD)
        for place, row in enumerate(rows):
            input_ids[place, : len(row)] = torch.from_numpy(row)
        languages = torch.from_numpy(self.languages[numbers])
        has_padding = min(map(len, rows)) < width
        labels = torch.from_numpy(self.labels[numbers])
        return LabelledBatch(Rows(input_ids, languages, has_padding), labels)

    def digest(self, number: int, salt: int) -> bytes:
        """Of an example's label, language and ids, keyed by `salt`."""
        head = np.array([self.labels[number], self.languages[number]], "<i4")
        content = head.tobytes() + self.rows[number].astype("<i4").tobytes()
        return hashlib.blake2b(content, digest_size=8, salt=salt.to_bytes(8, "little")).digest()

    def sha256(self) -> str:
        """Of all of them, in their order."""
        digests = (self.digest(number, number) for number in range(len(self.rows)))
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def sample_digests(self, numbers: NDArray[np.int64], first: int) -> NDArray[np.uint64]:
        """(n,): of these examples, which are the samples `first`, `first` + 1, … (as digests.sample_digests)."""
        found = [self.digest(n, first + place) for place, n in enumerate(numbers.tolist())]
        return np.frombuffer(b"".join(found), ">u8").astype(np.uint64)


def on_device(batch: LabelledBatch, device: torch.device) -> LabelledBatch:
    if device.type == "cpu":
        return batch

    input_ids, languages, labels = (
        copied_to(tensor, device)
        for tensor in (batch.rows.input_ids, batch.rows.languages, batch.labels)
    )
    return LabelledBatch(Rows(input_ids, languages, batch.rows.has_padding), labels)


# ------------------------------------------------------------------------------------------- network


class Classifier(nn.Module):
    """An encoder without its head for words, and scores of labels from one vector of each row."""

    def __init__(self, encoder: XlmEncoder, *, labels: int, pooling: str, dropout: float) -> None:
        """`pooling`: first or mean. The scores are 0 until `init_output` has run."""
        super().__init__()
        self.encoder = encoder
        del encoder.head  # it would have no gradient
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(encoder.token_embedding.embedding_dim, labels)
        with torch.no_grad():
            self.output.weight.zero_()
            self.output.bias.zero_()

    def forward(self, batch: LabelledBatch) -> Tensor:
        """(B, C) fp32: scores of the labels."""
        hidden: Tensor = self.encoder(batch.rows)
        return self.scores(hidden, batch.rows.input_ids)

    def scores(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """(B, C) fp32 of final hidden states (B, T, d) of ids (B, T)."""
        if self.pooling == "first":
            pooled = hidden[:, 0]
        else:
            real = input_ids.ne(PAD).to(hidden.dtype)
            pooled = torch.einsum("bt,btd->bd", real, hidden) / real.sum(dim=1, keepdim=True)
        found: Tensor = self.output(self.dropout(pooled)).float()
        return found


@torch.no_grad()
def init_output(model: Classifier, seed: int) -> None:
    """N(0, INIT_STD) from the seed, the same on every rank, and not what a network's first table is drawn from."""
    key = hashlib.blake2b(f"{seed}/classifier".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    model.output.weight.normal_(0.0, INIT_STD, generator=generator)


# ------------------------------------------------------------------------------------------- figures


def label_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """(B,) nats of scores (B, C); 0 where the label is NO_LABEL."""
    return F.cross_entropy(scores, labels, ignore_index=NO_LABEL, reduction="none")


def outcome(scores: Tensor, batch: LabelledBatch, languages: int) -> Tensor:
    """(3, L) float64 on the device, by language: nats, examples, correct ones; without losses that are not finite."""
    losses = label_losses(scores, batch.labels).detach()
    counted = (batch.labels != NO_LABEL) & losses.isfinite()
    correct = counted & (scores.argmax(dim=1) == batch.labels)
    values = torch.stack([losses.where(counted, 0.0).double(), counted.double(), correct.double()])
    sums = torch.zeros(3, languages, dtype=torch.float64, device=scores.device)
    return sums.index_add_(1, batch.rows.languages, values)


def accuracy_figures(sums: Tensor, languages: Sequence[str]) -> dict[str, Any]:
    """Losses in bits per example and accuracies in percent from (3, L) sums; nothing without a count."""
    nats, counts, correct = sums
    if counts.sum() == 0:
        return {}
    there = [i for i in range(len(languages)) if counts[i] > 0]
    return {
        "loss": float(nats.sum() / counts.sum()) * BITS_PER_NAT,
        "accuracy": 100 * float(correct.sum() / counts.sum()),
        "loss_per_language": {
            languages[i]: float(nats[i] / counts[i]) * BITS_PER_NAT for i in there
        },
        "accuracy_per_language": {languages[i]: 100 * float(correct[i] / counts[i]) for i in there},
    }
