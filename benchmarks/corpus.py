"""The text that the benchmarks read, lines of a given one or of the demo corpus, shuffled and repeated; and its ids."""

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import ROOT

LANGUAGES = ("ar", "de", "en", "fr", "hi")
# On 0.86 MB of text it gives 18,000 words: tables as large as real ones, if not as the 95,000 words of XLM's.
DEMO_CODES = 20_000
SEED = 0
EOS, UNK = 2, 3


def prepare_demo(folder: Path) -> Path:
    """Tokenises and splits the demo corpus; returns the folder of codes, vocab_mlm, train.LG and tokenised/train.LG."""
    text = ROOT / "tests" / "data" / "demo"
    destination = folder / "prepared"
    prefs = [f"--{split}pref={text / split}" for split in ("train", "valid", "test")]
    command = [sys.executable, "-m", "xlm_ds.prepare", f"--langs={','.join(LANGUAGES)}", *prefs]
    command += [f"--destdir={destination}", f"--bpe-codes={DEMO_CODES}"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return destination


def demo_texts(folder: Path) -> list[Path]:
    return [folder / f"train.{language}" for language in LANGUAGES]


def lines_of(texts: Sequence[Path]) -> list[bytes]:
    return [line + b"\n" for text in texts for line in text.read_bytes().splitlines()]


def write_repeated(lines: Sequence[bytes], size: int, output: Path) -> str:
    """All lines in an order of their own each time, until there are `size` bytes: no slice is of one language.

    Returns what was done, to be shown.
    """
    order, generator, written = list(lines), random.Random(SEED), 0
    with output.open("wb") as file:
        while written < size:
            generator.shuffle(order)
            for line in order:
                written += file.write(line)
                if written >= size:
                    break
    unique = sum(map(len, lines)) / 1e6
    return f"{len(lines):,} lines, {unique:.2f} MB, shuffled and repeated or cut to {written / 1e6:.2f} MB"


def write_slice(text: Path, size: int, output: Path) -> int:
    """The first lines, about `size` bytes; returns how many."""
    with text.open("rb") as file:
        content = file.read(size) + file.readline()
    output.write_bytes(content)
    return len(content)


def load_symbols(vocabulary: str) -> list[str]:
    """By id."""
    from xlm_ds.dictionary import Dictionary

    return list(Dictionary.load(Path(vocabulary)).symbols)


def ids_of(symbols: Sequence[str]) -> dict[str, int]:
    return {symbol: number for number, symbol in enumerate(symbols)}


def encode_with_dictionary(text: Path, ids: dict[str, int], output: Path, dtype: Any) -> int:
    """The plain loop: a contender, and what all others' ids are compared with. Returns how many ids it wrote."""
    import numpy as np

    get, tokens = ids.get, 0
    with text.open(encoding="utf-8") as lines, output.open("wb") as out:
        for line in lines:
            encoded = [get(word, UNK) for word in line.split()]
            encoded.append(EOS)
            out.write(np.array(encoded, dtype).tobytes())
            tokens += len(encoded)
    return tokens


def write_pair(text: Path, dictionary: Any, data: Path, threads: int = 1, bpe: Any = None) -> Any:
    """The .bin `data` and its .idx, by the calls of the core that binarize makes for a text; returns its counts."""
    from xlm_ds import _core

    pieces, mmap, lengths = [_core.Piece(text)], _core.IndexKind.mmap, data.with_suffix(".lengths")
    counts = _core.encode_text(
        pieces, dictionary, mmap, data, lengths, threads, _core.Progress(), bpe=bpe
    )
    _core.write_text_index(data.with_suffix(".idx"), mmap, len(dictionary), lengths)
    return counts


def check_ids(output: Path, dtype: Any, expected: str, tokens: int) -> None:
    """`output` has that many ids, and they are those of the file `expected` (uint32) from its first on."""
    import numpy as np

    found, ids = np.fromfile(output, dtype), np.fromfile(expected, np.uint32, tokens)
    assert len(found) == tokens, f"{output}: {len(found)} ids, expected {tokens}"
    assert np.array_equal(found, ids), f"{output}: other ids than the plain loop's"
