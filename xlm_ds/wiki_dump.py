"""A dump of Wikipedia to plain text, one article at a time: memory does not grow with the dump.

dump = Path("hiwiki-latest-pages-articles.xml.bz2")
wiki = read_wiki(dump)
for page in read_pages(dump):
    if page.is_article:
        article_lines(page.wikitext, wiki.unshown)      # ["A paragraph.", "Another one.", "An item of a list"]

Wikitext is read by mwparserfromhell (pip install 'xlm_ds[wiki]'), XML by the standard library.
"""

import bz2
import contextlib
import importlib.metadata
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn
from xml.etree.ElementTree import Element, ParseError, iterparse
from xml.parsers.expat import ExpatError, ParserCreate, errors

from tqdm import tqdm

from xlm_ds.files import CHUNK_CHARACTERS, compressed_text, naming
from xlm_ds.log import InputError

_UNSHOWN = {"14", "6", "-2"}  # numbers of the namespaces of categories, files and media
# What the canonical names are in every wiki's files, whatever its own are (MediaWiki's namespaces).
_CANONICAL_NAMES = {"category", "file", "image", "media"}

# Elements whose content is no running text. Tables are elements of mwparserfromhell too.
_NO_TEXT = re.compile(
    "categorytree|ce|chem|gallery|graph|hiero|imagemap|indicator|inputbox|mapframe|maplink|math|ref|references|score|"
    "script|section|source|style|syntaxhighlight|table|templatedata|templatestyles|timeline"
)
_BLOCKS = re.compile("blockquote|center|d[dlt]|div|h[1-6r]|li|[ou]l|p|poem|pre|table")

# mwparserfromhell 0.7.2 reads on to the end from each that is not closed: 3,000 times `{{a|` took 5 seconds, 36 million
# characters (AMD EPYC, 2026-11-23). Not a limit of seconds, so that the text is the same on every machine.
_UNCLOSED_CHARACTERS = 30_000_000
_PAIRS = (("{{", "}}"), ("{|", "|}"), ("[", "]"))

# XML has no such character, so no text has it: it begins a list's item, which ends at its line's end.
_ITEM = "\0"

PROLOG_BYTES = 1 << 12  # of a dump, in which the first element begins

_PREFIX = re.compile(r"([^:\[\]{}|]+):")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*|simple")
_IMAGE = re.compile(r":.*\.(jpe?g|png|svg|gif|webp|tiff?|djvu|pdf|og[gav]|webm)\s*$", re.IGNORECASE)
_SWITCH = re.compile(r"__[^\W\d_]+__")  # __NOTOC__, in the wiki's own language too
_LEFT_OVER = re.compile(r"\{\{|\}\}|\{\||\|\}|^[|!]")
_LEFT_OVER_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_LEFT_OVER_MARKS = re.compile(r"\[\[|\]\]|'{2,}")
# What a template or a footnote that is gone leaves inside and before punctuation.
# U+FF08, FF09, FF0C, FF1B: the wide forms of ( ) , ; and U+3001, U+3002: the Chinese comma and full stop.
_AFTER_OPENING = re.compile(r"([(\uff08])[\s,;:\u3001\uff0c\uff1b]+")
_BEFORE_CLOSING = re.compile(r"[\s,;:\u3001\uff0c\uff1b]+([)\uff09])")
_NOTHING_INSIDE = re.compile(r"\s*(\(\)|\uff08\uff09)")
_BLANK_BEFORE_STOP = re.compile(r" +([,.](?=\s|$)|[\u3001\u3002\uff0c])")
# Chinese and other languages with several scripts: -{one text}-, -{zh-hans:one; zh-hant:another}-.
_VARIANTS = re.compile(r"-\{(?!\{)(?:([^|{}]*)\|)?([^{}]*)\}-(?!\})")
_VARIANT = re.compile(r"\s*[a-z]{2,3}(?:-[a-z]+)*\s*:([^;]*)")


def parser_version() -> str:
    """Raises InputError if mwparserfromhell is not there."""
    try:
        return importlib.metadata.version("mwparserfromhell")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            "--wiki-dump: mwparserfromhell, which reads wikitext, is not installed; pip install 'xlm_ds[wiki]'"
        ) from error


# ------------------------------------------------------------------------------------------- pages


class Page(NamedTuple):
    is_article: bool  # of the main namespace, wikitext, and no redirect
    wikitext: str


class Wiki(NamedTuple):
    language: str | None  # as the dump says it, de or zh-Hans; None where it does not
    unshown: frozenset[str]  # what links to categories and files begin with, in lower case


