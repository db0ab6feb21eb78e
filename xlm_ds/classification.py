"""Classification on top of an encoder: examples as rows of ids, their order, the network, and its figures.

examples = Examples(rows, labels, languages)              # of all training languages
batch = examples.batch(order.samples(first, 8).blocks)    # on the CPU
scores = Classifier(encoder, labels=3, pooling="first", dropout=0.1)(batch)     # (8, 3)
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from xlm_ds.batches import NO_LABEL, LabelledBatch, padded
from xlm_ds.dictionary import PAD
from xlm_ds.metrics import BITS_PER_NAT
from xlm_ds.model import INIT_STD, XlmEncoder

# ------------------------------------------------------------------------------------------ examples


class Examples(NamedTuple):
    """Rows of ids with a label and a language each."""

    rows: list[NDArray[np.int32]]
    labels: NDArray[np.int64]
    languages: NDArray[np.int64]

    def batch(self, numbers: Sequence[int] | NDArray[np.int64]) -> LabelledBatch:
        """These examples as tensors on the CPU, PAD behind the shorter ones."""
        rows = padded([self.rows[number] for number in numbers], self.languages[numbers])
        return LabelledBatch(rows, torch.from_numpy(self.labels[numbers]))

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
