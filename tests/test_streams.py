"""Streams: which languages and pairs a run reads, rows of two halves and their masks, and training on them (TLM)."""

import dataclasses
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import reference
from pairs import write_lazy, write_mmap
from test_batches import dictionary_of, originals, row_sets, samples_of
from test_train import last_weights, losses_in, records_in, train_here
from xlm_ds import checkpoint, evaluate, plan, prove
from xlm_ds.architectures import ModelShape, shape_from_config
from xlm_ds.batches import (
    Masking,
    build_batch,
    count_targets,
    evaluation_batches,
    join_batches,
)
from xlm_ds.checkpoint import Progress
from xlm_ds.config import DataConfig, EvaluateConfig, ModelConfig, PlanConfig, TrainConfig
from xlm_ds.corpus import Corpus, micro_batch, open_corpus, update_targets
from xlm_ds.digests import sample_digests
from xlm_ds.engine import Ranks
from xlm_ds.flags import parse
from xlm_ds.geometry import Geometry
from xlm_ds.log import EXIT_DIFFERENT, EXIT_OK, InputError
from xlm_ds.model import build_model, position_rows
from xlm_ds.order import build_order, mixed_weights, sampling_weights
from xlm_ds.run import with_comparable_best
from xlm_ds.schedule import PlateauState
from xlm_ds.streams import Choice, Stream, alone, choose, open_streams

V = 200
EOS, PAD = 2, 1
STEPS = ("ar", "en", "ar-en", "hi-en")

# ---------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(
    ("langs", "steps", "languages", "streams"),
    [
        ((), "de,en,en-de", "de,en", "de,en,en-de"),
        ((), "en-de,fr", "en,de,fr", "fr,en-de"),
        (("fr", "en"), "en,fr,en-fr", "fr,en", "fr,en,en-fr"),
        (("zh-Hans", "en"), "zh-Hans,zh-Hans-en", "zh-Hans,en", "zh-Hans,zh-Hans-en"),
        (("en", "fr", "de"), "en-fr", "en,fr,de", "en-fr"),
        (("en", "fr"), "", "en,fr", "en,fr"),
    ],
)
def test_steps_choose_languages_then_pairs_and_ids(
    langs: tuple[str, ...], steps: str, languages: str, streams: str
) -> None:
    choice = choose(langs, tuple(steps.split(",")) if steps else (), None)
    assert ",".join(choice.languages) == languages
    assert ",".join("-".join(names) for names in choice.streams) == streams


@pytest.mark.parametrize(
    ("langs", "steps", "message"),
    [
        ((), ["en-en"], "en-en: a pair is of two languages"),
        ((), ["en", "en"], "en is named twice"),
        ((), ["en-fr", "en-fr"], "en-fr is named twice"),
        ((), ["en-fr", "fr-en"], "en-fr and fr-en are the same lines"),
        (("en", "fr"), ["en-de"], "en-de: is none of the languages en,fr and no pair"),
        (("en", "fr"), ["de"], "de: is none of the languages en,fr"),
        ((), ["zh-Hans-en"], "more than one pair; name the languages with --monolingual-langs"),
        ((), ["en-.."], "'..' is no name of a language"),
    ],
)
def test_steps_that_make_no_sense_are_refused(
    langs: tuple[str, ...], steps: list[str], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        choose(langs, steps, None)
    assert message in str(caught.value)


def opened(
    folder: Path,
    *steps: str,
    length: int = 32,
    split: str = "train",
    languages: tuple[str, ...] = (),
) -> tuple[Stream, ...]:
    return open_streams(
        folder,
        split,
        choose(languages, steps, folder),
        tokens_per_sample=length,
        break_mode="none",
        vocab_size=V,
        dictionary_sha256="",
    )


Lines = list[list[int]]


def write_pair(folder: Path, first: Lines, second: Lines, write: Any = write_mmap) -> None:
    folder.mkdir(exist_ok=True)
    write(folder / "train.a-b.a", first)
    write(folder / "train.a-b.b", second)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path, [[5, 2]] * 3, [[6, 2]] * 2)
    with pytest.raises(InputError, match=r"train.a-b.a.idx has 3 lines and train.a-b.b.idx 2, "):
        opened(tmp_path, "a-b")
    (tmp_path / "train.a-b.b.bin").unlink()
    with pytest.raises(
        InputError, match=r"train.a-b.b.idx: the .bin that belongs to it is missing"
    ):
        opened(tmp_path, "a-b")
    (tmp_path / "train.a-b.b.idx").unlink()
    with pytest.raises(
        InputError, match=r"train.a-b.b.idx: there is no such file; .* there for a$"
    ):
        opened(tmp_path, "a-b")
    (tmp_path / "train.a-None.a.idx").touch()  # fairseq's name for one language
    with pytest.raises(
        InputError,
        match=r"no train text of the pair a-c \(train.a-c.a.idx\), of pairs there is a-b; binarize it "
        r"\(--source-lang a --target-lang c\), give another --mlm-steps, or name it in "
        "--monolingual-langs if it is one language$",
    ):
        opened(tmp_path, "a-c")
    with pytest.raises(
        InputError, match=r"no test text of the pair .*, nor of any other pair; bin"
    ):
        opened(tmp_path, "a-b", split="test")


