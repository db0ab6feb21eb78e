"""prepare --wiki-dump: an article's text and nothing else, whatever its markup; dumps of any size, none half-read."""

import bz2
import importlib.metadata
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest

from xlm_ds import prepare_record
from xlm_ds.config import PrepareConfig
from xlm_ds.flags import parse
from xlm_ds.log import InputError
from xlm_ds.prepare import prepare
from xlm_ds.wiki_dump import article_lines, read_pages, read_wiki

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
<siteinfo><sitename>Wikipedia</sitename><namespaces>
<namespace key="-2" case="first-letter">Medium</namespace><namespace key="0" case="first-letter" />
<namespace key="1" case="first-letter">Diskussion</namespace><namespace key="6" case="first-letter">Datei</namespace>
<namespace key="14" case="first-letter">Kategorie</namespace></namespaces></siteinfo>
"""
UNSHOWN = frozenset({"category", "datei", "file", "image", "kategorie", "media", "medium"})

ARTICLE = """{{Infobox Ort|name={{lang|de|Bonn}}|karte=[[Datei:Karte.svg|20px]]}}
'''Bonn''' ({{IPA|bɔn}}; {{lang|la|Bonna}}) is a ''city'' on the [[Rhine (river)|Rhine]].<ref name="a">{{cite|b}}
A note.</ref><ref name="a" /> It has 330&nbsp;000 people{{fact}}, and [[museum]]s.
The same paragraph &amp; on. __NOTOC__

