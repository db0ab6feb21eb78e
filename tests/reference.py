"""Slow, readable twins of what the product does fast, written from the specification."""

import hashlib
import itertools
import math
import re
import struct
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Text = TypeVar("Text", bytes, str)
Array = NDArray[np.floating[Any]]  # float32 stays float32: all factors are Python floats

# ------------------------------------------------------------------------------------------- bpe


def bpe_split(
    word: bytes, codes: list[tuple[bytes, bytes]], vocabulary: set[bytes] | None = None
) -> bytes:
    """fastBPE on one word: best merge first, everywhere; then undone until the vocabulary has every piece."""
    ranks = {pair: rank for rank, pair in enumerate(codes)}
    pieces = re.findall(rb"(?s)(?:^[\x80-\xbf]|[^\x80-\xbf])[\x80-\xbf]*", word)
    pieces[-1] += b"</w>"
    while ranked := [ranks[pair] for pair in itertools.pairwise(pieces) if pair in ranks]:
        pieces = _merge_everywhere(pieces, codes[min(ranked)], b"")
    if vocabulary:
        parts = {left + right: (left, right) for left, right in codes}
        *inside, last = pieces
        pieces = [p for piece in inside for p in _allowed(piece, parts, vocabulary, last=False)]
        pieces += _allowed(last, parts, vocabulary, last=True)
    return b"@@ ".join(pieces).removesuffix(b"</w>")


def _merge_everywhere(pieces: Sequence[Text], pair: tuple[Text, Text], empty: Text) -> list[Text]:
    merged: list[Text] = []
    at = 0
    while at < len(pieces):
        width = 2 if tuple(pieces[at : at + 2]) == pair else 1
        merged.append(empty.join(pieces[at : at + width]))
        at += width
    return merged


def _allowed(
    piece: bytes, parts: dict[bytes, tuple[bytes, bytes]], vocabulary: set[bytes], *, last: bool
) -> list[bytes]:
    shown = piece.removesuffix(b"</w>") if last else piece + b"@@"
    if shown in vocabulary or piece not in parts:
        return [piece]
    left, right = parts[piece]
    return [
        *_allowed(left, parts, vocabulary, last=False),
        *_allowed(right, parts, vocabulary, last=last),
    ]


def bpe_apply(
    text: bytes, codes: list[tuple[bytes, bytes]], vocabulary: set[bytes] | None = None
) -> bytes:
    """fastBPE applybpe on a text: words end at 0x20 and 0x0A, which are copied."""
    return re.sub(rb"[^ \n]+", lambda word: bpe_split(word[0], codes, vocabulary), text)


def bpe_replay(words: dict[str, int], merges: list[tuple[str, str]]) -> list[tuple[int, int, int]]:
    """What learning looks like when it is done by counting everything again before each of the merges.

    `words`: word -> count. For each merge: how often its pair is there, how often the most frequent pair is there, how
    often the merge is applied.
    """
    split = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    history = []
    for pair in merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in split.items():
            for neighbours in itertools.pairwise(symbols):
                pairs[neighbours] += words[word]
        applied = 0
        for word, symbols in split.items():
            merged = _merge_everywhere(symbols, pair, "")
            applied += words[word] * (len(symbols) - len(merged))
            split[word] = tuple(merged)
        history.append((pairs[pair], max(pairs.values(), default=0), applied))
    return history


# ------------------------------------------------------------------------------------- text to ids


def encode_text(text: str, symbols: list[str]) -> list[list[int]]:
    """Ids of every line by fairseq's rules: str.split's blanks, text mode's line ends, eos 2 after each line."""
    ids = {symbol: number for number, symbol in enumerate(symbols)}
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    return [[ids.get(word, 3) for word in line.split()] + [2] for line in lines]


# ------------------------------------------------------------------------------------------- model


def xlm_logits(
    params: Mapping[str, Tensor],
    *,
    heads: int,
    relu: bool,
    input_ids: Tensor,
    languages: Tensor,
    first_position_row: int = 2,
    eps: float = 1e-5,
) -> Tensor:
    """Scores of all positions (B, T, V), one row and one head at a time, without dropout.

    Follows fairseq's xlm_base in its order of steps; what there are no parameters for is left out. A row must hold at
    least one token.
    """
    return torch.stack([
        _row_logits(params, heads, relu, ids, language, first_position_row, eps)
        for ids, language in zip(input_ids, languages, strict=True)
    ])  # fmt: skip


