"""Order: a bijection, exact quotas, every block once per pass, the same however it is read."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from xlm_ds import _core
from xlm_ds.order import Order, Segment, build_order, evaluation_samples, sampling_weights
from xlm_ds.steps import Steps

SEEDS = st.integers(0, 2**64 - 1)
SKEWED_100 = [round(10 ** (6 * i / 99)) for i in range(100)]  # 1:10^6 blocks, 1:16,000 at alpha 0.7


@given(SEEDS, st.integers(1, 2**63), st.data())
def test_permutation_equals_its_twin(key: int, size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    assert _core.Permutation(key=key, size=size)(index) == reference.permuted(key, size, index)


def test_permutation_is_a_bijection() -> None:
    for size in (*range(1, 301), 1024, 1025, 20_011):
        permutation = _core.Permutation(key=size, size=size)
        assert sorted(map(permutation, range(size))) == list(range(size))


@given(SEEDS, st.integers(1, 10**12), st.data())
def test_permutation_can_be_walked_back(key: int, size: int, data: st.DataObject) -> None:
    """Each place is reached from the one index that the twin's inverse names: no other index can go there.

    That every place is reached follows, as there are as many places as indices; the C++ program counts them for every
    size to 5,000.
    """
    permutation = _core.Permutation(key=key, size=size)
    for index in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)):
        place = permutation(index)
        assert 0 <= place < size
        assert reference.unpermuted(key, size, place) == index


@settings(max_examples=30)
@given(SEEDS, st.integers(10**6, 10**12), st.data())
def test_large_permutation_never_meets_a_place_twice(
    key: int, size: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, size - 1000))
    permutation = _core.Permutation(key=key, size=size)
    places = {permutation(i) for i in range(first, first + 1000)}
    assert len(places) == 1000
    assert max(places) < size


@pytest.mark.parametrize(("size", "points"), [(3, 3), (5, 5), (7, 2), (100, 1), (300, 1)])
def test_permutations_are_uniform_over_keys(size: int, points: int) -> None:
    """Chi-square over where the first points go: six standard deviations above its mean would be a pattern."""
    keys = 60_000
    permutations = (
        _core.Permutation(key=reference.random_at(7, k), size=size) for k in range(keys)
    )
    seen = Counter(tuple(p(i) for i in range(points)) for p in permutations)
    cells = math.perm(size, points)
    chi_square = sum((seen[cell] - keys / cells) ** 2 for cell in seen) / (keys / cells)
    chi_square += (cells - len(seen)) * keys / cells
    assert abs(chi_square - (cells - 1)) < 6 * math.sqrt(2 * (cells - 1))


def test_distances_between_two_places_are_uniform_over_keys() -> None:
    """Of the tests tried, the one that sees too few rounds first: size 512, half of it apart."""
    size, keys = 512, 100_000
    permutations = (
        _core.Permutation(key=reference.random_at(9, k), size=size) for k in range(keys)
    )
    seen = Counter((p(size // 2) - p(0)) % size for p in permutations)
    expected = keys / (size - 1)
    chi_square = sum((seen[d] - expected) ** 2 for d in range(1, size)) / expected
    assert abs(chi_square - (size - 2)) < 6 * math.sqrt(2 * (size - 2))
    assert seen[0] == 0


def test_neighbours_do_not_stay_together() -> None:
    """An order that keeps a constant stride (affine permutations do) shows consecutive text together."""
    size = 10_000
    permutation = _core.Permutation(key=1, size=size)
    places = [permutation(i) for i in range(size)]
    strides = Counter((b - a) % size for a, b in itertools.pairwise(places))
    assert strides.most_common(1)[0][1] < 10  # independent strides: 1 on average


@given(
    SEEDS,
    st.lists(st.tuples(st.integers(1, 2**32), st.integers(1, 10**9)), min_size=1, max_size=12),
    st.integers(0, 2**62 - 40),
)
def test_samples_equal_their_twin(seed: int, languages: list[tuple[int, int]], first: int) -> None:
    weights, blocks = (tuple(column) for column in zip(*languages, strict=True))
    samples = Order(seed=seed, blocks=blocks, segments=(Segment(0, weights),)).samples(first, 20)
    twins = [reference.sample_at(seed, weights, blocks, first + i) for i in range(20)]
    assert list(zip(*(column.tolist() for column in samples), strict=True)) == twins


@st.composite
def segment_lists(draw: st.DrawFn, languages: int) -> list[Segment]:
    lengths = draw(st.lists(st.integers(1, 70), max_size=4))
    weights = st.tuples(*[st.integers(1, 2**32)] * languages)
    return [Segment(first, draw(weights)) for first in itertools.accumulate(lengths, initial=0)]


@given(SEEDS, st.lists(st.integers(1, 30), min_size=1, max_size=9), st.data())
def test_samples_across_segments_equal_their_twin(
    seed: int, blocks: list[int], data: st.DataObject
) -> None:
    segments = tuple(data.draw(segment_lists(len(blocks))))
    order = Order(seed=seed, blocks=tuple(blocks), segments=segments)
    first = data.draw(st.integers(0, 250))
    samples = order.samples(first, 300 - first)
    twins = reference.samples_by_counting(seed, segments, blocks, 300)[first:]
    assert list(zip(*(column.tolist() for column in samples), strict=True)) == twins


def test_segments_of_equal_alpha_are_still_one_run() -> None:
    """Twins must not agree on something trivial: a new segment begins new windows, and nothing before it changes."""
    whole = build_order([40, 30, 20], alpha=0.7, seed=1).samples(0, 3000)
    steps = Steps.parse("0.7@0,0.3@1001samples,0.7@2000samples")
    order = build_order([40, 30, 20], alpha=steps, seed=1)
    parts = order.samples(0, 3000)
    for column, before in zip(parts, whole, strict=True):
        assert (column[:1001] == before[:1001]).all()
        assert (column[1001:] != before[1001:]).any()
    assert [s.first_sample for s in order.segments] == [0, 1001, 2000]
    assert order.segments[0].weights == order.segments[2].weights != order.segments[1].weights
    assert (order.probabilities(1000) == order.probabilities(0)).all()
    assert (order.probabilities(1001) != order.probabilities(0)).any()


@pytest.mark.parametrize("border", [16_000, 16_001, 10**9 + 7, 10**15])
def test_passes_go_on_across_a_border(border: int) -> None:
    """With one block per language the pass is the draw's number: none is left out, none comes twice."""
    segments = (Segment(0, (9, 1, 5, 2000)), Segment(border, (3, 3, 2**10, 1)))
    order = Order(seed=3, blocks=(1,) * 4, segments=segments)
    languages, draws, _ = order.samples(border - 9000, 18_000)
    assert len(set(languages[:9000].tolist())) > 1
    for language in range(4):
        assert (np.diff(draws[languages == language]) == 1).all()