def test_a_folder_of_pairs_alone_is_said_to_be_one(tmp_path: Path) -> None:
    """Without --mlm-steps a run reads languages, and there is none."""
    write_pair(tmp_path, [[5, 2]], [[6, 2]])
    with pytest.raises(InputError, match=r"no train.LANG.idx, only pairs; give --mlm-steps a-b$"):
        choose((), (), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no train.LANG.idx, and is not what binarize wrote$"):
        choose((), (), tmp_path / "empty")


def test_rows_too_short_for_two_lines_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, [[5, 2]], [[6, 2]])
    assert opened(tmp_path, "a-b", length=6)[0].blocks == 1
    with pytest.raises(InputError, match="--tokens-per-sample 5: a row with two lines needs at"):
        opened(tmp_path, "a-b", length=5)


def test_a_stored_pair_is_read_in_either_direction(tmp_path: Path) -> None:
    write_pair(tmp_path, [[5, 2]], [[6, 7, 2]])
    for step, ids in (
        ("a-b", [EOS, 5, EOS, EOS, 6, 7, EOS]),
        ("b-a", [EOS, 6, 7, EOS, EOS, 5, EOS]),
    ):
        (stream,) = opened(tmp_path, step, length=8)
        assert (stream.name, stream.languages) == (step, (0, 1))
        batch = build_batch(
            [stream], samples_of((0, 0, 0)), Masking(seed=0, mask_ratio=0, vocab_size=V)
        )
        assert batch.input_ids.tolist() == [[*ids, PAD]]


# -------------------------------------------------------------------------------------------- rows


def bits_of(going_on: Collection[int] | None) -> NDArray[np.uint64] | None:
    return None if going_on is None else dictionary_of(going_on).word_goes_on


