"""Digests: the same however samples and weights are divided, others for any change; chains that go on after a kill."""

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference
from pairs import write_mmap
from test_end_to_end import (
    MODULE,
    NO_DROPOUT,
    launcher,
    start,
    succeed,
    train_command,
    wait_for_update,
)
from test_engine import engine_losses, settings_of, small_model
from test_train import losses_in, train_here
from xlm_ds import checkpoint, prove
from xlm_ds.batches import MaskedBatch, Masking
from xlm_ds.corpus import Corpus, micro_batch
from xlm_ds.dataset import open_split
from xlm_ds.deepspeed_config import CONFIG_DIRECTORY
from xlm_ds.dictionary import Dictionary
from xlm_ds.digests import (
    FILE,
    Digests,
    begin_file,
    fragment_digest,
    read_lines,
    sample_digests,
    update_digest,
)
from xlm_ds.engine import Engine, Ranks
from xlm_ds.geometry import Geometry
from xlm_ds.lifeline import END_FILE
from xlm_ds.log import InputError
from xlm_ds.order import build_order
from xlm_ds.steps import Steps
from xlm_ds.streams import alone

LENGTH = 16
BATCH = 12  # samples
PAD = 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Short blocks now and then; the mask ratio changes inside updates."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    write_mmap(
        folder / "train.a", [rng.integers(5, 90, n).tolist() for n in rng.integers(1, 20, 60)]
    )
    write_mmap(
        folder / "train.b", [rng.integers(5, 90, n).tolist() for n in rng.integers(1, 20, 40)]
    )
    streams = alone(
        open_split(
            folder,
            "train",
            ["a", "b"],
            tokens_per_sample=LENGTH,
            break_mode="eos",
            vocab_size=90,
            dictionary_sha256="",
        )
    )
    order = build_order([stream.blocks for stream in streams], alpha=0.7, seed=3)
    masking = Masking(seed=3, mask_ratio=0.15, vocab_size=90)
    ratio = Steps.parse("0.15@0,0.6@17samples,0.3@30samples")
    dictionary = Dictionary((), ())
    return Corpus(dictionary, ("a", "b"), streams, streams, order, masking, ratio)


def batch_of(corpus: Corpus, first: int, count: int) -> MaskedBatch:
    return micro_batch(corpus, Geometry(count, 1, 1), first=first)


# ----------------------------------------------------------------------------------------- samples


