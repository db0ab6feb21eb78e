"""Dictionary.load on mutated files: it refuses or accepts what fairseq does, and what it accepts survives being saved.

    python tests/fuzz_dictionary.py --runs 10000000 --seed 1

The same inputs for the same seed. What breaks a law ends the program with its traceback and the input.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from xlm_ds.dictionary import OVERWRITE, SPECIAL_SYMBOLS, Dictionary
from xlm_ds.log import InputError

LONGEST = 400  # bytes
POOL = 300  # inputs to mutate
SEEDS = (
    b"the 10\ncat 3\nsat 1\n",
    f"a 3\r\nb 2\ra 1 {OVERWRITE}\n<unk> 5 {OVERWRITE}\n".encode(),
    "two words 3\n  1_0\n\u00a0 +5\nकमल \u0661\u0662\nx -3".encode(),
)
TOKENS = (
    *(b" ", b"\n", b"\r", b"\r\n", b"\t", b"\0", b"\xff", b"\x1c", b"1", b"_", b"-", b"."),
    *("\u0085".encode(), "\u2028".encode(), "\u3000".encode(), "\u0663".encode(), "\ufeff".encode()),
    *(b"a 1\n", b" 7\n", b"<s>", b"</s> 1", b"9" * 30, OVERWRITE.encode(), f" {OVERWRITE}\n".encode()),
)  # fmt: skip


def fuzz(runs: int, seed: int, folder: Path) -> tuple[int, int]:
    """Tries `runs` files in `folder`; returns how many were accepted, and how many refused."""
    generator = random.Random(seed)
    pool = list(SEEDS)
    path = folder / "dict.txt"
    accepted = 0
    for _ in range(runs):
        content = mutated(generator, pool)
        try:
            taken = holds(path, content)
        except Exception:
            sys.stderr.write(f"broken by {content!r}\n")
            raise
        accepted += taken
        if taken and len(pool) < POOL:
            pool.append(content)
        elif taken:
            pool[generator.randrange(len(SEEDS), POOL)] = content
    return accepted, runs - accepted


def mutated(generator: random.Random, pool: list[bytes]) -> bytes:
    content = bytearray(generator.choice(pool))
    for _ in range(generator.randint(1, 4)):
        at = generator.randint(0, len(content))
        length = generator.randint(1, 8)
        match generator.randrange(5):
            case 0:
                content[at:at] = generator.choice(TOKENS)
            case 1:
                content[at:at] = generator.randbytes(1)
            case 2:
                del content[at : at + length]
            case 3:
                content[at : at + length] = generator.choice(pool)[
                    at : at + generator.randint(1, 40)
                ]
            case _:
                content[at:at] = content[: generator.randint(0, len(content))][-length:]
    return bytes(content[:LONGEST])


def holds(path: Path, content: bytes) -> bool:
    """Whether the file is accepted; an AssertionError if a law does not hold."""
    path.write_bytes(content)
    expected = rows_of(content)
    dictionary = loaded(path)
    if isinstance(dictionary, InputError):
        assert expected is None, "fairseq accepts it"
        message = str(dictionary)
        assert "\n" not in message
        assert message.startswith(f"{path}, line ")
        return False
    rows = list(zip(dictionary.symbols, dictionary.counts, strict=True))[len(SPECIAL_SYMBOLS) :]
    assert rows == expected
    dictionary.save(path)
    assert loaded(path) == dictionary
    return True


def loaded(path: Path) -> Dictionary | InputError:
    try:
        return Dictionary.load(path)
    except InputError as error:
        return error


def rows_of(content: bytes) -> list[tuple[str, int]] | None:
    """(symbol, count) of every row by fairseq's rules; None where it raises."""
    try:
        text = content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        rows: list[tuple[str, int]] = []
        known = set(SPECIAL_SYMBOLS)
        for line in text.removesuffix("\n").split("\n") if text else []:
            symbol, field = line.rstrip().rsplit(" ", 1)
            overwrite = field == OVERWRITE
            if overwrite:
                symbol, field = symbol.rsplit(" ", 1)
            rows.append((symbol, int(field)))
            if symbol in known and not overwrite:
                return None
            known.add(symbol)
    except ValueError:
        return None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        start = time.monotonic()
        accepted, refused = fuzz(arguments.runs, arguments.seed, Path(folder))
        taken = time.monotonic() - start
    sys.stdout.write(
        f"dict.txt: {arguments.runs} inputs of seed {arguments.seed} in {taken:.0f} s "
        f"({arguments.runs / taken:.0f} a second): {accepted} accepted, {refused} rejected, 0 failed\n"
    )


if __name__ == "__main__":
    main()
