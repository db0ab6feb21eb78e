"""Batches: equal to their twin, exact counts, BERT's proportions, the same for any world size and micro-batch."""

import dataclasses
import itertools
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference
from pairs import write_lazy, write_mmap
from xlm_ds import _core
from xlm_ds.batches import (
    MaskedBatch,
    Masking,
    build_batch,
    build_masking,
    count_targets,
    evaluation_batches,
    join_batches,
    rank_slice,
)
from xlm_ds.corpus import Corpus, micro_batch, update_targets
from xlm_ds.dataset import open_split
from xlm_ds.dictionary import SPECIAL_SYMBOLS, Dictionary
from xlm_ds.geometry import Geometry
from xlm_ds.log import InputError
from xlm_ds.order import Samples, build_order
from xlm_ds.steps import Steps
from xlm_ds.streams import Stream, alone

V = 1000
MASKING = Masking(seed=5, mask_ratio=0.15, vocab_size=V)
PAD, EOS, MASK = 1, 2, 4


def open_all(
    folder: Path, languages: str = "ab", *, length: int = 256, mode: str = "none"
) -> tuple[Stream, ...]:
    return alone(
        open_split(
            folder,
            "train",
            list(languages),
            tokens_per_sample=length,
            break_mode=mode,
            vocab_size=V,
            dictionary_sha256="",
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two languages of random ids: a with 41 blocks of 255, the last short; b with 10 whole ones."""
    path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    write_mmap(path / "train.a", [rng.integers(5, V, 40 * 255 + 7).tolist()])
    write_lazy(path / "train.b", [rng.integers(5, V, 10 * 255).tolist()])
    return path


@pytest.fixture(scope="module")
def datasets(folder: Path) -> tuple[Stream, ...]:
    return open_all(folder)


def samples_of(*rows: tuple[int, int, int]) -> Samples:
    return Samples(*(np.array(column, np.int64) for column in zip(*rows, strict=True)))


def originals(batch: MaskedBatch) -> torch.Tensor:
    """The rows before masking."""
    real = batch.targets != PAD
    ids = batch.input_ids.flatten().clone()
    ids[batch.masked_positions[real]] = batch.targets[real]
    return ids.view_as(batch.input_ids)


# ------------------------------------------------------------------------------------------ twin

LINES = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=40), min_size=1, max_size=8)


def dictionary_of(going_on: Iterable[int]) -> Dictionary:
    """V symbols, of which those of these ids end with @@."""
    marked = set(going_on)
    return Dictionary(tuple(f"w{i}@@" if i in marked else f"w{i}" for i in range(V)), (1,) * V)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    LINES,
    st.sampled_from([write_mmap, write_lazy]),
    st.sampled_from(["none", "eos"]),
    st.integers(1, 70),
    st.floats(0, 1),
    st.integers(0, 2**64 - 1),
    st.none() | st.sets(st.integers(5, V - 1)) | st.sampled_from([range(5, V), range(100, V)]),
    st.data(),
)
def test_batches_equal_their_twin(
    tmp_path: Path,
    lines: list[list[int]],
    write: Callable[[Path, list[list[int]]], None],
    mode: str,
    size: int,
    ratio: float,
    seed: int,
    going_on: Collection[int] | None,
    data: st.DataObject,
) -> None:
    """`going_on`: ids of the symbols that end with @@, or nothing where words are not masked whole."""
    write(tmp_path / "train.a", lines)
    datasets = open_all(tmp_path, "a", length=size + 1, mode=mode)
    blocks = reference.cut_blocks(lines, size, mode)
    chosen = data.draw(st.lists(st.integers(0, len(blocks) - 1), min_size=1, max_size=5))
    passes = data.draw(st.lists(st.integers(0, 2**40), min_size=len(chosen), max_size=len(chosen)))
    samples = samples_of(*((0, p, k) for p, k in zip(passes, chosen, strict=True)))
    masking = build_masking(
        dictionary_of(going_on or ()),
        seed=seed,
        mask_ratio=ratio,
        whole_words=going_on is not None,
    )
    batch = build_batch(datasets, samples, masking)

    numbers = {"size": size, "ratio": ratio, "vocab_size": V, "going_on": going_on or ()}
    twins = [
        reference.batch_row(seed, (0, p, k), blocks[k], **numbers)  # type: ignore[arg-type]
        for p, k in zip(passes, chosen, strict=True)
    ]
    assert batch.input_ids.tolist() == [ids for ids, _, _ in twins]
    flat = [row * (size + 1) + p for row, (_, positions, _) in enumerate(twins) for p in positions]
    assert batch.masked_positions.tolist() == flat
    assert batch.targets.tolist() == [t for _, _, targets in twins for t in targets]
    assert batch.has_padding == any(len(blocks[k]) < size for k in chosen)
    expected = sum(len(reference.masked_block(0, blocks[k], ratio, V)[1]) for k in chosen)
    assert count_targets(datasets, samples, ratio) == expected


# ----------------------------------------------------------------------------------- whole words

# Two symbols of five go on.
GOING_ON = [i for i in range(5, V) if i % 5 < 2]
WHOLE_WORDS = build_masking(dictionary_of(GOING_ON), seed=5, mask_ratio=0.15, whole_words=True)


def masked_of(batch: MaskedBatch, row: int) -> set[int]:
    """Places of a row's block that are masked."""
    length = batch.input_ids.shape[1]
    chosen = (batch.masked_positions // length == row) & (batch.targets != PAD)
    return set((batch.masked_positions[chosen] % length - 1).tolist())


def test_words_are_masked_whole_but_for_one_of_a_row(datasets: tuple[Stream, ...]) -> None:
    """As many tokens as without, and the word that is cut loses its end."""
    samples = build_order([40, 10], alpha=1, seed=0).samples(0, 400)
    batch = build_batch(datasets, samples, WHOLE_WORDS)
    rows = originals(batch)[:, 1:].tolist()
    cut_rows = longest = 0
    for row, tokens in enumerate(rows):
        words = reference.words_of(tokens, GOING_ON)
        longest = max(longest, *map(len, words))
        masked = masked_of(batch, row)
        assert len(masked) == 39
        cut = [word for word in words if 0 < len(masked & set(word)) < len(word)]
        cut_rows += len(cut)
        assert len(cut) <= 1
        for word in cut:
            assert masked & set(word) == set(word[: len(masked & set(word))])
    assert longest > 3
    assert 20 < cut_rows < 380, "in vain"
    plain = build_batch(datasets, samples, MASKING)
    cut = [
        word
        for row, tokens in enumerate(rows)
        for word in reference.words_of(tokens, GOING_ON)
        if 0 < len(masked_of(plain, row) & set(word)) < len(word)
    ]
    assert len(cut) > 10 * 400, "tokens alone would do the same"


def test_every_token_of_a_word_is_shown_by_chances_of_its_own(
    datasets: tuple[Stream, ...],
) -> None:
    """Shares within 4.5 standard deviations, of first tokens of words and of others, which know nothing of them."""
    rows = 3000
    samples = build_order([40, 10], alpha=1, seed=0).samples(0, rows)
    batch = build_batch(datasets, samples, WHOLE_WORDS)
    before = originals(batch).flatten()
    follows = torch.isin(before[batch.masked_positions - 1], torch.tensor(GOING_ON))
    is_mask = batch.input_ids.flatten()[batch.masked_positions] == MASK
    is_kept = batch.input_ids.flatten()[batch.masked_positions] == batch.targets
    for part in (follows, ~follows):
        count = int(part.sum())
        assert count > 1000
        for found, share in ((is_mask, 0.8), (is_kept, 0.1 + 0.1 / (V - 5))):
            spread = (count * share * (1 - share)) ** 0.5
            assert abs(int((found & part).sum()) - count * share) < 4.5 * spread
    together = follows[1:] & (batch.masked_positions.diff() == 1)
    pairs = torch.stack([is_mask[:-1][together], is_mask[1:][together]]).double()
    assert abs(torch.corrcoef(pairs)[0, 1].item()) < 4.5 / int(together.sum()) ** 0.5


def test_without_subwords_whole_words_are_tokens(datasets: tuple[Stream, ...]) -> None:
    samples = build_order([40, 10], alpha=1, seed=0).samples(0, 50)
    words = build_masking(dictionary_of(()), seed=5, mask_ratio=0.15, whole_words=True)
    assert words.word_goes_on is not None
    batches = [build_batch(datasets, samples, masking) for masking in (words, MASKING)]
    assert all(torch.equal(a, b) for a, b in zip(*(b[:4] for b in batches), strict=True))


def test_a_larger_ratio_masks_more_of_the_same_words(datasets: tuple[Stream, ...]) -> None:
    sets = [
        masked_of(
            build_batch(
                datasets, samples_of((0, 0, 3)), dataclasses.replace(WHOLE_WORDS, mask_ratio=r)
            ),
            0,
        )
        for r in (0.0, 0.1, 0.15, 0.5, 1.0)
    ]
    assert [len(s) for s in sets] == [0, 26, 39, 128, 255]
    assert all(a < b for a, b in itertools.pairwise(sets))


def test_eos_is_a_word_of_its_own(tmp_path: Path) -> None:
    """Also after a symbol that should go on: a word never runs into the next line."""
    write_mmap(tmp_path / "train.a", [[10, EOS, 10, EOS] * 25])
    masking = build_masking(dictionary_of([10]), seed=5, mask_ratio=0.5, whole_words=True)
    datasets = open_all(tmp_path, "a", length=101)
    plain = dataclasses.replace(masking, word_goes_on=None)
    batches = [build_batch(datasets, samples_of((0, 0, 0)), m) for m in (masking, plain)]
    assert torch.equal(batches[0].masked_positions, batches[1].masked_positions)


def test_bits_are_those_of_the_symbols_that_end_with_at_signs() -> None:
    symbols = (*SPECIAL_SYMBOLS, *(f"w{i}{'@@' * (i % 3 == 0)}" for i in range(123)), "@@", "a@@b")
    bits = Dictionary(symbols, (1,) * len(symbols)).word_goes_on
    assert bits.dtype == np.uint64
    assert len(bits) == 3
    found = {i for i in range(192) if int(bits[i // 64]) >> (i % 64) & 1}
    assert found == {5 + i for i in range(0, 123, 3)} | {128}


def test_bits_for_too_few_ids_are_refused(datasets: tuple[Stream, ...]) -> None:
    short = dataclasses.replace(WHOLE_WORDS, word_goes_on=WHOLE_WORDS.word_goes_on[:-1])  # type: ignore[index]
    with pytest.raises(ValueError, match="no bit for some of the ids"):
        build_batch(datasets, samples_of((0, 0, 0)), short)


# ------------------------------------------------------------------------------------------ laws


def test_a_batch_is_eos_and_the_block(datasets: tuple[Stream, ...]) -> None:
    batch = build_batch(datasets, samples_of((0, 0, 3), (1, 2, 9), (0, 0, 40)), MASKING)
    assert [tuple(t.shape) for t in batch[:4]] == [(3, 256), (3,), (117,), (117,)]
    assert {t.dtype for t in batch[:4]} == {torch.int64}
    assert batch.languages.tolist() == [0, 1, 0]
    assert batch.has_padding
    blocks = [datasets[stream].sides[0].block(k) for stream, k in ((0, 3), (1, 9), (0, 40))]
    assert originals(batch).tolist() == [
        [EOS, *block, *[PAD] * (255 - len(block))] for block in blocks
    ]
    # The short row: ceil(0.15 * 7) = 2 targets, the rest filled up.
    assert (batch.targets[80:] == PAD).all()
    assert (batch.masked_positions[80:] == 2 * 256).all()
    assert not build_batch(datasets, samples_of((0, 0, 3)), MASKING).has_padding


def test_exactly_39_of_255_in_ascending_order(datasets: tuple[Stream, ...]) -> None:
    samples = build_order([40, 10], alpha=1, seed=0).samples(0, 500)
    rows = build_batch(datasets, samples, MASKING).masked_positions.view(500, 39)
    inside = rows - 256 * torch.arange(500)[:, None]
    assert inside.min() == 1, "the leading eos is never masked, the first token may be"
    assert inside.max() == 255
    assert (rows.diff(dim=1) > 0).all()


def test_eighty_ten_ten_and_uniform(datasets: tuple[Stream, ...]) -> None:
    """Shares within 4.5 standard deviations; chi-square of words and positions within 5 of its mean."""
    rows = 4000
    samples = build_order([40, 10], alpha=1, seed=0).samples(0, rows)
    batch = build_batch(datasets, samples, MASKING)
    shown = batch.input_ids.flatten()[batch.masked_positions]
    count = 39 * rows
    masked = (shown == MASK).sum().item()
    unchanged = (shown == batch.targets).sum().item()
    words = shown[(shown != MASK) & (shown != batch.targets)]
    # A random word is the word itself once in V - 5 times.
    for found, share in [
        (masked, 0.8),
        (unchanged, 0.1 + 0.1 / (V - 5)),
        (len(words), 0.1 - 0.1 / (V - 5)),
    ]:
        assert abs(found - count * share) < 4.5 * (count * share * (1 - share)) ** 0.5
    assert words.min() == 5, "special symbols are no random words"
    assert words.max() == V - 1
    for values, cells in [(words - 5, V - 5), (batch.masked_positions % 256 - 1, 255)]:
        counts = torch.bincount(values, minlength=cells).double()
        expected = len(values) / cells
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - cells) < 5 * (2 * cells) ** 0.5


def test_every_position_meets_every_choice_alike(datasets: tuple[Stream, ...]) -> None:
    """One random number decides a position and what it shows: the two must not know of each other."""
    samples = build_order([40, 10], alpha=1, seed=0).samples(0, 4000)
    batch = build_batch(datasets, samples, MASKING)
    shown = batch.input_ids.flatten()[batch.masked_positions]
    is_mask = (shown == MASK).double()
    position = (batch.masked_positions % 256).double()
    correlation = torch.corrcoef(torch.stack([is_mask, position]))[0, 1].item()
    assert abs(correlation) < 4.5 / len(shown) ** 0.5


def test_masks_change_with_pass_block_language_and_seed(
    datasets: tuple[Stream, ...],
) -> None:
    """A sample's masks are its own: static masks would be learnt by heart (RoBERTa, section 4.1)."""
    rows = [(0, 0, 3), (0, 1, 3), (0, 2, 3), (0, 0, 4), (1, 0, 3)]
    masks = [
        tuple((build_batch(datasets, samples_of(row), masking).masked_positions).tolist())
        for row in rows
        for masking in (MASKING, Masking(seed=6, mask_ratio=0.15, vocab_size=V))
    ]
    assert len(set(masks)) == len(masks)
    overlaps = [len({*masks[i]} & {*masks[j]}) for i in range(len(masks)) for j in range(i)]
    assert 3 < np.mean(overlaps) < 9  # 39 * 39 / 255 = 6 if independent
    assert masks[0] == tuple(
        build_batch(datasets, samples_of(rows[0]), MASKING).masked_positions.tolist()
    )


def test_a_larger_ratio_keeps_the_smaller_ones_positions(
    datasets: tuple[Stream, ...],
) -> None:
    """The masked positions are the first of one permutation."""
    sets = [
        set(
            build_batch(
                datasets, samples_of((0, 0, 3)), Masking(seed=5, mask_ratio=r, vocab_size=V)
            ).masked_positions.tolist()
        )
        for r in (0.0, 0.1, 0.15, 0.5, 1.0)
    ]
    assert [len(s) for s in sets] == [0, 26, 39, 128, 255]
    assert all(a < b for a, b in itertools.pairwise(sets))


@pytest.mark.parametrize("masking", [MASKING, WHOLE_WORDS], ids=["tokens", "words"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_same_samples_for_any_world_size_and_micro_batch(
    datasets: tuple[Stream, ...], world_size: int, rows: int, masking: Masking
) -> None:
    order = build_order([d.blocks for d in datasets], alpha=0.7, seed=2)
    first, count = 1234, 42
    whole = build_batch(datasets, order.samples(first, count), masking)
    parts = []
    for rank in range(world_size):
        start, share = rank_slice(first, count, rank=rank, world_size=world_size)
        for at in range(start, start + share, rows):
            samples = order.samples(at, min(rows, start + share - at))
            parts.append(build_batch(datasets, samples, masking))
    assert torch.equal(torch.cat([p.input_ids for p in parts]), whole.input_ids)
    assert torch.equal(torch.cat([p.languages for p in parts]), whole.languages)
    assert torch.equal(torch.cat([p.targets for p in parts]), whole.targets)
    assert any(p.has_padding for p in parts) == whole.has_padding
    everything = order.samples(first, count)
    real = (whole.targets != PAD).sum().item()
    assert count_targets(datasets, everything, 0.15) == real


def test_count_targets_sees_short_blocks(datasets: tuple[Stream, ...]) -> None:
    assert count_targets(datasets, samples_of((0, 0, 3), (1, 0, 0)), 0.15) == 78
    assert count_targets(datasets, samples_of((0, 0, 40), (1, 0, 0)), 0.15) == 41


@given(st.integers(0, 2**60), st.integers(0, 10_000), st.integers(1, 200))
def test_rank_slices_cover_the_range_once(first: int, count: int, world_size: int) -> None:
    slices = [rank_slice(first, count, rank=r, world_size=world_size) for r in range(world_size)]
    assert slices[0][0] == first
    for (start, share), (after, _) in itertools.pairwise(slices):
        assert start + share == after
    assert sum(slices[-1]) == first + count
    assert max(s for _, s in slices) - min(s for _, s in slices) <= 1


# ------------------------------------------------------------------------- a ratio that changes


def corpus_of(datasets: tuple[Stream, ...], mask_ratio: Steps) -> Corpus:
    order = build_order([d.blocks for d in datasets], alpha=0.7, seed=2)
    dictionary = Dictionary(symbols=("a",), counts=(1,))
    return Corpus(dictionary, ("a", "b"), datasets, datasets, order, MASKING, mask_ratio)


def row_sets(batch: MaskedBatch) -> list[tuple[list[int], dict[int, int]]]:
    """Of every row: its ids, and what is to be predicted where. What only fills up is left out."""
    rows, length = batch.input_ids.shape
    targets: list[dict[int, int]] = [{} for _ in range(rows)]
    places = zip(batch.masked_positions.tolist(), batch.targets.tolist(), strict=True)
    for place, target in places:
        if target != PAD:
            targets[place // length][place % length] = target
    return list(zip(batch.input_ids.tolist(), targets, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("steps", ["0.15@0,0.3@40samples", "0.15@0,0.1@3samples,0.5@4samples"])
def test_a_samples_masks_do_not_depend_on_the_batch_a_new_ratio_falls_in(
    datasets: tuple[Stream, ...], rows: int, steps: str
) -> None:
    """A run that goes on with another batch meets the new ratio inside an update: still at its sample."""
    corpus = corpus_of(datasets, Steps.parse(steps))
    found, targets = [], 0
    for first in range(0, 48, 2 * rows):
        geometry = Geometry(rows, 2, 1)
        for micro in range(2):
            batch = micro_batch(corpus, geometry, first=geometry.first_sample(first, micro, rank=0))
            assert len(batch.targets) == len(batch.masked_positions)
            found += row_sets(batch)
        targets += update_targets(corpus, geometry, first=first)
    for i in range(48):
        masking = Masking(seed=5, mask_ratio=corpus.mask_ratio.at(i), vocab_size=V)
        (alone,) = row_sets(build_batch(datasets, corpus.order.samples(i, 1), masking))
        assert found[i] == alone
    assert targets == sum(len(there) for _, there in found[: 48 // (2 * rows) * 2 * rows])
    assert len({len(there) for _, there in found}) > 1


def test_batches_of_different_ratios_are_joined_to_the_wider(
    datasets: tuple[Stream, ...],
) -> None:
    parts = [
        build_batch(datasets, samples_of(*rows), Masking(seed=5, mask_ratio=ratio, vocab_size=V))
        for rows, ratio in ((((0, 0, 3), (0, 0, 40)), 0.15), (((1, 0, 2),), 0.2))
    ]
    joined = join_batches(parts)
    assert [tuple(t.shape) for t in joined[:4]] == [(3, 256), (3,), (153,), (153,)]
    assert joined.has_padding
    assert (joined.targets.view(3, 51)[0, 39:] == PAD).all()
    assert (joined.masked_positions.view(3, 51)[0, 39:] == 0).all()
    assert (joined.masked_positions.view(3, 51)[1, 39:] == 256).all()
    assert row_sets(joined) == [row for part in parts for row in row_sets(part)]
    assert join_batches(parts[:1]) is parts[0]


# ------------------------------------------------------------------------------------ evaluation


def test_evaluation_sees_every_block_once_and_no_tail_is_lost(
    datasets: tuple[Stream, ...],
) -> None:
    def run(rows: int, blocks: range | None = None) -> list[MaskedBatch]:
        batches = evaluation_batches(datasets[0], MASKING, draw=1, rows=rows, blocks=blocks)
        return list(batches)

    batches = run(8)
    assert [len(b.languages) for b in batches] == [8, 8, 8, 8, 8, 1]
    tokens = torch.cat([originals(b) for b in batches])[:, 1:]
    stream = np.concatenate([datasets[0].sides[0].block(k) for k in range(41)])
    assert tokens.flatten()[: len(stream)].tolist() == stream.tolist()
    ids = torch.cat([b.input_ids for b in batches])
    assert torch.equal(torch.cat([b.input_ids for b in run(41)]), ids)
    shares = [b.input_ids for part in (range(20), range(20, 41)) for b in run(6, part)]
    assert torch.equal(torch.cat(shares), ids)


def test_evaluation_masks_belong_to_the_language_id_and_draw(
    datasets: tuple[Stream, ...],
) -> None:
    """A language evaluated alone has the masks it has among all."""
    (alone,) = evaluation_batches(datasets[1], MASKING, draw=2, rows=16)
    together = build_batch(datasets, samples_of(*((1, 2, k) for k in range(10))), MASKING)
    assert torch.equal(alone.input_ids, together.input_ids)
    assert alone.languages.tolist() == [1] * 10
    (other,) = evaluation_batches(datasets[1], MASKING, draw=3, rows=16)
    assert not torch.equal(alone.input_ids, other.input_ids)


# ------------------------------------------------------------------------------------- bad input


def test_another_dictionary_is_seen_in_the_ids(datasets: tuple[Stream, ...]) -> None:
    small = Masking(seed=0, mask_ratio=0.15, vocab_size=500)
    with pytest.raises(InputError, match="made with another dictionary"):
        build_batch(datasets, samples_of((0, 0, 0)), small)


@pytest.mark.parametrize(
    ("ratio", "vocab_size", "message"),
    [(1.5, V, "mask ratio"), (-0.1, V, "mask ratio"), (0.15, 5, "dictionary of 5 symbols")],
)
def test_masking_that_cannot_be_done_is_refused(
    datasets: tuple[Stream, ...], ratio: float, vocab_size: int, message: str
) -> None:
    masking = Masking(seed=0, mask_ratio=ratio, vocab_size=vocab_size)
    with pytest.raises(InputError, match=message):
        build_batch(datasets, samples_of((0, 0, 0)), masking)


def test_what_is_not_there_is_refused(datasets: tuple[Stream, ...]) -> None:
    for row in [(2, 0, 0), (-1, 0, 0), (0, 0, 41), (0, 0, -1)]:
        with pytest.raises(IndexError):
            build_batch(datasets, samples_of(row), MASKING)
    with pytest.raises(IndexError, match="no stream 0"):
        build_batch([None, datasets[1]], samples_of((0, 0, 0)), MASKING)


def test_streams_of_different_length_are_refused(folder: Path) -> None:
    mixed = [open_all(folder, "a")[0], open_all(folder, "b", length=128)[0]]
    with pytest.raises(ValueError, match="differ in block size"):
        build_batch(mixed, samples_of((0, 0, 0), (1, 0, 0)), MASKING)


def fill(datasets: tuple[Stream, ...], **arrays: np.ndarray) -> tuple[bool, bool]:
    fitting = {name: np.zeros(2, np.int64) for name in ("numbers", "passes", "blocks")}
    columns = ("languages", "second_languages", "second_starts")
    fitting |= {name: np.empty(2, np.int64) for name in columns}
    fitting |= {name: np.empty(78, np.int64) for name in ("masked_positions", "targets")}
    fitting |= {"input_ids": np.empty((2, 256), np.int64)}
    cores = [dataset.core for dataset in datasets]
    return _core.fill_batch(cores, **(fitting | arrays), seed=0, mask_ratio=0.15, vocab_size=V)


READ_ONLY = np.empty(78, np.int64)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("name", "array", "error"),
    [
        ("input_ids", np.empty((2, 255), np.int64), ValueError),
        ("input_ids", np.empty((2, 512), np.int64)[:, ::2], TypeError),
        ("targets", np.empty(77, np.int64), ValueError),
        ("targets", np.empty(78, np.int32), TypeError),
        ("targets", READ_ONLY, ValueError),
        ("passes", np.zeros(1, np.int64), ValueError),
        ("second_starts", np.empty(1, np.int64), ValueError),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    datasets: tuple[Stream, ...], name: str, array: np.ndarray, error: type[Exception]
) -> None:
    assert fill(datasets) == (False, False)
    with pytest.raises(error):
        fill(datasets, **{name: array})


@pytest.mark.parametrize("masking", [MASKING, WHOLE_WORDS], ids=["tokens", "words"])
def test_threads_fill_the_same(datasets: tuple[Stream, ...], masking: Masking) -> None:
    """Datasets are shared between threads and the interpreter's lock is released."""
    order = build_order([d.blocks for d in datasets], alpha=0.7, seed=2)
    alone = [build_batch(datasets, order.samples(32 * i, 32), masking) for i in range(16)]
    results: dict[int, MaskedBatch] = {}

    def work(first: int) -> None:
        for i in range(first, 16, 4):
            results[i] = build_batch(datasets, order.samples(32 * i, 32), masking)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i].input_ids, alone[i].input_ids) for i in range(16))
    assert len(results) == 16