def test_a_samples_digest_is_its_twins(corpus: Corpus) -> None:
    batch = batch_of(corpus, 10, 30)
    assert batch.has_padding
    expected = []
    for row in range(30):
        of_row = slice(row * len(batch.targets) // 30, (row + 1) * len(batch.targets) // 30)
        places = (batch.masked_positions[of_row] - row * LENGTH).tolist()
        pairs = zip(places, batch.targets[of_row].tolist(), strict=True)
        masks = {place: target for place, target in pairs if target != PAD}
        ids = batch.input_ids[row].tolist()
        expected.append(reference.sample_digest(10 + row, int(batch.languages[row]), ids, masks))
    assert sample_digests(batch, 10).tolist() == expected
    assert update_digest(sample_digests(batch, 10)) == (sum(expected) % 2**64).to_bytes(8, "big")


def run_of(
    corpus: Corpus,
    geometry: Geometry,
    *,
    updates: int,
    masters: Sequence[Sequence[tuple[str, int, torch.Tensor]]] | None = None,
    path: Path | None = None,
) -> str:
    """The chains of a run of some ranks, which are called one after another; `masters`: what each has."""
    sent: list[torch.Tensor] = []

    def sum_so_far(values: torch.Tensor) -> torch.Tensor:
        """Rank 0 comes last, and has all."""
        sent.append(values.clone())
        return torch.stack(sent).sum(0)

    none = [[("w", 0, torch.zeros(0))]] * geometry.world_size
    for rank in reversed(range(geometry.world_size)):
        digests = Digests(
            path if rank == 0 else None,
            "",
            interval=2,
            computed="by one",
            masters=partial(iter, (masters or none)[rank]),
            sum_over_ranks=sum_so_far,
        )
        for update in range(updates):
            first = update * geometry.batch
            for micro in range(geometry.accumulation):
                sample = geometry.first_sample(first, micro, rank)
                digests.add(micro_batch(corpus, geometry, first=sample), sample)
            digests.end_update(update + 1, first, geometry.batch)
        chains = digests.write()
    return chains


DIVISIONS = [
    (r, a, BATCH // r // a)
    for r in (1, 2, 3, 4, 6, 12)
    for a in (1, 2, 3, 4, 6, 12)
    if BATCH % (r * a) == 0
]


@settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(division=st.sampled_from(DIVISIONS), cuts=st.lists(st.integers(0, 500), max_size=4))
def test_chains_are_the_same_however_a_batch_is_divided(
    corpus: Corpus, division: tuple[int, int, int], cuts: list[int]
) -> None:
    """Samples among micro-batches and ranks, weights among ranks at any places."""
    weights = torch.randn(500, generator=torch.Generator().manual_seed(0))
    world = division[2]
    places = [0, *sorted(cuts)[: world - 1], 500]
    parts: list[list[tuple[str, int, torch.Tensor]]] = [
        [("w", 0, weights[:0])] for _ in range(world)
    ]
    for rank, (begin, end) in enumerate(itertools.pairwise(places)):
        parts[rank] = [("w", begin, weights[begin:end])]
    chains = run_of(corpus, Geometry(*division), updates=4, masters=parts)
    assert chains == run_of(corpus, Geometry(BATCH, 1, 1), updates=4, masters=[[("w", 0, weights)]])


def test_chains_are_their_twins(corpus: Corpus, tmp_path: Path) -> None:
    weights = torch.randn(7)
    begin_file(tmp_path / FILE, ["w"], update=0, chains="")
    parts = [[("w", 0, weights[:3])], [("w", 3, weights[3:])]]
    chains = run_of(corpus, Geometry(3, 2, 2), updates=3, masters=parts, path=tmp_path / FILE)
    updates = [
        (u + 1, update_digest(sample_digests(batch_of(corpus, u * BATCH, BATCH), u * BATCH)))
        for u in range(3)
    ]
    parameters = reference.parameter_digest(weights.tolist()).to_bytes(8, "big")
    expected = reference.chain_of(updates).hex() + reference.chain_of([(2, parameters)]).hex()
    assert chains == expected
    lines = list(read_lines(tmp_path))
    assert [(line.update, line.digest) for line in lines] == updates
    assert [(line.first_sample, line.samples) for line in lines] == [(0, 12), (12, 12), (24, 12)]
    assert [line.parameters for line in lines] == [None, parameters, None]
    assert lines[-1].chain.hex() == chains[:16]


def swap_samples(batch: MaskedBatch) -> MaskedBatch:
    """Rows 0 and 1, whole."""
    order = torch.tensor([1, 0, *range(2, len(batch.languages))])
    rows = len(order)
    positions = batch.masked_positions.view(rows, -1) - LENGTH * torch.arange(rows)[:, None]
    moved = positions[order] + LENGTH * torch.arange(rows)[:, None]
    return MaskedBatch(
        batch.input_ids[order],
        batch.languages[order],
        moved.flatten(),
        batch.targets.view(rows, -1)[order].flatten(),
        batch.has_padding,
    )


def changed(field: str, index: Any, by: int) -> Callable[[MaskedBatch], MaskedBatch]:
    def change(batch: MaskedBatch) -> MaskedBatch:
        tensor = getattr(batch, field).clone()
        tensor[index] += by
        return batch._replace(**{field: tensor})

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed("input_ids", (3, 5), 1),
        changed("input_ids", (7, LENGTH - 1), 2**16),
        changed("languages", 4, 1),
        changed("masked_positions", 0, 1),
        changed("targets", 0, 1),
        swap_samples,
    ],
    ids=["token", "large token", "language", "masked position", "target", "samples swapped"],
)
def test_any_change_is_another_digest(
    corpus: Corpus, change: Callable[[MaskedBatch], MaskedBatch]
) -> None:
    batch = batch_of(corpus, 0, BATCH)
    before, after = (update_digest(sample_digests(b, 0)) for b in (batch, change(batch)))
    assert before != after
    assert update_digest(sample_digests(batch, 1)) != before, "the sample number counts"


