"""The contract of the C++ core: every entry of csrc/bindings/module.cpp, with shapes, dtypes and errors.

Every function releases the interpreter's lock. A file that cannot be opened raises OSError; wrong content
raises InputError with one sentence; an argument that no caller of ours gives, ValueError or IndexError.
Arrays that are filled belong to the caller: C-contiguous, int64, never converted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

StrPath: TypeAlias = Path | str

class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence, to be shown as it is."""

class Bpe:
    """Byte pair encoding as fastBPE applies it; words end at 0x20 and 0x0A only.

    Immutable: any number of threads may use one.
    """

    def __init__(self, codes_path: StrPath, vocab_path: StrPath | None = None) -> None:
        """Reads codes (lines `left right count`) and a vocabulary (lines `word count`).

        With a vocabulary, merges are undone until every piece is in it.
        Raises InputError for a malformed or repeated line.
        """

    def apply_line(self, line: bytes) -> bytes:
        """`line` with every word split into pieces joined by `@@ `; blanks are copied unchanged. Keeps the lock."""

    def apply_file(self, input_path: StrPath, output_path: StrPath, threads: int = 1) -> None:
        """`apply_line` on a whole file, written in place; the bytes do not depend on `threads`."""

def count_words(paths: Sequence[StrPath], output_path: StrPath, threads: int = 1) -> int:
    """Writes lines `word count` of all files together, most frequent first, then by bytes; returns how many.

    The bytes do not depend on `threads`; each holds the distinct words it has met.
    """

BOS: Final = 0
PAD: Final = 1
EOS: Final = 2
UNK: Final = 3
MASK: Final = 4
SPECIALS: Final = 5
"""How many special ids there are; words have the ids from here on."""

class Dictionary:
    """Symbols to ids: `symbols[id]`; of a symbol that is there twice the later id counts."""

    def __init__(self, symbols: Sequence[str]) -> None: ...
    def __len__(self) -> int: ...

class IndexKind:
    name: str
    mmap: Final[IndexKind]
    lazy: Final[IndexKind]
    megatron: Final[IndexKind]

class Progress:
    """How far a call on another thread is; `cancel` makes it return early, with worthless files."""

    def __init__(self) -> None: ...
    @property
    def done_bytes(self) -> int: ...
    def cancel(self) -> None: ...

