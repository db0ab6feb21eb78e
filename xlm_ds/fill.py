"""The best words for the masked positions of texts.

python -m xlm_ds.fill run --language en "Where is the <mask>?"
python -m xlm_ds.fill run/checkpoint_last --language hi < lines.txt
"""

import io
import sys
from collections.abc import Sequence

from xlm_ds.config import FillConfig
from xlm_ds.flags import before_slow_imports, parse
from xlm_ds.log import EXIT_OK, InputError, run_stage

if __name__ == "__main__":
    before_slow_imports(FillConfig, description=__doc__)  # before torch is imported

from xlm_ds.pretrained import Candidate, Pretrained


def table(filled: Sequence[Sequence[Sequence[Candidate]]]) -> str:
    """By text, mask of it and candidate for that: a line each, as fixed-width text; the word last."""
    lines = [f"{'text':>4} {'mask':>4} {'percent':>8}  word"]
    lines += [
        f"{text:>4} {mask:>4} {100 * candidate.probability:>8.3f}  {candidate.piece}"
        for text, masks in enumerate(filled, start=1)
        for mask, candidates in enumerate(masks, start=1)
        for candidate in candidates
    ]
    return "\n".join(lines)


def lines_of_standard_input() -> list[str]:
    """Raises InputError if it is not UTF-8."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        return [line.rstrip("\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: byte {error.start} is not UTF-8; convert it") from error


def main(argv: Sequence[str]) -> int:
    config = parse(FillConfig, argv, description=__doc__)
    texts = config.texts or tuple(lines_of_standard_input())
    if not texts:
        raise InputError(
            "there is no text; give some after the checkpoint, or lines on standard input"
        )
    model = Pretrained.load(config.checkpoint)
    filled = [model.fill(text, config.language, config.top) for text in texts]
    sys.stdout.write(table(filled) + "\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_stage("fill", main, log_to=sys.stderr))  # the table alone is the output
