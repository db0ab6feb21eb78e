"""Says up to which update two runs are the same, or what differs first: the update, the sample, the parameter.

    xlm-ds prove RUN_A RUN_B

It compares what the runs have written of themselves (digests.jsonl). The samples of two runs are the same for any world
size, micro-batch and ZeRO stage if data, seed and batch are; the parameters only where those are the same too, as
floating point sums depend on them. The first sample that differs is looked for in the runs' data, if they are still
there.

It ends with code 0 if the runs are the same as far as both go, and with 3 if they differ: diff and cmp say 1, but here
that is a fault of ours, and a script must be able to tell the two.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from xlm_ds.config import ProveConfig, TrainConfig
from xlm_ds.flags import before_slow_imports, load_toml, parse
from xlm_ds.log import EXIT_DIFFERENT, EXIT_OK, InputError, run_stage, sentence_of

if __name__ == "__main__":
    before_slow_imports(ProveConfig, description=__doc__)  # before torch is imported

import numpy as np
import torch
from numpy.typing import NDArray

from xlm_ds.batches import MaskedBatch
from xlm_ds.corpus import Corpus, micro_batch, open_corpus
from xlm_ds.digests import FILE, Line, read_lines, read_names, sample_digests, update_digest
from xlm_ds.geometry import Geometry


class Finding(NamedTuple):
    differs: bool
    sentence: str


class Pair(NamedTuple):
    """The same update of both runs."""

    a: Line
    b: Line

    @property
    def update(self) -> int:
        return self.a.update


@dataclass(slots=True)
class Compared:
    """What was met while both files were read to their ends."""

    first: Pair | None = None
    last: Pair | None = None  # before the first difference of the samples
    parted: tuple[int, int] | None = None  # updates of both between which the samples differ
    differs: Pair | None = None  # the first whose samples differ
    parameters: int = 0  # updates where both have them, the same
    last_parameters: int = 0  # the last of those
    parameters_differ: Pair | None = None
    computed_otherwise: Pair | None = (
        None  # the first that is not computed by as many ranks, rows …
    )
    end_a: int = 0
    end_b: int = 0


def compare(run_a: Path, run_b: Path) -> Compared:
    """Reads both files. Raises InputError for a damaged one, and where no update is in both."""
    met = Compared()
    for a, b in _side_by_side(read_lines(run_a), read_lines(run_b)):
        met.end_a = a.update if a else met.end_a
        met.end_b = b.update if b else met.end_b
        if a is None or b is None:
            continue
        pair = Pair(a, b)
        if a.computed != b.computed:
            met.computed_otherwise = met.computed_otherwise or pair
        met.first = met.first or pair
        if met.differs is None:
            if (a.first_sample, a.samples, a.digest) == (b.first_sample, b.samples, b.digest):
                if met.parted is None and met.last is not None and _parted(met.last, pair):
                    met.parted = met.last.update, pair.update
                met.last = pair
            else:
                met.differs = pair
        if a.parameters and b.parameters and met.parameters_differ is None:
            if a.parameters == b.parameters:
                met.parameters += 1
                met.last_parameters = pair.update
            else:
                met.parameters_differ = pair
    if met.first is None:
        raise InputError(
            f"no update is in both: the last in {run_a / FILE} is {met.end_a}, in {run_b / FILE} {met.end_b}"
        )
    return met


def _parted(before: Pair, now: Pair) -> bool:
    """Whether the runs differ in updates between these two, of which one of them has no lines: the chains know it."""
    anew = now.a.begins_the_chain or now.b.begins_the_chain
    return before.a.chain == before.b.chain and now.a.chain != now.b.chain and not anew


def _side_by_side(
    lines_a: Iterator[Line], lines_b: Iterator[Line]
) -> Iterator[tuple[Line | None, Line | None]]:
    """By update; None where a run has not got it."""
    a, b = next(lines_a, None), next(lines_b, None)
    while a or b:
        if a and b and a.update == b.update:
            yield a, b
            a, b = next(lines_a, None), next(lines_b, None)
        elif b is None or (a and a.update < b.update):
            yield a, None
            a = next(lines_a, None)
        else:
            yield None, b
            b = next(lines_b, None)


# ----------------------------------------------------------------------------------------- samples


def samples_finding(run_a: Path, run_b: Path, met: Compared) -> Finding:
    """Raises InputError if the runs' updates have not the same numbers of samples from the start."""
    assert met.first is not None
    if met.last is None and met.differs is not None:
        a, b = met.differs
        if (a.first_sample, a.samples) != (b.first_sample, b.samples):
            raise InputError(
                f"update {a.update} is {_range(a)} in {run_a} and {_range(b)} in {run_b}: runs of different batch "
                "sizes cannot be compared update by update; give both the same --global-batch-tokens"
            )
        return Finding(
            True, f"update {a.update} differs: {_first_sample(run_a, run_b, met.differs)}"
        )
    assert met.last is not None
    known = _how_far(met, run_a, run_b)
    if met.differs is not None:
        found = _first_sample(run_a, run_b, met.differs)
        return Finding(True, f"{known.sentence}; update {met.differs.update} differs: {found}")
    if met.end_a == met.end_b:
        return known
    shorter, longer = (run_a, run_b) if met.end_a < met.end_b else (run_b, run_a)
    end = f", the last of {shorter} ({longer} has {max(met.end_a, met.end_b)})"
    return Finding(known.differs, known.sentence + end)