def test_a_batch_of_another_dtype_has_the_same_digests(corpus: Corpus) -> None:
    batch = batch_of(corpus, 0, BATCH)
    ids, languages, positions, targets = (tensor.int() for tensor in batch[:4])
    narrow = MaskedBatch(ids, languages, positions, targets, batch.has_padding)
    assert (sample_digests(narrow, 0) == sample_digests(batch, 0)).all()


# -------------------------------------------------------------------------------------- parameters


def digest_of(weights: torch.Tensor) -> int:
    return int(fragment_digest(weights, 0)) % 2**64


def test_a_parameters_digest_is_its_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xlm_ds.digests._CHUNK", 64)  # some, and an unfinished one
    weights = torch.randn(200)
    weights[:4] = torch.tensor([0.0, -0.0, torch.inf, -1.0])
    assert digest_of(weights) == reference.parameter_digest(weights.tolist())
    assert digest_of(weights[:0]) == 0


def test_one_bit_and_two_places_are_another_digest() -> None:
    weights = torch.randn(1000)
    flipped = weights.clone()
    flipped.view(torch.int32)[17] ^= 1
    swapped = weights.clone()
    swapped[[3, 900]] = weights[[900, 3]]
    zeros, negative = torch.zeros(5), torch.zeros(5)
    negative[2] = -0.0
    assert len({digest_of(w) for w in (weights, flipped, swapped)}) == 3
    assert digest_of(zeros) != digest_of(negative)


@pytest.mark.parametrize(
    "name",
    [
        *("zero1_fp32", "zero1_bf16", "zero2_bf16", "zero3_bf16"),
        pytest.param("zero2_bf16_offload", marks=pytest.mark.slow),
    ],
)
def test_equal_masters_have_equal_digests_at_every_stage(name: str, ranks: Ranks) -> None:
    """Of two ranks: parity_of_ranks.py."""
    engine = Engine(small_model(), settings_of(name, int(name[4])), ranks)
    given = {n: digest_of(p.detach().flatten()) for n, p in small_model().named_parameters()}
    found = {
        n: int(fragment_digest(f, offset)) % 2**64 for n, offset, f in engine.master_fragments()
    }
    assert list(found.items()) == list(given.items())
    engine_losses(engine, range(1))
    state = {n: digest_of(values["weight"].flatten()) for n, values in engine.state()}
    found = {
        n: int(fragment_digest(f, offset)) % 2**64 for n, offset, f in engine.master_fragments()
    }
    assert found == state != given


# ----------------------------------------------------------------------------------------- the file


@pytest.fixture
def written(corpus: Corpus, tmp_path: Path) -> tuple[Path, str]:
    """A file of five updates, and the chains after them."""
    path = tmp_path / FILE
    begin_file(path, ["w"], update=0, chains="")
    return path, run_of(
        corpus, Geometry(BATCH, 1, 1), updates=5, path=path, masters=[[("w", 0, torch.ones(3))]]
    )


def chains_after(path: Path, update: int) -> str:
    """As its checkpoint would have them."""
    lines = list(read_lines(path.parent))
    (line,) = [line for line in lines if line.update == update]
    (parameters,) = [
        x.parameters_chain for x in lines if x.parameters_chain and x.update <= update
    ][-1:]
    return line.chain.hex() + parameters.hex()


@pytest.mark.parametrize("unfinished", ["", '{"update": 6, "first', "\0\0\0"])
def test_what_a_killed_run_wrote_after_its_checkpoint_is_cut_off(
    written: tuple[Path, str], unfinished: str
) -> None:
    path, _ = written
    content = path.read_text(encoding="utf-8")
    chains = chains_after(path, 3)
    path.write_text(content + unfinished, encoding="utf-8")
    begin_file(path, ["w"], update=3, chains=chains)
    assert path.read_text(encoding="utf-8").splitlines() == content.splitlines()[:4]
    begin_file(path, ["v"], update=0, chains="")  # killed before its first checkpoint
    assert path.read_text(encoding="utf-8") == '{"format": 1, "parameters": ["v"]}\n'


