"""Statistics of order and masks, under fixed seeds: nothing here is left to chance, and a change of a rule may fail it.

Every figure is compared with what independent uniform draws give, in standard deviations: |z| < 4.5, which such draws
would miss once in 150,000 looks; 5.5 where the largest of many is looked at. Chi-square enters as
z = (chi-square - dof) / sqrt(2 dof).

That they see something was tried. With mix64 cut down to one multiplication and one shift, 14 of the 15 tests fail;
with 4 rounds in the permutation, 3; with masks keyed by language + pass + block, all those of masks and none of order.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from pairs import write_mmap
from xlm_ds.batches import Masking, build_batch
from xlm_ds.dataset import open_split
from xlm_ds.order import Samples, build_order
from xlm_ds.streams import Stream, alone

Numbers: TypeAlias = NDArray[Any]
LIMIT, LIMIT_OF_MANY = 4.5, 5.5


def z_of_counts(counts: Numbers, dof: int, *, scale: float = 1.0) -> float:
    """All cells equally likely. `scale` is what exact totals take off the variance of a cell."""
    expected = counts.sum() / counts.size
    chi_square = float(((counts - expected) ** 2).sum() / expected) / scale
    return (chi_square - dof) / math.sqrt(2 * dof)


def z_of_mean(values: Numbers, expected: float) -> float:
    """Independent values, whose spread is their own."""
    return float((values.mean() - expected) / (values.std() / values.size**0.5))


# ------------------------------------------------------------------------------------------- order


def walks(size: int, passes: int, *, seed: int = 0) -> Numbers:
    """The blocks of one language in the order they come, (passes, size)."""
    return (
        build_order([size], alpha=1, seed=seed).samples(0, size * passes).blocks.reshape(-1, size)
    )


def ranks(blocks: Numbers) -> Numbers:
    """Centred and scaled to variance 1 in every pass."""
    size = blocks.shape[1]
    return np.asarray((blocks - (size - 1) / 2) / ((size**2 - 1) / 12) ** 0.5)


def z_of_correlation(a: Numbers, b: Numbers) -> float:
    """Of permutations (passes, size): rank correlation, whose variance over permutations is 1 / (size - 1)."""
    passes, size = a.shape
    mean = float((ranks(a) * ranks(b)).mean())
    return mean * math.sqrt((size - 1) * passes)


def z_of_matches(a: Numbers, b: Numbers) -> float:
    """Of permutations (passes, size): places where they agree, one on average, with variance 1."""
    return float(((a == b).sum() - len(a)) / len(a) ** 0.5)


# Sizes on both sides of a power of two, and of the border between 24 and 8 rounds (256).
SIZES = [(7, 40_000), (64, 8000), (65, 8000), (256, 2000), (257, 2000), (1000, 600)]


@pytest.mark.parametrize(("size", "passes"), SIZES)
def test_every_block_comes_at_every_place_equally_often(size: int, passes: int) -> None:
    blocks = walks(size, passes)
    cells = np.bincount((np.arange(size) * size + blocks).ravel(), minlength=size * size)
    # Every block and every place has its exact total: a cell varies by (size - 1) / size less for it.
    assert abs(z_of_counts(cells, (size - 1) ** 2, scale=size / (size - 1))) < LIMIT


@pytest.mark.parametrize(("size", "passes"), SIZES)
def test_passes_do_not_know_of_each_other(size: int, passes: int) -> None:
    blocks = walks(size, passes)
    for apart in (1, 2, 3, 4):
        assert abs(z_of_correlation(blocks[apart:], blocks[:-apart])) < LIMIT
        assert abs(z_of_matches(blocks[apart:], blocks[:-apart])) < LIMIT


@pytest.mark.parametrize(("size", "passes"), SIZES)
def test_languages_do_not_know_of_each_other(size: int, passes: int) -> None:
    languages, _, blocks = build_order([size] * 3, alpha=1, seed=0).samples(0, 3 * size * passes)
    whole = (passes - 16) * size
    a, b, c = (blocks[languages == lg][:whole].reshape(-1, size) for lg in range(3))
    for first, second in ((a, b), (b, c), (a, c)):
        assert abs(z_of_correlation(first, second)) < LIMIT
        assert abs(z_of_matches(first, second)) < LIMIT


@pytest.mark.parametrize(("size", "passes"), SIZES[1:])
def test_neighbours_in_a_pass_do_not_know_of_each_other(size: int, passes: int) -> None:
    """Serial correlation at lags 1 to 16: in a random permutation -1 / (size - 1), as its sum is fixed."""
    blocks = ranks(walks(size, passes))
    for lag in range(1, 17):
        products = (blocks[:, lag:] * blocks[:, :-lag]).mean(axis=1)
        assert abs(z_of_mean(products, -1 / (size - 1))) < LIMIT


@pytest.mark.parametrize(("size", "passes"), SIZES)
def test_distances_between_neighbours_are_uniform(size: int, passes: int) -> None:
    blocks = walks(size, passes)[:, :2]  # one distance a pass: they are independent
    many = np.concatenate([blocks, *(walks(size, passes, seed=s)[:, :2] for s in range(1, 4))])
    distances = np.diff(many, axis=1).ravel() % size
    counts = np.bincount(distances, minlength=size)
    assert counts[0] == 0
    assert abs(z_of_counts(counts[1:], size - 2)) < LIMIT


@pytest.mark.parametrize(("size", "passes"), SIZES)
def test_seeds_0_and_1_give_independent_orders(size: int, passes: int) -> None:
    a, b = (walks(size, passes, seed=seed) for seed in (0, 1))
    assert abs(z_of_correlation(a, b)) < LIMIT
    assert abs(z_of_matches(a, b)) < LIMIT


def test_languages_are_shuffled_evenly_in_every_window() -> None:
    """Four languages, four times each in a window of 16."""
    first, second = (
        build_order([10] * 4, alpha=1, seed=seed).samples(0, 16 * 50_000).streams.reshape(-1, 16)
        for seed in (0, 1)
    )
    cells = np.bincount((np.arange(16) * 4 + first).ravel(), minlength=64)
    assert abs(z_of_counts(cells, 15 * 3, scale=16 / 15)) < LIMIT
    for lag in (1, 2, 3):
        matches = (first[lag:] == first[:-lag]).sum(axis=1)
        assert abs(z_of_mean(matches, 4)) < LIMIT
    for lag in range(1, 16):  # the other 15 places hold 3 of the same language
        matches = (first[:, lag:] == first[:, :-lag]).mean(axis=1)
        assert abs(z_of_mean(matches, 3 / 15)) < LIMIT
    assert abs(z_of_mean((first == second).sum(axis=1), 4)) < LIMIT


# ------------------------------------------------------------------------------------------- masks

V, N, K = 1000, 255, 39
BLOCKS, PASSES = 64, 400
MASK, ORIGINAL = 4, 3


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stream, ...]:
    """Two languages of nothing but <unk>, which no random word is: what was left as it was shows."""
    folder = tmp_path_factory.mktemp("unk")
    for language in "ab":
        write_mmap(folder / f"train.{language}", [[ORIGINAL] * (BLOCKS * N)])
    return alone(
        open_split(
            folder,
            "train",
            ["a", "b"],
            tokens_per_sample=N + 1,
            break_mode="none",
            vocab_size=V,
            dictionary_sha256="",
        )
    )


Draw: TypeAlias = Callable[..., tuple[Numbers, Numbers]]


@pytest.fixture(scope="module")
def draw(datasets: tuple[Stream, ...]) -> Draw:
    """Of every block in every pass: positions (passes, blocks, K) from 0, and what is shown there."""
    known: dict[tuple[int, int], tuple[Numbers, Numbers]] = {}

    def masks(language: int = 0, seed: int = 0) -> tuple[Numbers, Numbers]:
        if (language, seed) not in known:
            rows = np.arange(PASSES * BLOCKS)
            samples = Samples(np.full_like(rows, language), rows // BLOCKS, rows % BLOCKS)
            masking = Masking(seed=seed, mask_ratio=0.15, vocab_size=V)
            batch = build_batch(datasets, samples, masking)
            shown = batch.input_ids.flatten()[batch.masked_positions]
            places = batch.masked_positions % (N + 1) - 1
            shape = (PASSES, BLOCKS, K)
            known[language, seed] = (places.numpy().reshape(shape), shown.numpy().reshape(shape))
        return known[language, seed]

    return masks


def bitmaps(places: Numbers) -> Numbers:
    """(passes, blocks, N): 1 where a token is masked."""
    bits = np.zeros((PASSES, BLOCKS, N), np.float32)
    np.put_along_axis(bits, places, 1, axis=2)
    return bits


def z_of_overlap(a: Numbers, b: Numbers) -> float:
    """Positions that both mask: of independent draws K * K / N on average."""
    return z_of_mean((a * b).sum(axis=-1), K * K / N)


def test_every_position_is_masked_equally_often(draw: Draw) -> None:
    counts = np.bincount(draw()[0].ravel(), minlength=N)
    # K of N places, without replacement: a cell varies by (N - K) / (N - 1) as much as with it.
    assert abs(z_of_counts(counts, N - 1, scale=(N - K) / (N - 1))) < LIMIT


def test_every_pair_of_positions_is_masked_equally_often(draw: Draw) -> None:
    rows = bitmaps(draw()[0]).reshape(-1, N)
    together = (rows.T @ rows)[np.triu_indices(N, 1)]
    share = K * (K - 1) / (N * (N - 1))
    z = (together - len(rows) * share) / (len(rows) * share * (1 - share)) ** 0.5
    assert np.abs(z).max() < LIMIT_OF_MANY  # of 32,385
    # The fixed number of positions in a row makes the pairs of one position vary together, by less than 1 % in all.
    assert abs((z**2).mean() - 1) < 0.01 + LIMIT * (2 / len(z)) ** 0.5


def test_masks_of_neighbouring_blocks_and_passes_do_not_know_of_each_other(draw: Draw) -> None:
    bits = bitmaps(draw()[0])
    for lag in range(1, 17):
        assert abs(z_of_overlap(bits[:, lag:], bits[:, :-lag])) < LIMIT
        assert abs(z_of_overlap(bits[lag:], bits[:-lag])) < LIMIT
    assert (
        abs(z_of_overlap(bits[1:, :-1], bits[:-1, 1:])) < LIMIT
    )  # the next pass, the block before


def test_masked_positions_do_not_draw_their_neighbours_along(draw: Draw) -> None:
    """Spans would be another objective. Within a row, lags 1 to 16."""
    bits = bitmaps(draw()[0])
    for lag in range(1, 17):
        pairs = (bits[..., lag:] * bits[..., :-lag]).sum(axis=-1)
        assert abs(z_of_mean(pairs, (N - lag) * K * (K - 1) / (N * (N - 1)))) < LIMIT


def test_masks_of_languages_and_of_seeds_do_not_know_of_each_other(draw: Draw) -> None:
    places, shown = draw()
    for other in ({"language": 1}, {"seed": 1}):
        other_places, other_shown = draw(**other)
        assert abs(z_of_overlap(bitmaps(places), bitmaps(other_places))) < LIMIT
        # What is shown: 0.8² + 0.1² + 0.1² / words of the same kind and, if a word, the same one.
        same = (shown == other_shown).reshape(-1, K).mean(axis=1)
        assert abs(z_of_mean(same, 0.64 + 0.01 + 0.01 / (V - 5))) < LIMIT


def test_eighty_ten_ten(draw: Draw) -> None:
    shown = draw()[1]
    for found, share in (
        ((shown == MASK).sum(), 0.8),
        ((shown == ORIGINAL).sum(), 0.1),
        ((shown > MASK).sum(), 0.1),
    ):
        assert abs(found - shown.size * share) < LIMIT * (shown.size * share * (1 - share)) ** 0.5


def test_what_a_position_shows_does_not_depend_on_where_or_after_what(draw: Draw) -> None:
    places, shown = draw()
    kind = np.where(shown == MASK, 0, np.where(shown == ORIGINAL, 1, 2))
    shares = np.array([0.8, 0.1, 0.1])
    where = np.bincount((places * 3 + kind).ravel(), minlength=3 * N).reshape(N, 3)
    expected = where.sum(axis=1, keepdims=True) * shares
    z = (((where - expected) ** 2 / expected).sum() - 2 * N) / (4 * N) ** 0.5
    assert abs(z) < LIMIT
    for lag in range(1, 17):
        same = (kind[..., lag:] == kind[..., :-lag]).mean(axis=-1)
        assert abs(z_of_mean(same, float((shares**2).sum()))) < LIMIT


def test_random_words_are_uniform_over_the_vocabulary(draw: Draw) -> None:
    places, shown = draw()
    words = shown[shown > MASK] - 5
    assert abs(z_of_counts(np.bincount(words, minlength=V - 5), V - 6)) < LIMIT
    tenths = words * 10 // (V - 5)
    exact = np.bincount(np.arange(V - 5) * 10 // (V - 5)) / (V - 5)
    for lag in (1, 2, 3):
        found = np.bincount(tenths[lag:] * 10 + tenths[:-lag], minlength=100)
        expected = (len(words) - lag) * np.outer(exact, exact).ravel()
        assert abs((((found - expected) ** 2 / expected).sum() - 99) / 198**0.5) < LIMIT
    correlation = np.corrcoef(words, places[shown > MASK])[0, 1]
    assert abs(correlation) * len(words) ** 0.5 < LIMIT