def _how_far(met: Compared, run_a: Path, run_b: Path) -> Finding:
    """What is known of two runs whose lines are the same to the last: the chains know what was where one has none."""
    first, last = met.first, met.last
    assert first is not None
    assert last is not None
    if met.parted:
        end, again = met.parted
        return Finding(
            True,
            f"identical to update {end}, and from {again} to {last.update}, but not between, where one run has no "
            "lines: their chains differ",
        )
    if last.a.chain == last.b.chain:
        return Finding(False, f"identical to update {last.update}")
    same = f"identical from update {first.update} to {last.update}"
    if first.a.chain == first.b.chain:  # and one has begun its chain anew since
        return Finding(False, f"{same}, as far as both have lines")
    begun = [run for run, line in ((run_a, first.a), (run_b, first.b)) if line.begins_the_chain]
    if begun:
        return Finding(False, f"{same}; of those before nothing is known of {begun[0]}")
    return Finding(True, f"{same}, but not before: their chains differ")


def _range(line: Line) -> str:
    return f"samples {line.first_sample} to {line.first_sample + line.samples - 1}"


class Rebuilt(NamedTuple):
    """The samples of an update once more."""

    corpus: Corpus
    batch: MaskedBatch
    digests: NDArray[np.uint64]


def _first_sample(run_a: Path, run_b: Path, pair: Pair) -> str:
    """What the first sample is that differs, and in what; or why nobody can say."""
    if (pair.a.first_sample, pair.a.samples) != (pair.b.first_sample, pair.b.samples):
        return f"it is {_range(pair.a)} in {run_a} and {_range(pair.b)} in {run_b}"
    try:
        a, b = rebuild(run_a, pair.a), rebuild(run_b, pair.b)
    except (InputError, OSError) as error:
        return f"which sample is not to be found out: {sentence_of(error)}"
    row = int(np.flatnonzero(a.digests != b.digests)[0])
    sample = pair.a.first_sample + row
    which_a, which_b = _which(a.corpus, sample), _which(b.corpus, sample)
    if which_a != which_b:
        return f"its sample {sample} is {which_a} in {run_a} and {which_b} in {run_b}"
    return f"in sample {sample}, {which_a}, {_in_what(a, b, row, run_a, run_b)}"


def rebuild(run: Path, line: Line) -> Rebuilt:
    """The samples of an update, from the run's configuration and data.

    Raises InputError, or OSError, if those are not there, or no longer what they were at that update.
    """
    path = run / "config.toml"
    if "model" in load_toml(path).get("data", {}):
        raise InputError(f"{run} is a fine-tuning, whose texts are not made again")
    config = parse(TrainConfig, ["--config", str(path)])
    corpus = open_corpus(config.data)
    batch = micro_batch(corpus, Geometry(line.samples, 1, 1), first=line.first_sample)
    digests = sample_digests(batch, line.first_sample)
    if update_digest(digests) != line.digest:
        raise InputError(
            f"{config.data.data} with {path} does not give the samples any more that update "
            f"{line.update} had"
        )
    return Rebuilt(corpus, batch, digests)