def test_a_file_of_another_run_steps_aside(
    written: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    path, chains = written
    content = path.read_bytes()
    with caplog.at_level("INFO", logger="xlm_ds"):
        begin_file(path, ["w"], update=5, chains="0" * 32)
    assert path.with_name("digests.jsonl.old").read_bytes() == content
    assert len(path.read_bytes().splitlines()) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} was of another run than the checkpoint and is now digests.jsonl.old; a new one begins at update 6"
    ]
    caplog.clear()
    path.write_bytes(content)
    begin_file(path, ["w"], update=5, chains=chains)
    assert path.read_bytes() == content
    assert not caplog.records


@pytest.mark.parametrize("header", ['{"format": 1, "parameters": ["v"]}', "{"])
def test_a_file_of_another_network_steps_aside(written: tuple[Path, str], header: str) -> None:
    path, chains = written
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([header, *lines[1:4]]) + "\n", encoding="utf-8")
    begin_file(path, ["w"], update=5, chains=chains)
    assert path.with_name("digests.jsonl.old").read_text(encoding="utf-8").startswith(header)
    assert path.read_text(encoding="utf-8").splitlines() == [lines[0]]


def test_what_lost_power_has_left_inside_is_cut_off(written: tuple[Path, str]) -> None:
    path, chains = written
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + b"\0" * 40 + b"\n" + b"".join(lines[4:]))
    with pytest.raises(InputError, match="line 4: damaged"):
        list(read_lines(path.parent))
    begin_file(path, ["w"], update=5, chains=chains)
    assert [line.update for line in read_lines(path.parent)] == [1, 2]