def _row_logits(
    params: Mapping[str, Tensor],
    heads: int,
    relu: bool,
    ids: Tensor,
    language: Tensor,
    first_position_row: int,
    eps: float,
) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * params[f"{name}.weight"] + params[f"{name}.bias"]

    def activation(x: Tensor) -> Tensor:
        return x.clamp(min=0) if relu else 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    pad = ids == 1
    x = params["token_embedding.weight"][ids]
    if "language_embedding.weight" in params:
        x = x + params["language_embedding.weight"][language]
    if "position_embedding.weight" in params:
        before = [int((~pad[:i]).sum()) for i in range(len(ids))]
        x = x + params["position_embedding.weight"][[first_position_row + n for n in before]]
    if "embedding_norm.weight" in params:
        x = norm(x, "embedding_norm")
    x = torch.where(pad[:, None], torch.zeros_like(x), x)
    layer = 0
    while f"layers.{layer}.ffn.fc1.weight" in params:
        name = f"layers.{layer}"
        query, key, value = linear(x, f"{name}.attention.qkv_proj").chunk(3, dim=-1)
        size = x.shape[-1] // heads
        contexts = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[:, part] @ key[:, part].T / math.sqrt(size)
            weights = scores.masked_fill(pad[None, :], -math.inf).softmax(-1)
            contexts.append(weights @ value[:, part])
        attended = linear(torch.cat(contexts, -1), f"{name}.attention.out_proj")
        x = norm(x + attended, f"{name}.attention_norm")
        inner = activation(linear(x, f"{name}.ffn.fc1"))
        x = norm(x + linear(inner, f"{name}.ffn.fc2"), f"{name}.ffn_norm")
        layer += 1
    if "head.transform.weight" in params:
        x = norm(activation(linear(x, "head.transform")), "head.norm")
    return x @ params["token_embedding.weight"].T + params["head.output_bias"]


# --------------------------------------------------------------------------------------- optimizer


class AdamMoments(NamedTuple):
    """Running means of the gradient and of its square."""

    first: Array
    second: Array


def fairseq_adam(
    param: Array,
    gradient: Array,
    moments: AdamMoments,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Array, AdamMoments]:
    """Update number `step` (from 1) in fairseq's form: eps joins the root before its correction.

    torch's Adam adds eps to the corrected root instead, sqrt(second / (1 - beta2**step)) + eps.
    """
    beta1, beta2 = betas
    first = beta1 * moments.first + (1 - beta1) * gradient
    second = beta2 * moments.second + (1 - beta2) * gradient**2
    step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    decayed = param - lr * weight_decay * param
    return decayed - step_size * first / (np.sqrt(second) + eps), AdamMoments(first, second)


# ---------------------------------------------------------------------------- order, masks, batches

_BITS64 = (1 << 64) - 1
_WINDOW = 16
_PAD, _EOS, _MASK, _SPECIALS = 1, 2, 4, 5
_LANGUAGE_ORDER, _BLOCK_ORDER, _MASKS = 0, 1, 2  # what a seed is used for


def random_at(key: int, *path: int) -> int:
    """SplitMix64: number `index` of a key's stream is the mixed key + golden ratio * (index + 1); and so on down."""
    for index in path:
        z = (key + 0x9E3779B97F4A7C15 * (index + 1)) & _BITS64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _BITS64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _BITS64
        key = z ^ (z >> 31)
    return key


def digits(random: int, *sizes: int) -> list[int]:
    """random / 2^64 as a number with one digit in each size: a whole number below it."""
    result = []
    for size in sizes:
        digit, random = divmod(random * size, 1 << 64)
        result.append(digit)
    return result


def permuted(key: int, size: int, index: int) -> int:
    """A Feistel network on the bits of the next power of two, until it leads inside."""
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    low_size, high_size = 1 << low_bits, 1 << (bits - low_bits)
    high, low = divmod(index, low_size)
    for turn in range(0, 24 if bits <= 8 else 8, 2):
        high ^= random_at((key + turn) & _BITS64, low) % high_size
        low ^= random_at((key + turn + 1) & _BITS64, high) % low_size
    result = high * low_size + low
    return result if result < size else permuted(key, size, result)


