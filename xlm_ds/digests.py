"""What a run has learnt from and what it has become, in a few bytes an update, by which two runs can be compared.

    SAVE_DIR/digests.jsonl
        {"format": 1, "parameters": ["token_embedding.weight", …]}
        {"update": 1, "first_sample": 0, "samples": 8, "digest": "94f5…", "chain": "e01c…"}
        {"update": 2, …, "parameters_chain": "5b0f…", "parameters": "16 hex digits of each, one after another"}

The digest of an update is the sum modulo 2^64 of those of its samples, so it is the same for any world size,
micro-batch and ZeRO stage. That of a parameter is the sum of its weights' in fp32, so each rank adds up what it has of
them and nothing is gathered. A chain is a hash of all digests so far; it is in every checkpoint, so that a run that
goes on continues it.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlm_ds.batches import MaskedBatch
from xlm_ds.files import Appended
from xlm_ds.log import InputError, logger

FILE = "digests.jsonl"
FORMAT = 1
BEGIN = bytes(8)  # of a chain
_HEX = 16  # digits of a digest, and of a chain

# SplitMix64, as the core's generator, in int64: (shift, what it leaves without the sign, factor).
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_STEPS = (
    (30, (1 << 34) - 1, 0xBF58476D1CE4E5B9 - (1 << 64)),
    (27, (1 << 37) - 1, 0x94D049BB133111EB - (1 << 64)),
    (31, (1 << 33) - 1, 1),
)
_CHUNK = 1 << 20  # weights at a time: three int64 of each are at work, 24 MiB


# ----------------------------------------------------------------------------------------- digests


def sample_digests(batch: MaskedBatch, first: int) -> NDArray[np.uint64]:
    """(B,): of each row its languages, tokens, masked positions and targets, keyed by its sample number, `first` + row.

    The batch must be on the CPU. What only fills up its shape is left out, so a row may stand in any batch.

    Costs 127 CPU-microseconds for 64 rows of 256 tokens, of which `micro_batch` needs 52 (2 cores of an AMD EPYC,
    2026-11-23): 7.7 nanoseconds a token. A training step of xlm_base there needs 2.3 milliseconds a token; of the 22
    milliseconds that such rows would take on an H100 (`micro_batch`) it is 0.6 %, while the device is at work.
    """
    rows, length = batch.input_ids.shape
    targets = batch.targets.view(rows, -1).numpy()
    starts = length * np.arange(rows)[:, np.newaxis]
    positions = batch.masked_positions.view(rows, -1).numpy() - starts
    table = np.empty((rows, 1 + length + 2 * targets.shape[1]), "<u4")
    table[:, 0] = batch.languages.numpy()
    table[:, 1 : 1 + length] = batch.input_ids.numpy()
    table[:, 1 + length :: 2] = positions
    table[:, 2 + length :: 2] = targets
    # Masked positions that fill up a row are its first, where no token is masked, and come last.
    sizes = 4 * (1 + length + 2 * np.count_nonzero(positions, axis=1))
    content, pitch = table.data.cast("B"), table.strides[0]
    persons = _second_halves(batch)
    digests = [
        blake2b(
            content[row * pitch : row * pitch + size],
            digest_size=8,
            salt=(first + row).to_bytes(8, "little"),
            person=persons[row] if persons else b"",
        ).digest()
        for row, size in enumerate(sizes.tolist())
    ]
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def _second_halves(batch: MaskedBatch) -> list[bytes]:
    """By row, language and place of the second half; of a row without one nothing; empty if no row has one."""
    if batch.second_starts is None or batch.second_languages is None:
        return []
    length = batch.input_ids.shape[1]
    halves = torch.stack([batch.second_languages, batch.second_starts], dim=1)
    return [
        b"" if start == length else language.to_bytes(4, "little") + start.to_bytes(4, "little")
        for language, start in halves.tolist()
    ]


def fragment_digest(fragment: Tensor, offset: int) -> Tensor:
    """Of a part (n,) of a parameter in fp32 that begins at its weight number `offset`; int64, on the part's device.

    Those of all parts of a parameter add up, modulo 2^64, to that of the parameter. Does not wait for the device. Costs
    5.6 CPU-nanoseconds a weight (2 cores of an AMD EPYC, 2026-11-23): a second for xlm_base's 175 million.
    """
    total = torch.zeros((), dtype=torch.int64, device=fragment.device)
    for begin in range(0, fragment.numel(), _CHUNK):
        bits = fragment[begin : begin + _CHUNK].view(torch.int32).to(torch.int64)
        bits &= 0xFFFFFFFF
        start = offset + begin
        bits += torch.arange(start, start + len(bits), device=fragment.device) << 32
        bits += _GOLDEN
        for shift, unsigned, factor in _STEPS:
            bits ^= (bits >> shift) & unsigned
            bits *= factor
        total += bits.sum()
    return total


def update_digest(digests: NDArray[np.uint64]) -> bytes:
    """Of an update, from those of its samples."""
    return _as_bytes(digests.sum(dtype=np.uint64, keepdims=True))


def chained(chain: bytes, update: int, digests: bytes) -> bytes:
    """The chain after an update with these digests."""
    return blake2b(chain + update.to_bytes(8, "little") + digests, digest_size=8).digest()


def _as_bytes(digests: NDArray[np.uint64]) -> bytes:
    return digests.astype(">u8").tobytes()


# ------------------------------------------------------------------------------------------- a run


class _Update(NamedTuple):
    """This rank's part of it."""

    update: int
    first_sample: int
    samples: int
    digest: NDArray[np.uint64]  # (1,)
    parameters: Tensor | None  # (P,) int64