{| class="wikitable"
! head
|-
| cell
{| class="nested"
| inner || cell
|}
|}
[[Datei:Bonn.jpg|mini|The [[town hall]] of {{a}}]]
[[Bild:Alt.jpg|mini|hochkant|An alias]] [[File:C.png]]
== History ==
Romans &lt;built&gt; a camp.<!-- a
comment --> More.
* first [http://example.org item]
** second, <math>x^2</math>
# third [http://example.org] http://example.org
: indented
After the list.
<gallery>
A.jpg|A picture
</gallery>
<div style="x">A box.<br />Its end.</div>
[[Kategorie:City]] [[fr:Bonn]]
See [[:Kategorie:City]].
"""
ARTICLE_LINES = [
    "Bonn is a city on the Rhine. It has 330 000 people, and museums. The same paragraph & on.",
    "Romans <built> a camp. More.",
    "first item",
    "second,",
    "third",
    "indented",
    "After the list.",
    "A box. Its end.",
    "See Kategorie:City.",
]


def page(
    text: str, namespace: int = 0, more: str = "", title: str = "A", model: str = "wikitext"
) -> str:
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns><id>1</id>{more}<revision><id>1</id><model>{model}</model>"
        f'<text bytes="1" xml:space="preserve">{escape(text)}</text></revision></page>\n'
    )


PAGES = [
    page(ARTICLE),
    page("Somebody says something.", 1, title="Diskussion:A"),
    page("#REDIRECT [[A]]", more='<redirect title="A" />'),
    page("Der Fluß.\n\nEr fließt."),
    page('{"a": "json"}', model="json"),
    page("{{only templates}}"),
    page("हिन्दी [[भाषा]] है।"),
]
TEXT = ["\n".join(ARTICLE_LINES), "Der Fluß.\nEr fließt.", "हिन्दी भाषा है।"]
DUMP = (HEAD + "".join(PAGES) + "</mediawiki>\n").encode()


@pytest.fixture(scope="module")
def mwparserfromhell() -> Any:
    return pytest.importorskip("mwparserfromhell", reason="needs xlm_ds[wiki]")


def run(dump: str | Path, folder: Path, *more: str) -> dict[str, Any]:
    flags = ["--wiki-dump", str(dump), "--langs", "de", "--destdir", str(folder), "--workers", "1"]
    codes = folder.with_name("codes")
    codes.write_text("a n 1\n", encoding="utf-8")
    prepare(parse(PrepareConfig, [*flags, "--codes", str(codes), *more]))
    record: dict[str, Any] = json.loads((folder / "prepare.json").read_text(encoding="utf-8"))
    return record


# -------------------------------------------------------------------------------------------- text


@pytest.mark.usefixtures("mwparserfromhell")
@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        (ARTICLE, ARTICLE_LINES),
        ("One\ntwo.\n\n\nThree.", ["One two.", "Three."]),
        ("{{never closed | a\n\nText.", ["Text."]),
        ("Text.\n{| never closed\n| row\n! head\nMore.", ["Text. More."]),
        ("[[never closed and ''both\n\nMore ]] text", ["never closed and both", "More text"]),
        ("<b>bold</span> text</div>", ["bold text"]),
        ("<ref>all\n\nText.</ref> End.", ["End."]),
        ("A<ref name= b/> c<ref name=d/> e.<ref name=f>g</ref>", ["A c e."]),
        (":{| class=x\n| a\n|}\nText.", ["Text."]),
        ("* \n----\n3.5 %\n|}\n", []),  # no letter
        ("A [[b|'''c''' {{d}}]] [[|e]] [[f#g]].", ["A c e f#g."]),
        ("A（{{b}}，c）（{{d}}）。", ["A（c）。"]),  # noqa: RUF001
        ("-{zh-hans:软件; zh-hant:軟體}-和-{字}-。-{H|zh-cn:a;zh-tw:b}-", ["软件和字。"]),
        ("x-{{tpl}}-y -{A|zh-cn:c;zh-tw:d}-", ["x--y c"]),
        ("a &#x41; &lt;b&gt; &#xD800; &unknown; &#10; c", None),
        ("{{" * 500 + "[[" * 500 + "<div>" * 500, None),
        ("{{a|" * 20_000 + "Text.", []),  # would take minutes
        ("", []),
    ],
)
def test_the_text_of_an_article(wikitext: str, expected: list[str] | None) -> None:
    lines = article_lines(wikitext, UNSHOWN)
    assert expected is None or lines == expected
    for line in lines:
        assert line == " ".join(line.split())
        assert line.encode()


# ------------------------------------------------------------------------------------------- dumps


@pytest.mark.usefixtures("mwparserfromhell")
@pytest.mark.parametrize("form", ["bz2", "multistream", "xml"])
def test_one_file_of_articles_kept_together(tmp_path: Path, form: str) -> None:
    parts = [HEAD.encode(), *(p.encode() for p in PAGES), b"</mediawiki>\n"]
    content = {
        "bz2": bz2.compress(DUMP),
        "multistream": b"".join(map(bz2.compress, parts)),
        "xml": DUMP,
    }
    dump = tmp_path / "dewiki-latest-pages-articles"
    dump.write_bytes(content[form])
    more = ["--valid-lines", "1", "--test-lines", "1", "--tokenizer", "none"]
    record = run(tmp_path / "{lang}wiki-latest-pages-articles", tmp_path / "D", *more)
    raw = (tmp_path / "D/raw/wiki.de").read_text(encoding="utf-8")
    assert raw == "".join(f"{text}\n\n" for text in TEXT)
    facts = record["files"]["raw/wiki.de"]
    counts = {name: facts[name] for name in ("pages", "articles", "empty", "lines")}
    assert counts == {"pages": 7, "articles": 4, "empty": 1, "lines": 12}
    # Each of three splits has an article of the three.
    splits = [tmp_path / "D/tokenised" / f"{split}.de" for split in ("train", "valid", "test")]
    assert sorted(p.read_text(encoding="utf-8") for p in splits) == sorted(t + "\n" for t in TEXT)
    assert record["splitting"]["split_by"] == "document"


def test_read_once_and_again_when_it_has_changed(tmp_path: Path, mwparserfromhell: Any) -> None:
    assert mwparserfromhell
    dump, folder = tmp_path / "dump.xml.bz2", tmp_path / "D"
    dump.write_bytes(bz2.compress(DUMP))
    more = ["--valid-lines", "1", "--test-lines", "1"]
    run(dump, folder, *more)
    made = (folder / "raw/wiki.de").stat().st_mtime_ns
    run(dump, folder, *more, "--lowercase", "--overwrite")
    assert (folder / "raw/wiki.de").stat().st_mtime_ns == made
    dump.write_bytes(bz2.compress(DUMP.replace(b"Romans", b"Celts")))
    with pytest.raises(InputError, match=r"dump.xml.bz2 has changed"):
        run(dump, folder, *more, "--lowercase")
    run(dump, folder, *more, "--lowercase", "--overwrite")
    assert "Celts" in (folder / "raw/wiki.de").read_text(encoding="utf-8")


@pytest.mark.usefixtures("mwparserfromhell")
def test_two_processes_give_the_same_bytes(tmp_path: Path) -> None:
    dump = tmp_path / "dump.xml"
    many = "".join(page(f"Article {i}.\n\n" + "Text [[a|b]]. " * 200) for i in range(120))
    dump.write_text(HEAD + many + "</mediawiki>", encoding="utf-8")
    for workers in ("1", "2"):
        run(dump, tmp_path / workers, "--workers", workers)
    for name in ("raw/wiki.de", "train.de", "codes"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_names_of_categories_and_files_are_the_wikis(tmp_path: Path) -> None:
    (tmp_path / "dump").write_bytes(DUMP)
    assert read_wiki(tmp_path / "dump").unshown == UNSHOWN


@pytest.mark.usefixtures("mwparserfromhell")
@pytest.mark.parametrize(("language", "is_said"), [("de", False), ("de_AT", False), ("fr", True)])
def test_a_dump_of_another_language_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, language: str, is_said: bool
) -> None:
    dump = tmp_path / "dump"
    dump.write_bytes(DUMP)
    run(dump, tmp_path / "D", "--langs", language)
    said = f"{dump}: says that its language is de, and is read as {language}; stop this if it is the wrong file"
    assert (said in caplog.messages) == is_said


def test_memory_does_not_grow_with_the_dump(tmp_path: Path) -> None:
    """ElementTree keeps an empty element of every page if it is let; so does mwxml 0.3.8: 94 bytes a page."""
    peaks = []
    for pages in (1_000, 10_000):
        dump = tmp_path / f"{pages}.xml"
        dump.write_text(HEAD + page("Text.") * pages + "</mediawiki>", encoding="utf-8")
        tracemalloc.start()
        assert sum(p.is_article for p in read_pages(dump)) == pages
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 9_000 * 8


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("compress", [bz2.compress, bytes])
def test_a_dump_that_ends_too_early(tmp_path: Path, compress: Any) -> None:
    dump = tmp_path / "dump"
    whole = compress(DUMP)
    for size in [*range(6, len(whole) - 20, len(whole) // 40), len(whole) - 20]:
        dump.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"dump: ends too early.*download it again"):
            list(read_pages(dump))
    # Between two streams bz2 sees nothing wrong.
    dump.write_bytes(compress(HEAD.encode()) + compress(PAGES[0].encode()))
    with pytest.raises(InputError, match=r"dump: ends too early \(no element found"):
        list(read_pages(dump))


def test_a_damaged_dump(tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    damaged = bytearray(bz2.compress(DUMP))
    damaged[len(damaged) // 2] ^= 1
    dump.write_bytes(damaged)
    with pytest.raises(InputError, match=r"dump: is damaged \(invalid data stream\); download"):
        list(read_pages(dump))
    dump.write_bytes(DUMP.replace(b"</revision>", b"</page>", 1))
    with pytest.raises(InputError, match=r"dump: is damaged \(mismatched tag: line \d+, column"):
        list(read_pages(dump))


@pytest.mark.usefixtures("mwparserfromhell")
def test_nothing_of_a_damaged_dump_has_a_name(tmp_path: Path) -> None:
    dump = tmp_path / "dump.xml.bz2"
    dump.write_bytes(bz2.compress(DUMP)[:-30])
    with pytest.raises(InputError, match="ends too early"):
        run(dump, tmp_path / "D")
    left = [p.name for p in (tmp_path / "D").rglob("*") if p.is_file()]
    assert set(left) <= {"prepare.json"}
    dump.write_bytes(bz2.compress(DUMP))
    run(dump, tmp_path / "D", "--valid-lines", "1", "--test-lines", "1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "dump: is empty; expected a dump of a wiki"),
        (b"\xef\xbb\xbf", "dump: is empty"),
        (
            b"Not found",
            "begins with b'Not foun'; expected a dump of a wiki, as LGwiki-latest-pages",
        ),
        (
            b"\x1f\x8b\x08gzip",
            r"is compressed; unpack it first \(gunzip\), or give the dump as .xml.bz2",
        ),
        (b"\xfd7zXZ\0", r"\(unxz\)"),
        (b"7z\xbc\xaf\x27\x1c", r"\(7z x\)"),
        (b"<html>\r\n<head><title>404", "is a web page, perhaps a server's error; expected a dump"),
        (b"\xef\xbb\xbf \n<!doctype HTML><meta charset=utf-8>", "is a web page"),
        (bz2.compress(b""), "ends too early"),
        (bz2.compress(b"no XML"), "is damaged .syntax error: line 1"),
        (bz2.compress(b"<html></html>"), "begins with <html>; expected a dump"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "dump").write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_pages(tmp_path / "dump"))


GROWTH = """import resource, sys
from pathlib import Path
from xlm_ds.wiki_dump import read_pages
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    list(read_pages(Path(sys.argv[1])))
except ValueError as error:
    print(error)
print(peak() - before)
"""


@pytest.mark.parametrize("compress", [bz2.compress, bytes])
def test_entities_that_multiply_are_not_read(tmp_path: Path, compress: Any) -> None:
    """Ten of ten of ten …: by expat's own limit, 100 times what was read, a dump of gigabytes may be hundreds."""
    inner = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    bomb = f'<?xml version="1.0"?><!-- {"-x" * 9000} --><!DOCTYPE mediawiki [<!ENTITY a0 "lol">{inner}]>'
    dump = tmp_path / "dump"
    dump.write_bytes(compress((bomb + HEAD + page("X").replace("X", "&a9;")).encode()))
    with pytest.raises(InputError, match=r"declares a document type \(mediawiki\), which no dump"):
        read_wiki(dump)
    result = subprocess.run(
        [sys.executable, "-c", GROWTH, str(dump)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    said, kilobytes = result.stdout.splitlines()
    assert "declares a document type" in said
    assert int(kilobytes) < 4 << 10


@pytest.mark.usefixtures("mwparserfromhell")
def test_all_dumps_are_looked_at_before_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_record, "file_sha256", None)
    (tmp_path / "dewiki").write_bytes(DUMP)
    (tmp_path / "frwiki").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(InputError, match="frwiki: is compressed; unpack"):
        run(tmp_path / "{lang}wiki", tmp_path / "D", "--langs", "de,fr")
    assert not [p for p in (tmp_path / "D").rglob("*") if p.is_file()]


@pytest.mark.usefixtures("mwparserfromhell")
def test_a_dump_without_articles(tmp_path: Path) -> None:
    (tmp_path / "dump").write_text(HEAD + PAGES[1] + "</mediawiki>", encoding="utf-8")
    with pytest.raises(InputError, match="no article with text: 1 pages, 0 articles"):
        run(tmp_path / "dump", tmp_path / "D")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--input", "x"], "either --input or --wiki-dump"),
        (["--trainpref", "x"], "either --input or --wiki-dump"),
        (["--testpref", "x"], "--testpref does not go with --wiki-dump"),
        (["--langs", "de,fr"], r"one file for 2 languages; put \{lang\}"),
        (["--wiki-dump", "{lang}wiki.xml"], "dewiki.xml: no such file"),
    ],
)
def test_flags_that_do_not_fit(tmp_path: Path, more: list[str], message: str) -> None:
    (tmp_path / "dump").write_bytes(DUMP)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "dump", tmp_path / "D", *more)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def missing(name: str) -> str:
        if name == "mwparserfromhell":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    (tmp_path / "dump").write_bytes(DUMP)
    with pytest.raises(InputError, match=r"is not installed; pip install 'xlm_ds\[wiki\]'"):
        run(tmp_path / "dump", tmp_path / "D")