SIDES = st.lists(
    st.tuples(*[st.lists(st.integers(5, V - 1), max_size=30).map(lambda line: [*line, EOS])] * 2),
    min_size=1,
    max_size=6,
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    SIDES,
    st.sampled_from([write_mmap, write_lazy]),
    st.integers(6, 40),
    st.floats(0, 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**40),
    st.none() | st.sets(st.integers(5, V - 1)) | st.sampled_from([range(5, V), range(50, V)]),
)
def test_rows_equal_their_twin(
    tmp_path: Path,
    sides: list[tuple[list[int], list[int]]],
    write: Any,
    length: int,
    ratio: float,
    seed: int,
    pass_: int,
    going_on: Collection[int] | None,
) -> None:
    """`going_on`: ids of the symbols that end with @@, or nothing where words are not masked whole."""
    first, second = (list(side) for side in zip(*sides, strict=True))
    write_pair(tmp_path, first, second, write)
    stream = Stream(languages=(3, 1), sides=opened(tmp_path, "a-b", length=length)[0].sides)
    samples = samples_of(*((0, pass_, k) for k in range(len(sides))))
    masking = Masking(seed=seed, mask_ratio=ratio, vocab_size=V, word_goes_on=bits_of(going_on))
    batch = build_batch([stream], samples, masking)
    assert batch.second_starts is not None
    assert batch.second_languages is not None
    targets = 0
    for k, row in enumerate(row_sets(batch)):
        tokens, start = reference.pair_row(first[k], second[k], length - 1)
        sample = (reference.stream_key(3, 1), pass_, k)
        ids, positions, there = reference.batch_row(
            seed,
            sample,
            tokens,
            size=length - 1,
            ratio=ratio,
            vocab_size=V,
            going_on=going_on or (),
        )
        masks = {p: t for p, t in zip(positions, there, strict=True) if t != PAD}
        assert row == (ids, masks)
        assert int(batch.second_starts[k]) == start
        targets += len(masks)
    assert batch.languages.tolist() == [3] * len(sides)
    assert batch.second_languages.tolist() == [1] * len(sides)
    assert count_targets([stream], samples, ratio) == targets
    cut = sum(len(a) + len(b) + 2 > length for a, b in sides)
    assert stream.core.count_cut() == cut