def _which(corpus: Corpus, sample: int) -> str:
    ((number,), (pass_,), (block,)) = corpus.order.samples(sample, 1)
    stream = corpus.train[number]
    if stream.is_pair:
        first, second = stream.languages
        return f"{stream.name} (languages {first} and {second}) pair {block} in pass {pass_}"
    return f"{stream.name} (language {stream.languages[0]}) block {block} in pass {pass_}"


def _in_what(a: Rebuilt, b: Rebuilt, row: int, run_a: Path, run_b: Path) -> str:
    tokens_a, tokens_b = _tokens(a.batch, row), _tokens(b.batch, row)
    if len(tokens_a) != len(tokens_b):
        return f"the length differs: {len(tokens_a)} tokens in {run_a}, {len(tokens_b)} in {run_b}"
    places = torch.nonzero(tokens_a != tokens_b).flatten()
    if len(places) == 0:
        return "the masks differ, and the tokens are the same"
    place = int(places[0])
    values = (
        f"{int(tokens[place])} ({rebuilt.corpus.dictionary.symbols[int(tokens[place])]}) in {run}"
        for tokens, rebuilt, run in ((tokens_a, a, run_a), (tokens_b, b, run_b))
    )
    return (
        f"{len(places)} of {len(tokens_a)} tokens differ, first number {place}: {', '.join(values)}"
    )


def _tokens(batch: MaskedBatch, row: int) -> torch.Tensor:
    """(T,): the row before it was masked."""
    rows, length = batch.input_ids.shape
    positions = batch.masked_positions.view(rows, -1)[row] - row * length
    tokens = batch.input_ids[row].clone()
    real = positions > 0  # the others fill up the row
    tokens[positions[real]] = batch.targets.view(rows, -1)[row][real]
    return tokens


# -------------------------------------------------------------------------------------- parameters


def parameters_finding(run_a: Path, run_b: Path, met: Compared) -> Finding:
    names_a, names_b = read_names(run_a), read_names(run_b)
    if names_a != names_b:
        only = sorted(set(names_a) ^ set(names_b)) or names_a
        return Finding(
            True, f"those of other networks: {only[0]} is not in both, or not as the same"
        )
    known = f"identical to update {met.last_parameters} (compared at {met.parameters} updates)"
    if met.parameters_differ is None:
        if met.parameters == 0:
            known = "not compared: no update has them in both runs (--digest-interval)"
        return Finding(False, known)
    digests_a, digests_b = (
        np.frombuffer(line.parameters or b"", ">u8") for line in met.parameters_differ
    )
    differing = np.flatnonzero(digests_a != digests_b)
    before = f"{known}; " if met.parameters else ""
    if met.computed_otherwise and met.computed_otherwise.update <= met.parameters_differ.update:
        a, b = met.computed_otherwise
        return Finding(
            False,
            f"{before}not comparable from update {a.update} on, as their last bits depend on what computes them: "
            f"{a.computed}, and {b.computed}",
        )
    return Finding(
        True,
        f"{before}update {met.parameters_differ.update} differs: {len(differing)} of {len(names_a)} parameters, first "
        f"{names_a[differing[0]]}",
    )


def main(argv: Sequence[str]) -> int:
    config = parse(ProveConfig, argv, description=__doc__)
    met = compare(config.run_a, config.run_b)
    samples = samples_finding(config.run_a, config.run_b, met)
    parameters = parameters_finding(config.run_a, config.run_b, met)
    sys.stdout.write(f"samples: {samples.sentence}\nparameters: {parameters.sentence}\n")
    return EXIT_DIFFERENT if samples.differs or parameters.differs else EXIT_OK


if __name__ == "__main__":
    sys.exit(run_stage("prove", main, log_to=sys.stderr))  # the findings alone are the output