@pytest.mark.parametrize("border", [1000, 1015, 10**12 + 3])
def test_quotas_hold_from_a_border_on(border: int) -> None:
    order = build_order(SKEWED_100, alpha=Steps((1.0, 0.2), (0, border), True), seed=3)
    languages = order.samples(border, 20_000).streams
    counts = np.cumsum(languages[:, None] == np.arange(100), axis=0)
    quotas = np.arange(1, 20_001)[:, None] * order.probabilities(border)
    worst = np.abs(counts - quotas).max(axis=0)
    assert (worst <= quota_bound(order, border)).all()
    assert worst.max() > 0.4, "nothing was measured"


def quota_bound(order: Order, sample: int = 0) -> np.ndarray:
    """The schedule's promise (order.hpp): half a sample per level of the tree, and a window's own spread."""
    share = order.probabilities(sample)
    bound: np.ndarray = math.ceil(math.log2(len(share))) / 2 + 16 * share * (1 - share) + 1e-6
    return bound


@pytest.mark.parametrize(
    "blocks", [[7], [1, 1], [10, 1000], [50, 40, 30, 20, 10], [9] * 64, SKEWED_100], ids=len
)
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_every_language_keeps_its_quota_at_every_prefix(blocks: list[int], alpha: float) -> None:
    order = build_order(blocks, alpha=alpha, seed=3)
    languages = order.samples(0, 50_000).streams
    counts = np.cumsum(languages[:, None] == np.arange(len(blocks)), axis=0)
    quotas = np.arange(1, len(languages) + 1)[:, None] * order.probabilities(0)
    worst = np.abs(counts - quotas).max(axis=0)
    assert (worst <= quota_bound(order)).all()
    assert len(blocks) == 1 or worst.max() > 0.4, "nothing was measured"