@pytest.mark.parametrize("going_on", [range(5, V), range(5, V, 2)], ids=["all", "half"])
@pytest.mark.parametrize("length", [20, 60], ids=["cut", "whole"])
def test_whole_words_end_with_their_half(folder: Path, going_on: range, length: int) -> None:
    """Also where the last symbol of a line says that its word goes on, as where it is cut: no eos is part of it."""
    (pair,) = opened(folder, "a-b", length=length)
    masking = dataclasses.replace(MASKING, word_goes_on=bits_of(going_on))
    batch = next(evaluation_batches(pair, masking, draw=0, rows=70))
    assert batch.second_starts is not None
    apart = broken = longest = 0
    for (_, masked), ids, start in zip(
        row_sets(batch), originals(batch).tolist(), batch.second_starts.tolist(), strict=True
    ):
        end = len(ids) - ids[::-1].index(EOS)
        if ids[start - 2] in going_on:
            apart += start - 1 in masked and start - 2 not in masked
        halves = (1, ids[1:start]), (start, ids[start:end])
        words = [
            {begin + place for place in word}
            for begin, half in halves
            for word in reference.words_of(half, going_on)
        ]
        assert [{start - 1}, {start}, {end - 1}] == [w for w in words if ids[min(w)] == EOS]
        partly = [word for word in words if word & masked.keys() not in (set(), word)]
        assert len(partly) <= 1
        for word in partly:
            there = sorted(word & masked.keys())
            assert there == sorted(word)[: len(there)]
        broken += len(partly)
        longest = max(longest, *(len(word & masked.keys()) for word in words))
    assert apart > 2
    assert broken > 10
    assert longest > 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Languages a and b, and a pair of them with more lines than either has blocks."""
    path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)

    def lines(count: int) -> Lines:
        return [[*rng.integers(5, V, n).tolist(), EOS] for n in rng.integers(0, 25, count)]

    for language in "ab":
        write_mmap(path / f"train.{language}", lines(60))
    write_pair(path, lines(70), lines(70))
    return path


@pytest.fixture(scope="module")
def streams(folder: Path) -> tuple[Stream, ...]:
    return opened(folder, "a", "b", "a-b")


MASKING = Masking(seed=5, mask_ratio=0.3, vocab_size=V)


def test_a_rows_masks_depend_on_its_languages_and_not_on_the_other_streams(
    folder: Path, streams: tuple[Stream, ...]
) -> None:
    choice = Choice(("a", "b"), (("a", "b"),))
    (pair,) = open_streams(
        folder, "train", choice, tokens_per_sample=32, break_mode="none", vocab_size=V, dictionary_sha256=""
    )  # fmt: skip
    together = build_batch(streams, samples_of((2, 4, 9), (2, 0, 1)), MASKING)
    by_itself = build_batch([pair], samples_of((0, 4, 9), (0, 0, 1)), MASKING)
    assert row_sets(together) == row_sets(by_itself)
    other = Stream(languages=(1, 0), sides=pair.sides)
    assert row_sets(build_batch([other], samples_of((0, 4, 9), (0, 0, 1)), MASKING)) != row_sets(
        by_itself
    )


def test_monolingual_rows_are_what_they_were_without_pairs(streams: tuple[Stream, ...]) -> None:
    samples = samples_of((0, 0, 3), (1, 2, 9))
    without = build_batch(alone([s.sides[0] for s in streams[:2]]), samples, MASKING)
    beside = build_batch(streams, samples, MASKING)
    assert beside.second_starts is beside.second_languages is None
    assert all(torch.equal(a, b) for a, b in zip(without[:4], beside[:4], strict=True))


def test_mixed_batches_say_where_second_halves_are(streams: tuple[Stream, ...]) -> None:
    parts = [build_batch(streams, samples_of(row), MASKING) for row in ((0, 0, 3), (2, 0, 5))]
    mixed = build_batch(streams, samples_of((0, 0, 3), (2, 0, 5)), MASKING)
    assert mixed.second_starts is not None
    assert mixed.second_languages is not None
    assert mixed.second_languages.tolist() == [-1, 1]
    assert mixed.second_starts[0] == 32
    start = int(mixed.second_starts[1])
    row = originals(mixed)[1]
    assert row[start - 1] == row[start] == EOS
    joined = join_batches(parts)
    assert [a if a is None else a.tolist() for a in joined if not isinstance(a, bool)] == [
        a if a is None else a.tolist() for a in mixed if not isinstance(a, bool)
    ]


def test_evaluation_of_a_pair_sees_every_line_once(streams: tuple[Stream, ...]) -> None:
    batches = list(evaluation_batches(streams[2], MASKING, draw=1, rows=16))
    assert [len(b.languages) for b in batches] == [16, 16, 16, 16, 6]
    whole = next(evaluation_batches(streams[2], MASKING, draw=1, rows=70))
    assert [row for b in batches for row in row_sets(b)] == row_sets(whole)
    assert len({tuple(row.tolist()) for row in originals(whole)}) > 60


def test_counts_are_those_of_the_rows(folder: Path) -> None:
    """What may be masked: all of both lines, and the eos between them that begins the second half."""
    (pair,) = opened(folder, "a-b", length=64)
    assert pair.core.count_cut() == 0
    batch = next(evaluation_batches(pair, MASKING, draw=0, rows=70))
    assert batch.second_starts is not None
    rows = originals(batch)
    places = torch.arange(64)
    second = places >= batch.second_starts[:, None]
    expected = []
    for half in (~second & (places > 0), second & (rows != PAD)):
        expected.append(np.bincount(rows[half].numpy(), minlength=V).tolist())
    assert pair.counts().tolist() == expected


# ------------------------------------------------------------------------------------------- order

COUNTS = st.lists(st.integers(1, 10**6), min_size=1, max_size=8)


@given(COUNTS, COUNTS, st.floats(0, 1.5), st.floats(0.01, 0.99))
def test_pairs_have_their_share_and_alpha_divides_it(
    blocks: list[int], pairs: list[int], alpha: float, share: float
) -> None:
    order = build_order(blocks, alpha=alpha, seed=0, pair_blocks=pairs, tlm_share=share)
    probabilities = order.probabilities(0)
    assert probabilities[len(blocks) :].sum() == pytest.approx(share, rel=1e-5)
    for counts, found in (
        (blocks, probabilities[: len(blocks)]),
        (pairs, probabilities[len(blocks) :]),
    ):
        wanted = np.array(counts, float) ** alpha
        assert found / found.sum() == pytest.approx(wanted / wanted.sum(), rel=1e-3, abs=1e-7)
    assert order.epoch_samples == sum(blocks) + sum(pairs)


def test_one_kind_alone_has_all_samples() -> None:
    assert mixed_weights([5, 7], [], alpha=0.7, tlm_share=0.3) == sampling_weights([5, 7], 0.7)
    assert mixed_weights([], [5, 7], alpha=0.7, tlm_share=0.3) == sampling_weights([5, 7], 0.7)


def test_an_order_with_pairs_equals_its_twin() -> None:
    order = build_order([40, 9], alpha=0.7, seed=3, pair_blocks=[25], tlm_share=0.4)
    ((_, weights),) = order.segments
    samples = order.samples(11, 300)
    twins = [reference.sample_at(3, weights, [40, 9, 25], 11 + i) for i in range(300)]
    assert list(zip(*(column.tolist() for column in samples), strict=True)) == twins
    pairs = int((order.samples(0, 3000).streams == 2).sum())
    assert abs(pairs - 0.4 * 3000) <= 2 + 16 * 0.4 * 0.6  # csrc/include/xlm_ds/order.hpp


# ----------------------------------------------------------------------------------------- network


@pytest.fixture(scope="module", params=["xlm_base", "xlm"])
def shape(request: pytest.FixtureRequest) -> ModelShape:
    return shape_from_config(
        ModelConfig(
            arch=request.param,
            encoder_layers=1,
            encoder_embed_dim=16,
            encoder_ffn_embed_dim=32,
            encoder_attention_heads=2,
        ),
        vocab_size=V,
        languages=2,
        tokens_per_sample=32,
    )


def test_positions_begin_again_with_the_second_half() -> None:
    ids = torch.tensor([[2, 7, 2, 2, 8, 9, 2, 1], [2, 7, 8, 9, 9, 9, 9, 9]])
    starts = torch.tensor([3, 8])
    assert position_rows(ids, ids.ne(PAD), starts, first=2).tolist() == [
        [2, 3, 4, 2, 3, 4, 5, PAD],
        [2, 3, 4, 5, 6, 7, 8, 9],
    ]
    full = ids[1:].expand(2, -1)
    assert position_rows(full, None, starts, first=2).tolist() == [
        [2, 3, 4, 2, 3, 4, 5, 6],
        [2, 3, 4, 5, 6, 7, 8, 9],
    ]
    of_xlm = position_rows(ids, ids.ne(PAD), starts, first=0)
    assert of_xlm.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_each_half_has_its_language_and_positions(
    streams: tuple[Stream, ...], shape: ModelShape
) -> None:
    """The embedded second half is that of a row that is nothing else, in its language."""
    model = build_model(shape, seed=0).eval()
    seen: list[torch.Tensor] = []
    model.dropout.register_forward_hook(lambda _, __, out: seen.append(out))
    batch = build_batch(streams, samples_of((2, 0, 5), (0, 0, 1)), MASKING)
    assert batch.second_starts is not None
    assert batch.second_languages is not None
    model(batch)
    start = int(batch.second_starts[0])
    end = int(batch.input_ids[0].ne(PAD).sum())
    for piece, language in ((slice(0, start), 0), (slice(start, end), 1)):
        model.encode(batch.input_ids[:1, piece], torch.tensor([language]))
        assert torch.equal(seen.pop()[0], seen[0][0, piece])
    model.encode(batch.input_ids[1:], batch.languages[1:], has_padding=False)
    assert torch.equal(seen[1][0], seen[0][1])


def test_the_network_does_not_see_which_half_is_first(tmp_path: Path, shape: ModelShape) -> None:
    """Why en-fr and fr-en are not two steps of a run (docs/decisions/0013)."""
    write_pair(tmp_path, [[5, 9, EOS]], [[6, 7, 8, EOS]])
    both = [
        stream
        for step in ("a-b", "b-a")
        for stream in opened(tmp_path, step, length=10, languages=("a", "b"))
    ]
    plain = Masking(seed=0, mask_ratio=0, vocab_size=V)
    batch = build_batch(both, samples_of((0, 0, 0), (1, 0, 0)), plain)
    wanted = [(0, 9), (0, 7), (1, 9), (1, 7)]
    places = [10 * row + batch.input_ids[row].tolist().index(word) for row, word in wanted]
    hidden = batch.input_ids.clone()
    hidden.view(-1)[places] = 4
    batch = batch._replace(
        input_ids=hidden,
        masked_positions=torch.tensor(places),
        targets=torch.tensor([word for _, word in wanted]),
    )
    assert batch.languages.tolist() == [0, 1]
    losses = build_model(shape, seed=0).eval()(batch)
    torch.testing.assert_close(losses[:2], losses[2:])
    assert not torch.isclose(losses[0], losses[1])


@pytest.mark.usefixtures("ranks")  # one thread
def test_a_half_that_is_masked_is_read_off_the_other(tmp_path: Path, shape: ModelShape) -> None:
    """Of eight pairs no two have a word in common, so one who sees no first half is log 8 off at each masked word."""
    words = 6
    ids = torch.arange(5, 5 + 8 * 2 * words).view(2, 8, words)
    write_pair(tmp_path, *([[*line, EOS] for line in side.tolist()] for side in ids))
    (pair,) = opened(tmp_path, "a-b", length=2 * words + 4)
    plain = Masking(seed=0, mask_ratio=0, vocab_size=V)
    batch = build_batch([pair], samples_of(*((0, 0, k) for k in range(8))), plain)
    assert batch.second_starts is not None
    assert not batch.has_padding
    first_word = int(batch.second_starts[0]) + 1
    positions = 16 * torch.arange(8)[:, None] + torch.arange(first_word, first_word + words)
    hidden = batch.input_ids.clone()
    hidden.view(-1)[positions] = 4
    batch = batch._replace(
        input_ids=hidden, masked_positions=positions.flatten(), targets=ids[1].flatten()
    )
    model = build_model(shape, seed=0).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model(batch).mean().backward()
        optimizer.step()
    others = hidden.clone()
    others[:, :first_word] = hidden[:, :first_word].roll(1, dims=0)
    with torch.no_grad():
        assert float(model(batch).mean()) < np.log(8) / 3
        assert float(model(batch._replace(input_ids=others)).mean()) > np.log(8)


# ---------------------------------------------------------------------------------------- training


def config_of(data: Path, **more: Any) -> DataConfig:
    return DataConfig(data=data, mlm_steps=STEPS, tokens_per_sample=64, **more)


@pytest.fixture(scope="module")
def corpus(parallel_data: Path) -> Corpus:
    return open_corpus(config_of(parallel_data))


def test_a_language_may_have_nothing_but_a_pair(corpus: Corpus) -> None:
    assert corpus.languages == ("ar", "en", "hi")
    assert corpus.names == STEPS
    assert [stream.languages for stream in corpus.train] == [(0,), (1,), (0, 1), (2, 1)]


def test_digests_are_their_twins_and_those_of_any_division(corpus: Corpus) -> None:
    def digests(rows: int, micros: int, world: int) -> list[int]:
        geometry = Geometry(rows, micros, world)
        found: dict[int, int] = {}
        for micro in range(micros):
            for rank in range(world):
                first = geometry.first_sample(24, micro, rank)
                batch = micro_batch(corpus, geometry, first=first)
                found |= dict(enumerate(sample_digests(batch, first).tolist(), start=first))
        return [found[number] for number in sorted(found)]

    batch = micro_batch(corpus, Geometry(24, 1, 1), first=24)
    assert batch.second_starts is not None
    assert batch.second_languages is not None
    expected = []
    for row, (ids, masks) in enumerate(row_sets(batch)):
        start, second = int(batch.second_starts[row]), int(batch.second_languages[row])
        half = None if start == 64 else (second, start)
        language = int(batch.languages[row])
        expected.append(reference.sample_digest(24 + row, language, ids, masks, half))
    assert digests(24, 1, 1) == expected
    assert digests(6, 2, 2) == digests(2, 3, 4) == expected
    targets = {update_targets(corpus, Geometry(*g), first=24) for g in ((24, 1, 1), (6, 2, 2))}
    assert targets == {int((batch.targets != PAD).sum())}
    for changed in (
        batch._replace(second_starts=batch.second_starts - (batch.second_starts < 64).long()),
        batch._replace(second_languages=(batch.second_languages + 1) % 3),
    ):
        differs = np.array(sample_digests(changed, 24)) != np.array(expected)
        assert differs.tolist() == (batch.second_starts < 64).tolist()


FLAGS = [f"--mlm-steps={','.join(STEPS)}", "--tokens-per-sample=64", "--max-tokens=512"]


def test_tlm_after_mlm_is_not_measured_by_the_best_of_mlm(
    parallel_data: Path, tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    """Its loss is of other text: the rate would shrink at every validation, and no checkpoint be the best."""
    run = tmp_path / "run"
    mlm, tlm = [*FLAGS[1:], "--mlm-steps=ar,en"], [*FLAGS[1:], "--mlm-steps=ar,en,ar-en"]
    train_here(parallel_data, run, ranks, *mlm, "--max-update=1")
    saved = (run / checkpoint.BEST, checkpoint.read_manifest(run / checkpoint.BEST))
    before = Progress(best_valid_loss=0.1, plateau=PlateauState(shrinks=2, bad_count=1, best=0.1))

    def goes_on(save_dir: Path, flags: list[str]) -> Progress:
        config = parse(TrainConfig, [str(parallel_data), f"--save-dir={save_dir}", *flags])
        return with_comparable_best(config, before, saved, ranks)

    assert goes_on(run, mlm) == before
    elsewhere = goes_on(tmp_path / "new", mlm)  # where no checkpoint is the best yet
    assert elsewhere == dataclasses.replace(before, best_valid_loss=None)
    for flags in (tlm, [*mlm, "--mask-ratio=0.3"], [*mlm, "--whole-word-masking"]):
        anew = goes_on(run, flags)
        assert (anew.best_valid_loss, anew.plateau) == (None, PlateauState(shrinks=2))
    with caplog.at_level("INFO", logger="xlm_ds"):
        train_here(parallel_data, run, ranks, *tlm, "--max-update=2")
    assert (
        "validation is another than before: the best checkpoint is looked for anew" in caplog.text
    )
    best = checkpoint.read_manifest(run / checkpoint.BEST)
    assert set(best["blocks"]) == {"ar", "en", "ar-en"}


@pytest.mark.parametrize(
    "more", [[], ["--arch=xlm", "--warmup-updates=2"]], ids=["xlm_base", "xlm"]
)
def test_resuming_with_pairs_is_bit_equal_and_proved(
    parallel_data: Path,
    tmp_path: Path,
    ranks: Ranks,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    for name, updates in (("whole", 6), ("parts", 3), ("parts", 6)):
        flags = [*FLAGS, *more, f"--max-update={updates}"]
        train_here(parallel_data, tmp_path / name, ranks, *flags)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert losses_in(whole) == losses_in(parts)
    a, b = last_weights(whole), last_weights(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert prove.main([str(whole), str(parts)]) == EXIT_OK
    assert "samples: identical to update 6" in capsys.readouterr().out
    last = records_in(whole)[-1]
    assert last["kind"] == "valid"
    assert set(last["loss_per_language"]) == set(STEPS)
    manifest = checkpoint.read_manifest(whole / checkpoint.LAST)
    assert manifest["languages"] == ["ar", "en", "hi"]
    assert manifest["blocks"]["hi-en"] == 153

    output = tmp_path / "scores.json"
    command = [str(whole / checkpoint.LAST), str(parallel_data), "--split=valid", "--mask-draws=1"]
    capsys.readouterr()
    for flags, names in (([], [*STEPS, "all"]), (["--mlm-steps=en-ar"], ["en-ar", "all"])):
        scores = evaluated([*command, *flags], output)
        assert [score["language"] for score in scores] == names
        assert all(1 < score["unigram_perplexity"] < 600 for score in scores)
    # Validation and evaluation agree on what a pair's loss is, under the same masks.
    (score,) = (s for s in evaluated(command, output) if s["language"] == "hi-en")
    assert score["loss"] == pytest.approx(last["loss_per_language"]["hi-en"], rel=1e-5)


def evaluated(command: list[str], output: Path) -> list[dict[str, Any]]:
    config = parse(EvaluateConfig, command)
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    scores = evaluate.evaluate(config, evaluate.open_subject(config, ranks), ranks)
    evaluate.write_json(output, config, scores)
    found: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))["scores"]
    return found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--mlm-steps=en-de"],
            "en-de: is none of the languages ar,en,hi and no pair",
        ),
        (["--mlm-steps=ar-hi"], r"no valid text of the pair ar-hi \(valid.ar-hi.ar.idx\)"),
        (["--mlm-steps=ar", "--monolingual-langs=ar"], "give one"),
    ],
)
def test_evaluate_refuses_what_the_model_or_the_data_do_not_know(
    flags: list[str], message: str, parallel_data: Path, tmp_path: Path, ranks: Ranks
) -> None:
    train_here(parallel_data, tmp_path, ranks, *FLAGS, "--max-update=1")
    command = [str(tmp_path / checkpoint.LAST), str(parallel_data), "--split=valid", *flags]
    with pytest.raises(InputError, match=message):
        evaluate.open_subject(parse(EvaluateConfig, command), ranks)


def test_prove_names_the_pair_that_differs(
    parallel_data: Path, tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(parallel_data, data)
    corpus = open_corpus(config_of(parallel_data))
    samples = corpus.order.samples(0, 8)
    row = int(np.flatnonzero(samples.streams == 2)[0])
    pair = int(samples.blocks[row])
    path = data / "train.ar-en.en.bin"
    tokens = np.fromfile(path, "<u2")
    lengths_before = np.fromfile(path.with_suffix(".idx"), "<i4", offset=26, count=pair)
    place = int(lengths_before.sum())
    tokens[place] = 5 + (tokens[place] == 5)
    tokens.tofile(path)
    for name, folder in (("a", parallel_data), ("b", data)):
        train_here(folder, tmp_path / name, ranks, *FLAGS, "--max-update=1")
    capsys.readouterr()
    assert prove.main([str(tmp_path / "a"), str(tmp_path / "b")]) == EXIT_DIFFERENT
    said = capsys.readouterr().out
    assert f"ar-en (languages 0 and 1) pair {pair} in pass 0" in said


def test_plan_counts_pairs(parallel_data: Path) -> None:
    config = parse(PlanConfig, [str(parallel_data), *FLAGS])
    facts = plan.read_facts(config)
    assert facts.languages == 3
    corpus = open_corpus(config_of(parallel_data))
    assert facts.epoch_samples == sum(stream.blocks for stream in corpus.train)
    without = parse(PlanConfig, ["--vocab-size=600", "--mlm-steps=en,fr,de-en"])
    assert plan.read_facts(without).languages == 3