class Digests:
    """A run's two chains, and its file of them on the rank that has a `path`.

    The ranks keep what is theirs until `write`, which alone communicates and reads the device.

    chains: where the run goes on, as `write` has returned it; "" if it begins, or nobody knows.
    interval: updates from one digest of the parameters to the next (0: never).
    computed: by how many ranks, rows …: what the parameters' last bits depend on.
    masters: Engine.master_fragments.
    sum_over_ranks: of an int64 tensor on the CPU.
    """

    def __init__(
        self,
        path: Path | None,
        chains: str,
        *,
        interval: int,
        computed: str,
        masters: Callable[[], Iterable[tuple[str, int, Tensor]]],
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self._file = Appended(path) if path else None
        self._chain, self._parameters_chain = _split_chains(chains)
        self._interval = interval
        self._computed = computed
        self._masters = masters
        self._sum_over_ranks = sum_over_ranks
        self._digest = np.zeros(1, np.uint64)  # of the micro-batches of an update so far
        self._updates: list[_Update] = []

    def add(self, batch: MaskedBatch, first: int) -> None:
        """A micro-batch on the CPU, whose rows are the samples from `first` on."""
        self.add_samples(sample_digests(batch, first))

    def add_samples(self, digests: NDArray[np.uint64]) -> None:
        """(n,): of samples of this rank."""
        self._digest += digests.sum(dtype=np.uint64)

    def end_update(self, update: int, first: int, count: int) -> None:
        """Update number `update` has been made, of the `count` samples from `first` on of all ranks."""
        parameters = None
        if self._interval > 0 and update % self._interval == 0:
            digests = [fragment_digest(fragment, offset) for _, offset, fragment in self._masters()]
            parameters = torch.stack([digest.to(digests[0].device) for digest in digests])
        self._updates.append(_Update(update, first, count, self._digest, parameters))
        self._digest = np.zeros(1, np.uint64)

    def write(self) -> str:
        """Appends the updates since the last call to the file; returns the chains, for the checkpoint.

        All ranks must call it. A file that cannot be written is no error: what is missing follows with a later call.
        """
        updates, self._updates = self._updates, []
        own = [part for u in updates for part in (u.digest, _as_uint64(u.parameters))]
        sums = self._sum(np.concatenate(own)) if own else np.empty(0, np.uint64)
        lines = [
            self._next_line(u, sums) for u, sums in zip(updates, _split(sums, updates), strict=True)
        ]
        if self._file:
            self._file.append("".join(lines))
        return self._chain.hex() + self._parameters_chain.hex()

    def _next_line(self, u: _Update, sums: NDArray[np.uint64]) -> str:
        digest, parameters = _as_bytes(sums[:1]), _as_bytes(sums[1:])
        self._chain = chained(self._chain, u.update, digest)
        line = {
            "update": u.update,
            "first_sample": u.first_sample,
            "samples": u.samples,
            "digest": digest.hex(),
            "chain": self._chain.hex(),
            "computed": self._computed,
        }
        if parameters:
            self._parameters_chain = chained(self._parameters_chain, u.update, parameters)
            line["parameters_chain"] = self._parameters_chain.hex()
            line["parameters"] = parameters.hex()
        return json.dumps(line) + "\n"

    def _sum(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Over the ranks, modulo 2^64. In halves: a sum of signed numbers that overflows is undefined in C++."""
        halves = np.stack([values >> np.uint64(32), values & np.uint64(0xFFFFFFFF)])
        summed = self._sum_over_ranks(torch.from_numpy(halves.astype(np.int64)))
        high, low = summed.numpy().astype(np.uint64)
        total: NDArray[np.uint64] = (high << np.uint64(32)) + low
        return total


def _as_uint64(parameters: Tensor | None) -> NDArray[np.uint64]:
    if parameters is None:
        return np.empty(0, np.uint64)
    return parameters.cpu().numpy().view(np.uint64)


def _split(sums: NDArray[np.uint64], updates: Sequence[_Update]) -> list[NDArray[np.uint64]]:
    """The update's own digest and its parameters', for each."""
    sizes = [1 if u.parameters is None else 1 + len(u.parameters) for u in updates]
    return np.split(sums, np.cumsum(sizes))[: len(updates)]


def _split_chains(chains: str) -> tuple[bytes, bytes]:
    if not chains:
        return BEGIN, BEGIN
    return bytes.fromhex(chains[:_HEX]), bytes.fromhex(chains[_HEX:])


# ------------------------------------------------------------------------------------------ a file


class Line(NamedTuple):
    """An update in the file."""

    update: int
    first_sample: int
    samples: int
    digest: bytes
    chain: bytes
    computed: str
    parameters: bytes | None  # eight for each
    parameters_chain: bytes | None

    @property
    def begins_the_chain(self) -> bool:
        return self.chain == chained(BEGIN, self.update, self.digest)


_UPDATE = re.compile(rb'{"update": (\d+), .*"chain": "([0-9a-f]{16})"')


def begin_file(path: Path, parameters: Sequence[str], *, update: int, chains: str) -> None:
    """Makes the file of a run that begins, or goes on from a checkpoint with this update and these chains.

    What a killed run has written of later updates is cut off. Says so where file or chains cannot go on.
    """
    if update > 0 and not chains:
        logger.info(
            f"the checkpoint has no digests, as an earlier version wrote it: {path.name} begins at update {update + 1}"
        )
    last = _cut_off(path, update) if path.exists() else None
    other_chain = chains and last is not None and last[0] == update and last[1] != chains[:_HEX]
    if other_chain or (update > 0 and not _is_empty_or_of(path, parameters)):
        old = path.with_name(f"{path.name}.old")
        path.replace(old)
        logger.warning(
            f"{path} was of another run than the checkpoint and is now {old.name}; a new one begins at update "
            f"{update + 1}"
        )
    elif chains and update > (last[0] if last else 0):
        missing = last[0] + 1 if last else 1
        which = f"updates {missing} to {update}" if missing < update else f"update {update}"
        logger.info(f"{path} has no {which}; it goes on with the checkpoint's chain")
    if update == 0 or not path.exists() or path.stat().st_size == 0:
        header = json.dumps({"format": FORMAT, "parameters": list(parameters)})
        path.write_text(header + "\n", encoding="utf-8")


def _is_empty_or_of(path: Path, parameters: Sequence[str]) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return True
    try:
        return read_names(path.parent) == tuple(parameters)
    except InputError:
        return False


def _cut_off(path: Path, update: int) -> tuple[int, str] | None:
    """Cuts off the lines after `update`, and from the first that is damaged on.

    Returns update and chain of the last that stays.
    """
    last = None
    end = 0
    with path.open("rb+") as file:
        for line in file:
            found = _UPDATE.match(line)
            is_ours = line.endswith(b"\n") and (found or end == 0)  # the first has names
            if not is_ours or (found and int(found[1]) > update):
                break
            end += len(line)
            if found:
                last = int(found[1]), found[2].decode()
        file.truncate(end)
    return last


def read_names(run: Path) -> tuple[str, ...]:
    """Of a run's parameters. Raises InputError if `run` is no run's folder, or its file is not whole."""
    path = run / FILE
    if not path.is_file():
        raise InputError(f"{path}: not found; give the --save-dir of a run")
    with path.open("rb") as file:
        line = file.readline()
    try:
        header = json.loads(line)
        written, names = header["format"], tuple(map(str, header["parameters"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}, line 1: damaged: not the names of the parameters") from error
    if written != FORMAT:
        raise InputError(f"{path}: format {written}; this version reads {FORMAT}")
    return names


def read_lines(run: Path) -> Iterator[Line]:
    """The updates in a run's file, in their order; one that is unfinished at its end is left out.

    Raises InputError, with its number, for a line that is damaged or whose chain does not follow from those before.
    """
    path = run / FILE
    parameters = len(read_names(run))
    before: Line | None = None
    parameters_chain: bytes | None = BEGIN  # None: not known, after a gap
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if number == 1 or not text.endswith(b"\n"):
                continue
            try:
                line = _parsed(text, parameters)
                if line.update != (before.update if before else 0) + 1:
                    parameters_chain = None
                _check_chains(line, before, parameters_chain)
            except KeyError as error:
                raise InputError(f"{path}, line {number}: damaged: no {error}") from error
            except (ValueError, TypeError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: damaged: {error}") from error
            parameters_chain = line.parameters_chain or parameters_chain
            before = line
            yield line


def _parsed(text: bytes, parameters: int) -> Line:
    """Raises ValueError, KeyError or TypeError for what is no line of the file."""
    content = json.loads(text.decode())
    if not isinstance(content, dict):
        raise TypeError("not an object")
    update, first_sample, samples = (content[key] for key in ("update", "first_sample", "samples"))
    if not all(type(number) is int and number >= 0 for number in (update, first_sample, samples)):
        raise ValueError("update, first_sample and samples must be whole numbers")
    has_parameters = "parameters" in content
    return Line(
        update,
        first_sample,
        samples,
        digest=_bytes_of(content["digest"], 1),
        chain=_bytes_of(content["chain"], 1),
        computed=str(content["computed"]),
        parameters=_bytes_of(content["parameters"], parameters) if has_parameters else None,
        parameters_chain=_bytes_of(content["parameters_chain"], 1) if has_parameters else None,
    )


def _bytes_of(digests: object, count: int) -> bytes:
    if not isinstance(digests, str) or not re.fullmatch(rf"[0-9a-f]{{{_HEX * count}}}", digests):
        raise ValueError(f"expected {_HEX * count} hex digits where {str(digests)[:20]} is")
    return bytes.fromhex(digests)


def _check_chains(line: Line, before: Line | None, parameters_chain: bytes | None) -> None:
    """Raises ValueError. After a gap nothing is known of the chains; a run may also have begun them anew."""
    update = before.update if before else 0
    if line.update <= update:
        raise ValueError(f"update {line.update} after update {update}")
    if line.update == update + 1 and not line.begins_the_chain:
        chain = before.chain if before else BEGIN
        if line.chain != chained(chain, line.update, line.digest):
            raise ValueError("its chain does not follow from its digest and the line before")
    if line.parameters is not None and parameters_chain is not None:
        known = (parameters_chain, BEGIN)
        if line.parameters_chain not in [chained(c, line.update, line.parameters) for c in known]:
            raise ValueError("its parameters_chain does not follow from those before")