class TextCounts:
    @property
    def lines(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def unknown(self) -> int: ...
    @property
    def blank_lines(self) -> int: ...
    @property
    def literal_specials(self) -> int: ...
    @property
    def by_id(self) -> NDArray[np.uint64]:
        """(V,)"""

STANDARD_INPUT: Final = "-"
"""The path under which a Piece is standard input."""

class Piece:
    """Bytes [begin, end) of a file (default: all of it), cut only after a line feed."""

    def __init__(self, path: StrPath, begin: int = 0, end: int = ...) -> None: ...

def encode_text(
    text: Sequence[Piece],
    dictionary: Dictionary,
    kind: IndexKind,
    data_path: StrPath,
    lengths_path: StrPath,
    threads: int,
    progress: Progress,
    chunk_bytes: int = ...,
    bpe: Bpe | None = None,
) -> TextCounts:
    """Writes a .bin and the lengths of its lines (native u32), in place.

    With `bpe`, of what its `apply_file` would make of the text. The bytes do not depend on `threads` or `chunk_bytes`;
    those of a text's parts, one file after another, are those of the text. Raises InputError for text that is not
    UTF-8, with file, line and byte (of standard input the byte only), or that has become shorter than `end`.
    """

def write_text_index(
    index_path: StrPath, kind: IndexKind, dictionary_size: int, lengths_path: StrPath
) -> None:
    """Writes the .idx that belongs to a file of line lengths."""

def count_text_words(
    text: Sequence[Piece],
    threads: int,
    progress: Progress,
    chunk_bytes: int = ...,
    bpe: Bpe | None = None,
) -> list[tuple[str, int]]:
    """Every distinct word of a text, or of what `bpe` makes of it, and how often it occurs, in no particular order."""

class BreakMode:
    """none: blocks run across lines. eos: one line per block. complete: as many whole lines as fit. complete_doc: the
    same, but a line of one token ends a document and is in no block. A line longer than a block is cut."""

    none: Final[BreakMode]
    eos: Final[BreakMode]
    complete: Final[BreakMode]
    complete_doc: Final[BreakMode]

class TokenDataset:
    """A mapped .bin/.idx pair, seen as blocks of at most block_size tokens. Immutable.

    Opening is O(1) in modes none and eos; in the others it checks every line and builds a table of 8 bytes a block.
    """

    def __init__(self, prefix: StrPath, *, mode: BreakMode, block_size: int) -> None:
        """Opens `prefix`.bin and `prefix`.idx. Raises OSError; InputError if they are not a pair of binarized text."""

    @property
    def sequences(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def table_bytes(self) -> int: ...
    def block_length(self, block: int) -> int:
        """Tokens of a block. Raises IndexError beyond the last; InputError if the .idx is damaged there."""

    def fill_block(self, block: int, *, vocab_size: int, out: NDArray[np.int64]) -> int:
        """Writes the block's ids to the front of `out` (block_size,) and returns how many they are.

        Raises as block_length; InputError if an id is not below vocab_size.
        """

    def count_cut(self) -> int:
        """Lines longer than a block (0 in mode none). O(lines)."""

class Stream:
    """What samples are drawn from: the blocks of a language, or pairs of lines that translate each other.

    Keeps its datasets. A row is an eos and a block; of a pair, an eos, the first line, an eos, the second line, each
    line with the eos that ends it. If that is longer than block_size + 1, the lines are cut and keep that eos: each to
    half of the room, and what one does not need of its half goes to the other.
    """

    @overload
    def __init__(self, blocks: TokenDataset, language: int) -> None: ...
    @overload
    def __init__(
        self, first: TokenDataset, language: int, second: TokenDataset, second_language: int
    ) -> None:
        """Both in break mode eos. Raises ValueError unless they have as many lines and one block size, at least 5."""

    @property
    def blocks(self) -> int:
        """Blocks, or pairs of lines."""

    @property
    def block_size(self) -> int: ...
    def count_cut(self) -> int:
        """Lines (0 in mode none), or pairs of lines, that lose tokens. O(lines)."""

class Dtype:
    """The integer types that ids are stored in; uint8 … int64."""

    @property
    def name(self) -> str: ...

def dtype_to_write(kind: IndexKind, dictionary_size: int) -> Dtype:
    """The type that fairseq (or Megatron-LM) itself would store ids in."""

class Pair:
    """A .bin/.idx pair seen as lines; opening is O(1). Raises as TokenDataset does."""

    def __init__(self, prefix: StrPath) -> None: ...
    @property
    def kind(self) -> IndexKind: ...
    @property
    def dtype(self) -> Dtype: ...
    @property
    def lines(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def documents(self) -> int:
        """Of Megatron-LM's layout; 0 in the others."""

    def tokens_before(self, line: int) -> int:
        """Tokens before a line; `line` may be `lines`, then all. Raises InputError if the .idx is damaged there."""

    def lines_within(self, tokens: int) -> int:
        """How many lines from the front end within so many tokens. O(log lines)."""

    def line(self, number: int) -> NDArray[np.int64]:
        """Its ids, eos included. Raises IndexError beyond the last; InputError if the .idx is damaged there."""

    def count_lengths(self) -> list[tuple[int, int]]:
        """Every length in tokens that occurs, ascending, and of how many lines. O(lines).

        Raises InputError if one is negative, or greater than the .bin has tokens.
        """

    def count_ids(self, vocab_size: int, progress: Progress) -> NDArray[np.uint64]:
        """How often each id occurs, (vocab_size,). O(tokens). Raises InputError naming the first bad id's byte."""

def verify_pair(pair: Pair, vocab_size: int, progress: Progress) -> TextCounts:
    """Checks every start, length and id, and that every line ends with eos. O(bytes), in bounded memory.

    Raises InputError naming file and byte of the first that is wrong. Of the result, `unknown` includes words spelt
    <unk> and `literal_specials` leaves them out: the ids do not tell.
    """

class PairWriter:
    """Writes a new pair in place from lines of others, in bounded memory.

    `lengths_path` gets the lines' lengths; it is the caller's to remove.
    """

    def __init__(
        self,
        data_path: StrPath,
        lengths_path: StrPath,
        kind: IndexKind,
        dtype: Dtype,
        vocab_size: int,
    ) -> None: ...
    def append(self, pair: Pair, first: int, end: int, progress: Progress) -> None:
        """Appends lines [first, end), checked as verify_pair does. Returns early if cancelled."""

    def append_ids(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Appends lines of these lengths, eos included. Raises ValueError unless they are lines of the dictionary."""

    def finish(self, index_path: StrPath) -> TextCounts:
        """Writes the .idx; to be called once, at the end. Counts as verify_pair does."""

class Permutation:
    """A random permutation of [0, size), 1 <= size <= 2^63, computed in O(1) memory and time; keeps the lock."""

    def __init__(self, *, key: int, size: int) -> None: ...
    def __call__(self, index: int) -> int:
        """Where `index` goes. Raises IndexError unless 0 <= index < size."""

class Order:
    """Sample number -> (stream, pass, block). Immutable."""

    def __init__(
        self, *, seed: int, segments: Sequence[tuple[int, Sequence[int]]], blocks: Sequence[int]
    ) -> None:
        """`segments`: (first sample, weights); the first begins at 0, the others in ascending order below 2^62.

        Per stream: a weight from 1 to 2^32 in every segment and a number of blocks, at least 1. Else ValueError.
        """

    def fill_samples(
        self,
        first: int,
        *,
        streams: NDArray[np.int64],
        passes: NDArray[np.int64],
        blocks: NDArray[np.int64],
    ) -> None:
        """Fills the columns, all (n,), with samples first, first + 1, … below 2^62."""

def masked_count(mask_ratio: float, tokens: int) -> int:
    """ceil(mask_ratio * tokens): masked positions of a block. Raises InputError unless 0 <= mask_ratio <= 1."""

def fill_batch(
    streams: Sequence[Stream | None],
    *,
    numbers: NDArray[np.int64],
    passes: NDArray[np.int64],
    blocks: NDArray[np.int64],
    seed: int,
    mask_ratio: float,
    vocab_size: int,
    input_ids: NDArray[np.int64],
    languages: NDArray[np.int64],
    second_languages: NDArray[np.int64],
    second_starts: NDArray[np.int64],
    masked_positions: NDArray[np.int64],
    targets: NDArray[np.int64],
    word_goes_on: NDArray[np.uint64] | None = None,
) -> tuple[bool, bool]:
    """Gathers and masks the blocks named by numbers (of streams), passes, blocks (B,).

    Returns whether some row is padded, and whether some row is a pair.

    With T = block_size + 1 and K = masked_count(mask_ratio, block_size), it fills input_ids (B, T) with eos, the masked
    block, PAD; languages (B,); second_languages and second_starts (B,), of the second half of a pair's row, -1 and T
    where there is none; masked_positions (B * K,) with indices into the B * T ids, ascending within a row, and where a
    short row has fewer, with that of the row's eos; targets (B * K,) with what was there, and PAD for those.
    With `word_goes_on`, bit i % 64 of number i // 64 for every id i, whole words are masked, the last one cut to what
    is left: a token whose bit is set is of one word with the next, unless that is eos.
    Raises InputError for a damaged block, an id beyond the dictionary, or masking that cannot be done.
    """

def count_targets(
    streams: Sequence[Stream | None],
    *,
    numbers: NDArray[np.int64],
    passes: NDArray[np.int64],
    blocks: NDArray[np.int64],
    mask_ratio: float,
) -> int:
    """Targets of such a batch that are not filled up. Reads lengths only."""