def test_a_gap_is_said_and_bridged(
    written: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    """As when the disk was full for a while, or power was lost."""
    path, chains = written
    with caplog.at_level("INFO", logger="xlm_ds"):
        begin_file(path, ["w"], update=9, chains=chains)
        path.unlink()
        begin_file(path, ["w"], update=9, chains=chains)
    assert "has no updates 6 to 9; it goes on" in caplog.text
    assert "has no updates 1 to 9; it goes on" in caplog.text
    assert path.read_text(encoding="utf-8") == '{"format": 1, "parameters": ["w"]}\n'


def test_a_file_that_cannot_be_written_does_not_end_the_run(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chains = run_of(corpus, Geometry(BATCH, 1, 1), updates=2, path=tmp_path)
    assert chains == run_of(corpus, Geometry(BATCH, 1, 1), updates=2)
    assert caplog.text.count("Is a directory; going on without") == 1


def replace_in(line: int, old: str, new: str) -> Callable[[list[str]], None]:
    def damage(lines: list[str]) -> None:
        assert old in lines[line - 1]
        lines[line - 1] = lines[line - 1].replace(old, new, 1)

    return damage


def swap_lines(lines: list[str]) -> None:
    lines[2], lines[3] = lines[3], lines[2]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (replace_in(1, "format", "f"), "line 1: damaged: not the names"),
        (replace_in(1, '["w"]', "3"), "line 1: damaged: not the names"),
        (replace_in(1, '"format": 1', '"format": 2'), "format 2; this version reads 1"),
        (replace_in(4, '"digest"', '"gest"'), "line 4: damaged: no 'digest'"),
        (replace_in(4, '"digest": "', '"digest": "0'), "line 4: damaged: expected 16 hex digits"),
        (replace_in(4, "{", "["), "line 4: damaged: "),
        (lambda lines: lines.__setitem__(2, "7"), "line 3: damaged: not an object"),
        (replace_in(3, '"samples": 12', '"samples": "12"'), "line 3: damaged: .*whole numbers"),
        (replace_in(5, '"chain": "', '"chain": "f'), "line 5: damaged: expected 16 hex digits"),
        (replace_in(3, '"parameters": "', '"parameters": "00'), "line 3: damaged: expected 16 hex"),
        (replace_in(3, '"update": 2', '"update": 1'), "line 3: damaged: update 1 after update 1"),
        (swap_lines, "line 4: damaged: update 2 after update 3"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(
    written: tuple[Path, str], damage: Callable[[list[str]], None], sentence: str
) -> None:
    path, _ = written
    lines = path.read_text(encoding="utf-8").splitlines()
    damage(lines)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=rf"^[^\n]*{FILE}[^\n]*{sentence}[^\n]*$"):
        list(read_lines(path.parent))


@pytest.mark.parametrize("key", ["digest", "chain", "parameters", "parameters_chain"])
def test_a_changed_digit_is_found_by_the_chains(written: tuple[Path, str], key: str) -> None:
    path, _ = written
    lines = path.read_text(encoding="utf-8").splitlines()
    line = json.loads(lines[4])
    assert line["update"] == 4
    line[key] = line[key][:-1] + ("0" if line[key][-1] != "0" else "1")
    lines[4] = json.dumps(line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(
        InputError, match=r"line 5: damaged: its (parameters_)?chain does not follow"
    ):
        list(read_lines(path.parent))


# ------------------------------------------------------------------------------------------- a run


@pytest.fixture
def run(tiny_data: Path, tmp_path: Path, ranks: Ranks) -> Callable[..., Path]:
    """Trains in this process; returns the run's folder."""

    def start(name: str, *flags: str) -> Path:
        train_here(tiny_data, tmp_path / name, ranks, "--digest-interval=2", *flags)
        return tmp_path / name

    return start


def columns(save_dir: Path) -> list[tuple[int, bytes, bytes]]:
    """What the samples alone decide."""
    return [(line.update, line.digest, line.chain) for line in read_lines(save_dir)]


def test_a_resumed_run_has_the_file_of_one_that_never_stopped(run: Callable[..., Path]) -> None:
    """Also where it is logged now and then, and where the file is ahead of the checkpoint."""
    whole = (run("whole", "--max-update=6", "--log-interval=4") / FILE).read_bytes()
    parts = run("parts", "--max-update=3")
    (parts / FILE).write_bytes(whole[: whole.rindex(b'{"update": 6')] + b'{"upd')
    run("parts", "--max-update=6")
    assert (parts / FILE).read_bytes() == whole
    assert whole.count(b"parameters_chain") == 3


def test_micro_batch_and_stage_leave_the_samples_chain_as_it_is(run: Callable[..., Path]) -> None:
    a = run("a", "--max-update=3")
    b = run("b", "--max-update=3", "--max-tokens=64", "--update-freq=2", "--digest-interval=0")
    c = run("c", "--max-update=3", f"--deepspeed_config={CONFIG_DIRECTORY / 'zero3_bf16.json'}")
    assert columns(a) == columns(b) == columns(c)
    assert [line.parameters is not None for line in read_lines(a)] == [False, True, False]
    assert [line.parameters for line in read_lines(b)] == [None] * 3


def test_a_checkpoint_of_an_earlier_version_begins_the_chains(
    run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = run("a", "--max-update=2")
    whole = run("whole", "--max-update=4")
    manifest = folder / checkpoint.LAST / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    del content["progress"]["chains"]
    content["manifest_sha256"] = checkpoint._manifest_sha256(content)
    manifest.write_text(json.dumps(content), encoding="utf-8")
    (folder / FILE).unlink()
    with caplog.at_level("INFO", logger="xlm_ds"):
        run("a", "--max-update=4")
    said = [r.getMessage() for r in caplog.records if "digests" in r.getMessage()]
    assert said == [
        "the checkpoint has no digests, as an earlier version wrote it: digests.jsonl begins at update 3"
    ]
    lines = list(read_lines(folder))
    assert [line.update for line in lines] == [3, 4]
    assert lines[0].begins_the_chain
    assert [line.digest for line in lines] == [line.digest for line in read_lines(whole)][2:]
    assert prove.main([str(folder), str(whole)]) == 0


# --------------------------------------------------------------------------------------- slow: ranks


def ranks_of(save_dir: Path) -> dict[int, int]:
    """rank -> process id, of the processes that train into this folder, which is no one else's."""
    found: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and f"--save-dir={save_dir}".encode() in (folder / "cmdline").read_bytes()
            ):
                variables = (folder / "environ").read_bytes().split(b"\0")
                found |= {int(v[5:]): int(folder.name) for v in variables if v.startswith(b"RANK=")}
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_leaves_both_chains_as_they_would_be(
    victim: int, tiny_data: Path, tmp_path: Path
) -> None:
    """Twice, at random updates, on two ranks."""
    flags = ["--max-update=30", "--save-interval-updates=3", "--digest-interval=2"]
    prefix = launcher(tmp_path, 2)
    succeed(*prefix, *train_command(tiny_data, tmp_path / "whole", *flags))
    killed = tmp_path / "killed"
    updates = random.Random(victim)
    for low in (4, 15):
        process = start(*prefix, *train_command(tiny_data, killed, *flags))
        wait_for_update(process, killed, updates.randrange(low, low + 8))
        os.kill(ranks_of(killed)[victim], signal.SIGKILL)
        process.communicate(timeout=120)
        deadline = time.monotonic() + 60
        while ranks_of(killed):
            assert time.monotonic() < deadline, "a rank goes on"
            time.sleep(0.1)
        assert max(line.update for line in read_lines(killed)) < 30, "killed too late"
    succeed(*prefix, *train_command(tiny_data, killed, *flags))
    assert (killed / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    said = succeed(*MODULE, "xlm_ds.prove", killed, tmp_path / "whole")
    assert (
        said
        == "samples: identical to update 30\nparameters: identical to update 30 (compared at 15 updates)\n"
    )


@pytest.mark.faults
def test_torchrun_starts_a_run_again_whose_rank_is_killed(tiny_data: Path, tmp_path: Path) -> None:
    """Each rank once, at random updates; nobody else does anything, and the digests are an unbroken run's."""
    flags = ["--max-update=40", "--save-interval-updates=3", "--digest-interval=2"]
    torchrun = [*MODULE, "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]
    torchrun += [f"--master-port={20000 + os.getpid() % 20000}", "--max-restarts=2", "--module"]
    succeed(*torchrun, *train_command(tiny_data, tmp_path / "whole", *flags))
    killed = tmp_path / "killed"
    log = killed / "train.log"
    process = start(*torchrun, *train_command(tiny_data, killed, *flags))
    updates = random.Random(4)
    for victim, low in ((1, 5), (0, 18)):
        wait_for_update(process, killed, updates.randrange(low, low + 8))
        os.kill(ranks_of(killed)[victim], signal.SIGKILL)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    assert not ranks_of(killed)
    assert log.read_text(encoding="utf-8").count("| going on from ") == 2, "killed too late"
    assert (killed / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    ended = json.loads((killed / END_FILE).read_text(encoding="utf-8"))
    assert (ended["exit_code"], ended["update"], ended["what"]) == (0, 40, "done")


@pytest.mark.slow
def test_other_ranks_and_stages_continue_the_samples_chain_and_the_losses(
    tiny_data: Path, tmp_path: Path
) -> None:
    template = json.loads((CONFIG_DIRECTORY / "zero1_fp32.json").read_text(encoding="utf-8"))
    template["zero_optimization"]["stage"] = 3
    (tmp_path / "zero3.json").write_text(json.dumps(template), encoding="utf-8")
    # The validation that ends each part moves no rate of this schedule.
    flags = ["--global-batch-tokens=384", "--lr-scheduler=inverse_sqrt", *NO_DROPOUT]
    whole, run = tmp_path / "whole", tmp_path / "run"
    succeed(*MODULE, *train_command(tiny_data, whole, *flags, "--max-update=10"))
    zero3 = f"--deepspeed_config={tmp_path / 'zero3.json'}"
    for update, ranks, more in (
        (2, 1, []),
        (4, 2, [zero3]),
        (6, 3, [zero3]),
        (8, 4, []),
        (10, 1, []),
    ):
        prefix = MODULE if ranks == 1 else launcher(tmp_path, ranks)
        command = train_command(tiny_data, run, *flags, *more, f"--max-update={update}")
        succeed(*prefix, *command)
    assert [u for u, *_ in columns(whole)] == list(range(1, 11))
    assert columns(run) == columns(whole)
    assert losses_in(run) == pytest.approx(losses_in(whole), abs=1e-3)
    said = succeed(*MODULE, "xlm_ds.prove", whole, run)
    assert said.startswith("samples: identical to update 10\n")