def read_wiki(path: Path) -> Wiki:
    """What the dump's begin says. Raises as read_pages."""
    siteinfo, _, language = next(_elements(path), (None, 0, None))
    namespaces = () if siteinfo is None else siteinfo.iterfind("{*}namespaces/{*}namespace")
    own = {n.text.lower() for n in namespaces if n.get("key") in _UNSHOWN and n.text}
    return Wiki(language, frozenset(_CANONICAL_NAMES | own))


def read_pages(path: Path) -> Iterator[Page]:
    """The pages of pages-articles.xml.bz2, also multistream, or of the XML itself. Shows progress.

    Raises InputError if it ends too early, is damaged or is something else.
    """
    size = path.stat().st_size
    with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
        for element, at, _ in _elements(path):
            if _name(element) == "page":
                yield _page(element)
            bar.update(at - bar.n)


def _elements(path: Path) -> Iterator[tuple[Element, int, str | None]]:
    """What the dump consists of, siteinfo and pages, each with the place in the file up to which it is read and the
    wiki's language.
    """
    with path.open("rb") as raw, naming(path, "read"), _naming_damage(path):
        _check_prolog(_content(raw, path), path)
        events = iterparse(_content(raw, path), ("start", "end"))
        _, root = next(events)
        if _name(root) != "mediawiki":
            raise InputError(f"{path}: begins with <{_name(root)}>; {_EXPECTED}")
        language = root.get(_XML_LANG)
        for event, element in events:
            if event == "end" and _name(element) in ("siteinfo", "page"):
                yield element, raw.tell(), language
                root.clear()  # or every page would leave an empty element


_EXPECTED = (
    "expected a dump of a wiki, as LGwiki-latest-pages-articles.xml.bz2 of dumps.wikimedia.org"
)
_XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_HTML = re.compile(rb"\s*<(!doctype\s+html|html)\b", re.IGNORECASE)


def _content(raw: IO[bytes], path: Path) -> IO[bytes] | bz2.BZ2File:
    raw.seek(0)
    start = raw.read(256).removeprefix(BOM_UTF8)
    raw.seek(0)
    if start.startswith(b"BZh"):
        return bz2.open(raw)
    if not start:
        raise InputError(f"{path}: is empty; {_EXPECTED}")
    if _HTML.match(start):
        raise InputError(f"{path}: is a web page, perhaps a server's error; {_EXPECTED}")
    if compressed := compressed_text(path, start):
        raise InputError(f"{compressed}, or give the dump as .xml.bz2")
    if start.lstrip().startswith(b"<"):
        return raw
    raise InputError(f"{path}: begins with {start[:8]!r}; {_EXPECTED}")


def _check_prolog(content: IO[bytes] | bz2.BZ2File, path: Path) -> None:
    """Refuses a document type, which no dump has: by its entities 1 kB of XML are gigabytes of text.

    expat 2.4 and later let text be 100 times what is read, 8 MiB before it is: for a file of gigabytes no limit.
    """
    parser = ParserCreate()
    begun: list[str] = []

    def refuse(name: str, *_: object) -> NoReturn:
        raise InputError(
            f"{path}: declares a document type ({name}), which no dump does; {_EXPECTED}"
        )

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda name, _: begun.append(name)
    while not begun and (block := content.read(PROLOG_BYTES)):
        parser.Parse(block)