def unpermuted(key: int, size: int, place: int) -> int:
    """The index that `permuted` sends to a place: its network backwards, until it leads inside."""
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    low_size, high_size = 1 << low_bits, 1 << (bits - low_bits)
    high, low = divmod(place, low_size)
    for turn in reversed(range(0, 24 if bits <= 8 else 8, 2)):
        low ^= random_at((key + turn + 1) & _BITS64, high) % low_size
        high ^= random_at((key + turn) & _BITS64, low) % high_size
    index = high * low_size + low
    return index if index < size else unpermuted(key, size, index)


def draw_without_chance(weights: Sequence[int], visit: int) -> tuple[int, int]:
    """(language, which of its draws): of n visits, the nearest whole number to n * share goes to the left half."""
    if len(weights) == 1:
        return 0, visit
    middle = len(weights) // 2
    share = (sum(weights[:middle]) << 64) // sum(weights)

    def left(n: int) -> int:
        return (n * share + (1 << 63)) >> 64

    if left(visit + 1) > left(visit):
        return draw_without_chance(weights[:middle], left(visit))
    language, number = draw_without_chance(weights[middle:], visit - left(visit))
    return middle + language, number


def shuffled(seed: int, window: int, languages: Sequence[int]) -> list[int]:
    """The languages of a run's window in the order they come."""
    result = list(languages)
    for i in range(_WINDOW - 1, 0, -1):
        (j,) = digits(random_at(seed, _LANGUAGE_ORDER, window, i), i + 1)
        result[i], result[j] = result[j], result[i]
    return result


def sample_at(
    seed: int, weights: Sequence[int], blocks: Sequence[int], number: int
) -> tuple[int, int, int]:
    """(language, pass, block) of a sample: its window's languages shuffled, their draws in ascending order."""
    window, place = divmod(number, _WINDOW)
    draws = [draw_without_chance(weights, window * _WINDOW + i) for i in range(_WINDOW)]
    languages = shuffled(seed, window, [language for language, _ in draws])
    language = languages[place]
    draw = sorted(n for other, n in draws if other == language)[languages[:place].count(language)]
    pass_, index = divmod(draw, blocks[language])
    key = random_at(seed, _BLOCK_ORDER, language, pass_)
    return language, pass_, permuted(key, blocks[language], index)


def samples_by_counting(
    seed: int, segments: Sequence[tuple[int, Sequence[int]]], blocks: Sequence[int], count: int
) -> list[tuple[int, int, int]]:
    """The first samples of a run whose weights change, (first sample, weights) each: draws are simply counted.

    A segment has the languages of a run of its own; the windows of all segments are numbered through.
    """
    drawn = [0] * len(blocks)
    result: list[tuple[int, int, int]] = []
    windows = 0
    ends = [first for first, _ in segments[1:]] + [max(count, segments[-1][0] + 1)]
    for (first, weights), end in zip(segments, ends, strict=True):
        languages: list[int] = []
        for visit in range(0, end - first, _WINDOW):
            window = [draw_without_chance(weights, visit + i)[0] for i in range(_WINDOW)]
            languages += shuffled(seed, windows, window)
            windows += 1
        for language in languages[: end - first]:
            pass_, index = divmod(drawn[language], blocks[language])
            key = random_at(seed, _BLOCK_ORDER, language, pass_)
            result.append((language, pass_, permuted(key, blocks[language], index)))
            drawn[language] += 1
    return result[:count]


def words_of(tokens: Sequence[int], going_on: Container[int]) -> list[list[int]]:
    """The positions of each word; a token of `going_on` is of one word with the next, unless that is eos."""
    words: list[list[int]] = []
    for i, token in enumerate(tokens):
        if i and tokens[i - 1] in going_on and token != _EOS:
            words[-1].append(i)
        else:
            words.append([i])
    return words