@pytest.mark.parametrize("first", [10**9, 10**12, 2**62 - 1000])
def test_quota_holds_far_out(first: int) -> None:
    """With one block per language the pass is the draw's number: what has been drawn before."""
    weights = sampling_weights(SKEWED_100, 0.7)
    order = Order(seed=3, blocks=(1,) * 100, segments=(Segment(0, weights),))
    total, bound = sum(weights), quota_bound(order) + 1
    languages, draws, _ = order.samples(first, 1000)
    for i, (language, draw) in enumerate(zip(languages.tolist(), draws.tolist(), strict=True)):
        distance = draw * total - (first + i) * weights[language]  # whole numbers: 2^62 is no float
        assert abs(distance) <= math.ceil(bound[language] * total)


def test_languages_are_mixed_without_a_fixed_pattern() -> None:
    order = build_order([100] * 5, alpha=0.7, seed=1)
    languages = order.samples(0, 16_000).streams
    batches = languages.reshape(-1, 8)
    assert min(len(set(batch)) for batch in batches.tolist()) >= 2
    windows = {tuple(window) for window in languages.reshape(-1, 16).tolist()}
    assert len(windows) > 990  # of 1,000
    pairs = Counter(itertools.pairwise(languages.tolist()))
    assert min(pairs[a, b] for a in range(5) for b in range(5)) > 300  # 640 if independent


def test_every_block_comes_once_per_pass_in_a_new_order() -> None:
    blocks = [3, 40, 17]
    languages, passes, numbers = build_order(blocks, alpha=0.5, seed=8).samples(0, 3000)
    for language, count in enumerate(blocks):
        mine = languages == language
        whole = mine.sum() // count
        assert whole > 10
        walks = numbers[mine][: whole * count].reshape(whole, count)
        assert (np.sort(walks, axis=1) == np.arange(count)).all()
        assert (np.arange(whole) == passes[mine][: whole * count].reshape(whole, count).T).all()
        if count > 10:
            assert len({tuple(walk) for walk in walks.tolist()}) == whole


@given(SEEDS, st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_order_does_not_depend_on_how_it_is_read(seed: int, pieces: list[int]) -> None:
    steps = Steps.parse("0.7@0,0.5@33samples,0@34samples,1@100samples")
    order = build_order([100, 30, 7], alpha=steps, seed=seed)
    whole = order.samples(5, sum(pieces))
    starts = np.cumsum([0, *pieces])
    parts = [order.samples(5 + int(s), p) for s, p in zip(starts, pieces, strict=False)]
    for column, columns in zip(whole, zip(*parts, strict=True), strict=True):
        assert (column == np.concatenate(columns)).all()


def test_seeds_give_different_orders() -> None:
    first, second = (build_order([100, 30], alpha=0.7, seed=s).samples(0, 64) for s in (0, 1))
    assert (first.streams != second.streams).any()
    assert (first.blocks != second.blocks).any()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_shares_are_those_of_alpha(alpha: float) -> None:
    order = build_order(SKEWED_100, alpha=alpha, seed=0)
    wanted = np.array(SKEWED_100, float) ** alpha
    assert order.probabilities(0) == pytest.approx(wanted / wanted.sum(), rel=2e-4)
    skew_10_4 = build_order([1, *[10_000] * 99], alpha=0.7, seed=0)
    weights = skew_10_4.segments[0].weights
    assert weights[0] / weights[1] == pytest.approx(10_000**-0.7, rel=1e-6)
    assert order.epoch_samples == sum(SKEWED_100)


def test_what_cannot_be_ordered_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one stream"):
        Order(seed=0, blocks=(), segments=(Segment(0, ()),))
    with pytest.raises(ValueError, match="blocks must be from 1"):
        Order(seed=0, blocks=(0,), segments=(Segment(0, (1,)),))
    with pytest.raises(ValueError, match="end at 2"):
        build_order([5], alpha=1, seed=0).samples(2**62, 1)


def test_evaluation_takes_blocks_in_sequence() -> None:
    streams, draws, blocks = evaluation_samples(range(5, 8), draw=1)
    assert (streams == 0).all()
    assert (draws == 1).all()
    assert blocks.tolist() == [5, 6, 7]