_EARLY_ENDS = {
    errors.codes[error]
    for error in (
        *(errors.XML_ERROR_NO_ELEMENTS, errors.XML_ERROR_UNCLOSED_TOKEN),
        *(errors.XML_ERROR_PARTIAL_CHAR, errors.XML_ERROR_UNCLOSED_CDATA_SECTION),
    )
}


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    again = "download it again and compare its checksum with the one that is published"
    try:
        yield
    except EOFError as error:
        raise InputError(f"{path}: ends too early; {again}") from error
    except (ParseError, ExpatError) as error:
        what = "ends too early" if error.code in _EARLY_ENDS else "is damaged"
        raise InputError(f"{path}: {what} ({error}); {again}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"{path}: is damaged ({str(error).lower()}); {again}") from error


def _name(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def _page(element: Element) -> Page:
    revision = element.find("{*}revision")
    is_article = (
        element.findtext("{*}ns") == "0"
        and element.find("{*}redirect") is None
        and revision is not None
        and revision.findtext("{*}model", "wikitext") == "wikitext"
    )
    text = revision.findtext("{*}text") if is_article and revision is not None else None
    return Page(is_article, text or "")


def chunks_of_articles(pages: Iterable[Page], counts: dict[str, int]) -> Iterator[list[str]]:
    """The wikitext of articles, some at a time; counts all pages, and articles."""
    chunk: list[str] = []
    size = 0
    for page in pages:
        counts["pages"] += 1
        if page.is_article:
            counts["articles"] += 1
            chunk.append(page.wikitext)
            size += len(page.wikitext)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


# ------------------------------------------------------------------------------------------- text


def texts_of_articles(wikitexts: list[str], unshown: frozenset[str]) -> list[list[str]]:
    return [article_lines(wikitext, unshown) for wikitext in wikitexts]


def article_lines(wikitext: str, unshown: frozenset[str]) -> list[str]:
    """The paragraphs and the items of lists, each a line with text; without headings, tables, templates, footnotes,
    pictures, categories and formulas. None if too much markup is never closed.
    """
    import mwparserfromhell

    if sum(_unclosed(wikitext, *pair) for pair in _PAIRS) * len(wikitext) > _UNCLOSED_CHARACTERS:
        return []
    chosen = _VARIANTS.sub(_first_variant, wikitext)
    parsed = mwparserfromhell.parse(chosen)
    lines = _paragraphs("".join(_text(parsed.nodes, unshown)))
    return [line for line in map(_tidy, lines) if any(map(str.isalpha, line))]


def _unclosed(wikitext: str, opens: str, closes: str) -> int:
    """How many are open at the end; what closes nothing does not count."""
    depth = 0
    for mark in re.findall(f"{re.escape(opens)}|{re.escape(closes)}", wikitext):
        depth = depth + 1 if mark == opens else max(0, depth - 1)
    return depth


def _first_variant(match: re.Match[str]) -> str:
    flags, rule = match.groups()
    if flags is not None and not set(flags.replace(" ", "").split(";")).isdisjoint("HTD-"):
        return ""  # only says how words elsewhere are converted
    variant = _VARIANT.match(rule)
    return variant[1].strip() if variant else rule


def _text(nodes: Iterable[Any], unshown: frozenset[str]) -> Iterator[str]:
    """The text of the nodes of mwparserfromhell in pieces; templates, comments, headings and arguments have none."""
    from mwparserfromhell.nodes import ExternalLink, HTMLEntity, Tag, Text, Wikilink

    for node in nodes:
        if isinstance(node, Text):
            yield _LEFT_OVER_TAG.sub("", str(node.value))
        elif isinstance(node, HTMLEntity):
            character = str(node.normalize())
            yield " " if character.isspace() else character.encode(errors="replace").decode()
        elif isinstance(node, Wikilink):
            if _is_shown(node, unshown):
                if node.text is None:
                    yield str(node.title).strip().removeprefix(":")
                else:
                    yield from _text(node.text.nodes, unshown)
        elif isinstance(node, ExternalLink):
            if node.brackets and node.title is not None:
                yield from _text(node.title.nodes, unshown)
        elif isinstance(node, Tag):
            yield from _text_of_tag(node, unshown)


def _text_of_tag(node: Any, unshown: frozenset[str]) -> Iterator[str]:
    name = str(node.tag).strip().lower()
    if node.wiki_markup and name in ("li", "dt", "dd"):
        yield f"\n{_ITEM}"
        return
    edge = "\n\n" if _BLOCKS.fullmatch(name) else " " if name == "br" else ""
    yield edge
    if not _NO_TEXT.fullmatch(name) and node.contents is not None:
        yield from _text(node.contents.nodes, unshown)
    yield edge


def _is_shown(link: Any, unshown: frozenset[str]) -> bool:
    """Not categories and pictures, which dumps also call by names that they do not list, and not other languages."""
    title = str(link.title)
    prefix = _PREFIX.match(title.strip())
    if prefix is None:  # [[:Category:A]] too, which is a link like any other
        return True
    several = link.text is not None and any("|" in str(text) for text in link.text.filter_text())
    return not (
        prefix[1].strip().lower() in unshown
        or _LANGUAGE.fullmatch(prefix[1].strip())
        or _IMAGE.search(title)
        or several
    )


def _paragraphs(text: str) -> Iterator[str]:
    """Lines that no blank line parts are one paragraph, as on the page; an item of a list is its line only."""
    paragraph: list[str] = []
    for line in text.split("\n"):
        item = _ITEM in line
        plain = line.replace(_ITEM, " ").strip()
        if item or not plain:
            yield " ".join(paragraph)
            paragraph = []
        if _LEFT_OVER.search(plain):  # of a table or template that was never closed
            continue
        if item:
            yield plain
        elif plain:
            paragraph.append(plain)
    yield " ".join(paragraph)


def _tidy(line: str) -> str:
    line = _LEFT_OVER_MARKS.sub("", _SWITCH.sub(" ", line))
    line = _BEFORE_CLOSING.sub(r"\1", _AFTER_OPENING.sub(r"\1", line))
    line = " ".join(_NOTHING_INSIDE.sub("", line).split())
    return _BLANK_BEFORE_STOP.sub(r"\1", line)