def masked_block(
    key: int,
    tokens: Sequence[int],
    ratio: float,
    vocab_size: int,
    going_on: Container[int] = (),
) -> tuple[list[int], list[int]]:
    """What is shown, and the masked positions: the first ceil(ratio * n) of a permutation of all words."""
    shown, positions = list(tokens), list[int]()
    words = words_of(tokens, going_on)
    count = math.ceil(ratio * len(tokens))
    for i in range(len(words)):
        j, *choice = digits(random_at(key, i), len(words) - i, 10, vocab_size - _SPECIALS)
        words[i], words[i + j] = words[i + j], words[i]
        for place in words[i][: count - len(positions)]:
            if place != words[i][0]:
                choice = digits(random_at(key, len(tokens) + place), 10, vocab_size - _SPECIALS)
            tenth, word = choice
            if tenth < 8:
                shown[place] = _MASK
            elif tenth == 8:
                shown[place] = _SPECIALS + word
            positions.append(place)
    return shown, sorted(positions)


def cut_blocks(lines: Sequence[Sequence[int]], size: int, break_mode: str) -> list[list[int]]:
    """fairseq's TokenBlockDataset; a line longer than a block loses its end."""
    if break_mode == "eos":
        return [list(line[:size]) for line in lines]
    if break_mode == "none":
        stream = [token for line in lines for token in line]
        return [stream[first : first + size] for first in range(0, len(stream), size)]
    documents: list[list[Sequence[int]]] = [[]]
    for line in lines:
        if break_mode == "complete_doc" and len(line) == 1:
            documents.append([])
        else:
            documents[-1].append(line)
    blocks: list[list[int]] = []
    for document in documents:
        block: list[int] = []
        for line in document:
            if block and len(block) + len(line) > size:
                blocks.append(block[:size])
                block = []
            block = block + list(line)
        if block:
            blocks.append(block[:size])
    return blocks


def batch_row(
    seed: int,
    sample: tuple[int, int, int],
    tokens: Sequence[int],
    *,
    size: int,
    ratio: float,
    vocab_size: int,
    going_on: Container[int] = (),
) -> tuple[list[int], list[int], list[int]]:
    """(input ids, masked positions, targets) of one sample, padded as for a block of `size` tokens."""
    key = random_at(seed, _MASKS, *sample)
    shown, positions = masked_block(key, tokens, ratio, vocab_size, going_on)
    missing = math.ceil(ratio * size) - len(positions)
    return (
        [_EOS, *shown, *[_PAD] * (size - len(tokens))],
        [1 + p for p in positions] + [0] * missing,
        [tokens[p] for p in positions] + [_PAD] * missing,
    )


def pair_row(first: Sequence[int], second: Sequence[int], size: int) -> tuple[list[int], int]:
    """What follows the eos of a row of two lines (at most `size` tokens), and where in the row the second half begins.

    While it is too long, the longer line loses a word, the second where they are as long; each keeps its last token.
    """
    one, two = list(first), list(second)
    while len(one) + 1 + len(two) > size:
        line = one if len(one) > len(two) else two
        del line[-2]
    return [*one, _EOS, *two], len(one) + 1


def stream_key(language: int, second: int | None = None) -> int:
    """What masks are keyed with, instead of the place in the run's list of streams."""
    return language if second is None else language + (second + 1) * 2**32


# --------------------------------------------------------------------------------------- digests


def sample_digest(
    number: int,
    language: int,
    ids: Sequence[int],
    masks: Mapping[int, int],
    second: tuple[int, int] | None = None,
) -> int:
    """Of a masked row; `masks`: position -> what was there; `second`: language and start of its second half."""
    words = [language, *ids, *(word for place in sorted(masks) for word in (place, masks[place]))]
    content = b"".join(word.to_bytes(4, "little") for word in words)
    salt = number.to_bytes(8, "little")
    person = b"".join(word.to_bytes(4, "little") for word in second or ())
    digest = hashlib.blake2b(content, digest_size=8, salt=salt, person=person).digest()
    return int.from_bytes(digest, "big")


def parameter_digest(weights: Sequence[float]) -> int:
    """The sum of what every weight's number (high half) and its bits in fp32 (low half) are mixed to."""
    bits = (struct.unpack("<I", struct.pack("<f", weight))[0] for weight in weights)
    return sum(random_at(number << 32 | b, 0) for number, b in enumerate(bits)) % 2**64


def chain_of(updates: Sequence[tuple[int, bytes]]) -> bytes:
    """After these updates: (number, digests)."""
    chain = bytes(8)
    for number, digests in updates:
        content = chain + number.to_bytes(8, "little") + digests
        chain = hashlib.blake2b(content, digest_size=8).digest()
    return chain


