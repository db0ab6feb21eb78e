"""docs/troubleshooting.md has every error that we raise, in its own words, and none that we do not.

An error is read from the source that raises it: its literal words, with … for what varies. Where all of it is computed
(another function's sentence), the entries are written by hand, and only their words are looked for in the source.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/troubleshooting.md"

RAISED = ("InputError", "Fault", "LaterFormat", "ImportError", "OSError", "self._refuse")
VALUES_OF_FLAGS = ("steps.py", "digests.py")  # whose ValueErrors become part of a sentence
VARIES = "…"
LEAST_LETTERS = 8  # a template with fewer says nothing by itself
# An entry is a bullet that begins with the error as code; what it says of it follows, indented.
ENTRY = re.compile(r"^- (`+) ?(?P<error>.+?) ?\1$\n(?P<meaning>(?:  \S.*\n)*)", re.MULTILINE)
STRING = r'"(?:[^"\\\n]|\\.)*"'


def test_every_error_has_an_entry() -> None:
    entries = list(entries_of_page())
    missing = [
        f"{where}: {template}"
        for where, template in errors_raised()
        if not any(as_pattern(template).fullmatch(entry) for entry in entries)
    ]
    assert not missing, f"add to {PAGE.name}:\n" + "\n".join(missing)


def test_no_entry_outlives_its_error() -> None:
    words = list(literals_of_source())
    stale = [
        entry
        for entry in entries_of_page()
        if not all(any(part in literal for literal in words) for part in parts_of(entry))
    ]
    assert not stale, f"in no source any more; change {PAGE.name}:\n" + "\n".join(stale)


def test_every_entry_is_there_once_and_says_something() -> None:
    entries = list(entries_of_page())
    assert len(entries) > 400
    assert len(entries) == len(set(entries))
    page = PAGE.read_text(encoding="utf-8")
    assert all(len(match["meaning"].split()) >= 5 for match in ENTRY.finditer(page))
    assert len(entries) == len(re.findall(r"^- `", page, re.MULTILINE)), "an entry of another form"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            'raise InputError(f"{path}: is there already; delete {it}")',
            "…: is there already; delete …",
        ),
        ('raise InputError("all of " + name + f"{a}{b} is literal")', "all of … is literal"),
        (
            "raise InputError(f\"{path}: the model has {'a' if x else 'no'} norm\")",
            "…: the model has … norm",
        ),
    ],
)
def test_an_error_is_read_from_its_source(code: str, expected: str) -> None:
    assert [template for _, template in errors_in_python(code)] == [expected]


def entries_of_page() -> Iterator[str]:
    return (match["error"] for match in ENTRY.finditer(PAGE.read_text(encoding="utf-8")))


def errors_raised() -> Iterator[tuple[str, str]]:
    """(where, template) of each, but for those whose words are all computed."""
    for path in sorted((ROOT / "xlm_ds").glob("*.py")):
        raised = (*RAISED, "ValueError") if path.name in VALUES_OF_FLAGS else RAISED
        for line, template in errors_in_python(path.read_text(encoding="utf-8"), raised):
            yield f"{path.name}:{line}", template
    for path in sorted((ROOT / "csrc").rglob("*.?pp")):
        if "tests" not in path.parts:
            for line, template in errors_in_cpp(path.read_text(encoding="utf-8")):
                yield f"{path.name}:{line}", template


def errors_in_python(source: str, raised: Sequence[str] = RAISED) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in raised:
            before = VARIES if ast.unparse(node.func) in ("self._refuse", "ValueError") else ""
            template = joined(before + template_of(node.args[0]))
            if len(re.findall("[a-z]", template)) >= LEAST_LETTERS:
                yield node.lineno, template


def template_of(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(template_of, values))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template_of(left) + template_of(right)
    return VARIES


def errors_in_cpp(source: str) -> Iterator[tuple[int, str]]:
    for match in re.finditer(
        r"(?:throw InputError|\brefuse)\(((?:" + STRING + r"|[^;\"])*)\);", source
    ):
        literal = re.compile(rf"(?:{STRING}\s*)+")
        template = joined(VARIES + VARIES.join(map(unquoted, literal.findall(match[1]))) + VARIES)
        if match[1].lstrip().startswith('"'):
            template = template.removeprefix(VARIES)
        if match[1].rstrip().endswith('"'):
            template = template.removesuffix(VARIES)
        if len(re.findall("[a-z]", template)) >= LEAST_LETTERS:
            yield source.count("\n", 0, match.start()) + 1, template


def unquoted(literals: str) -> str:
    return "".join(literal[1:-1].replace(r"\"", '"') for literal in re.findall(STRING, literals))


def joined(template: str) -> str:
    return re.sub(f"{VARIES}+", VARIES, template)


def as_pattern(template: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, template.split(VARIES))))


def parts_of(entry: str) -> list[str]:
    return [part for part in entry.split(VARIES) if len(re.findall("[a-z]", part)) >= LEAST_LETTERS]


def literals_of_source() -> Iterator[str]:
    for path in (ROOT / "xlm_ds").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield template_of(node)
    for path in (ROOT / "csrc").rglob("*.?pp"):
        for match in re.finditer(rf"(?:{STRING}\s*)+", path.read_text(encoding="utf-8")):
            yield unquoted(match[0])