# -------------------------------------------------------------------------------------- retrieval


def retrieval(first: Array, second: Array) -> dict[str, tuple[float, float]]:
    """Percent of the vectors (N, d) whose own is the best of the other side: there and back, by cosine and margin."""
    one, other = ([v / math.sqrt(float(v @ v)) for v in side] for side in (first, second))
    count = len(one)
    nearest = min(4, count)
    cosine = [[float(a @ b) for b in other] for a in one]
    of_row = [sum(sorted(row)[-nearest:]) / nearest for row in cosine]
    of_column = [sum(sorted(column)[-nearest:]) / nearest for column in zip(*cosine, strict=True)]
    margin = [
        [cosine[i][j] / ((of_row[i] + of_column[j]) / 2) for j in range(count)]
        for i in range(count)
    ]

    def percent(scores: Sequence[Sequence[float]]) -> float:
        return (
            100 * sum(row.index(max(row)) == i for i, row in enumerate(map(list, scores))) / count
        )

    return {
        name: (percent(scores), percent([*zip(*scores, strict=True)]))
        for name, scores in (("cosine", cosine), ("margin", margin))
    }


# --------------------------------------------------------------------------------- XLM's evaluation


def xlm_evaluation(
    tokens: Sequence[int], *, bptt: int, word_pred: float, share: int
) -> list[tuple[list[int], dict[int, int]]]:
    """Of each block that XLM evaluates, its input and {position: what was there}.

    Time-major and for streams of a batch, as the specification has it (8.3, 8.8), with its one stream.
    """
    eos, mask, streams = 2, 4, 1
    batches = math.ceil(len(tokens) / (streams * bptt))
    buffer = [eos] * (batches * bptt * streams - len(tokens)) + list(tokens)
    columns = np.array(buffer).reshape(streams, batches * bptt).T
    data = np.concatenate([np.full((1, streams), eos), columns])
    generator = np.random.RandomState(0)
    result = []
    for number in range(batches // share):
        x = data[number * bptt : (number + 1) * bptt]
        to_predict = generator.rand(bptt, streams) <= word_pred
        to_predict[0] = False
        for stream in range(streams):
            to_predict[bptt - 1 :, stream] = False
            if not to_predict[: bptt - 1, stream].any():
                to_predict[generator.randint(1, bptt - 1), stream] = True
        targets = {int(t): int(x[t, 0]) for t in np.flatnonzero(to_predict[:, 0])}
        result.append(([mask if t in targets else int(x[t, 0]) for t in range(bptt)], targets))
    return result


def xlm_pair_evaluation(
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]],
    *,
    word_pred: float,
    batch_size: int,
    most: int | None,
) -> list[tuple[list[int], dict[int, int], int]]:
    """Of each pair that XLM evaluates, in its order: its input, {position: what was there}, start of its second half.

    Time-major and padded, as the specification has it (8.4, 8.8). Lines are words alone, without eos.
    """
    pad, eos, mask = 1, 2, 4
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a and b][:most]
    lengths = np.array([len(a) + 2 + len(b) + 2 for a, b in pairs])
    order = np.argsort(lengths, kind="mergesort")
    generator = np.random.RandomState(0)
    result = []
    for batch in np.array_split(order, math.ceil(len(order) / batch_size)):
        x = np.full((lengths[batch].max(), len(batch)), pad)
        for column, number in enumerate(batch):
            a, b = pairs[number]
            x[: lengths[number], column] = [eos, *a, eos, eos, *b, eos]
        to_predict = generator.rand(*x.shape) <= word_pred
        to_predict[0] = False
        for column, number in enumerate(batch):
            to_predict[lengths[number] - 1 :, column] = False
            if not to_predict[: lengths[number] - 1, column].any():
                to_predict[generator.randint(1, lengths[number] - 1), column] = True
        for column, number in enumerate(batch):
            targets = {int(t): int(x[t, column]) for t in np.flatnonzero(to_predict[:, column])}
            row = [mask if t in targets else int(x[t, column]) for t in range(lengths[number])]
            result.append((row, targets, len(pairs[number][0]) + 2))
    return result
