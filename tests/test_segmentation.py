"""zh, ja and th: words found by a library that is named where it is missing, and in what was made with it."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlm_ds.config import PrepareConfig
from xlm_ds.flags import parse
from xlm_ds.log import InputError, logger
from xlm_ds.prepare import prepare
from xlm_ds.tokenisation import (
    PACKAGES,
    PIECE_CHARACTERS,
    Tokenisation,
    segmenter,
    tokenisation_of,
    tokenise_line,
)


def config_of(langs: str, folder: Path, *more: str) -> PrepareConfig:
    flags = ["--input", str(folder / "raw"), "--langs", langs, "--destdir", str(folder / "D")]
    return parse(
        PrepareConfig, [*flags, "--workers", "1", "--bpe-codes", "5", "--duplicates", "keep", *more]
    )


def settings_of(language: str) -> Tokenisation:
    """Of the library that is installed; without one the test is skipped."""
    try:
        return tokenisation_of(config_of(language, Path()))
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _forget_segmenters() -> Iterator[None]:
    segmenter.cache_clear()
    yield
    segmenter.cache_clear()


@pytest.fixture
def version_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], None]:
    """Makes a version of a package seem installed, or none."""
    versions: dict[str, str | None] = {}
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return installed(name)
        found = versions[name]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions.__setitem__


@pytest.fixture
def characters_are_words(
    monkeypatch: pytest.MonkeyPatch, version_of: Callable[[str, str | None], None]
) -> None:
    """In place of rjieba, so that what surrounds it is tested also where it is not."""
    monkeypatch.setitem(sys.modules, "rjieba", SimpleNamespace(cut=list))
    version_of("rjieba", "1")


# ------------------------------------------------------------------------------------ the libraries


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("zh", "他在北京大学学习\uff0c1949年。", "他 在 北京大学 学习 , 1949 年 ."),
        ("zh", "“你好”\uff08Hello World\uff09\u200b3.5元", '" 你好 " ( Hello World ) 3.5 元'),
        ("ja", "東京都に住んでいる。", "東京 都 に 住ん で いる ."),
        ("ja", "「猫」は　3.5 kg", '" 猫 " は 3.5 kg'),
        ("th", "ประเทศไทยเป็นเมือง 3.5 บาท", "ประเทศ ไทย เป็น เมือง 3.5 บาท"),
        *((language, "", "") for language in PACKAGES),
        *((language, " \u3000 ", "") for language in PACKAGES),
    ],
)
def test_words_are_found_in_normalised_text(language: str, text: str, expected: str) -> None:
    assert tokenise_line(text, language, settings_of(language)) == expected


ALPHABETS = {
    "zh": "研究生命的起源科学家abc3.,\uff0c。 \u3000",
    "ja": "東京都すもものうちカタ㍿ｱabc3.、。 \u3000",
    "th": "ประเทศไทยกรุงเทพฯๆabc3., ",
}


@pytest.mark.parametrize("language", PACKAGES)
@given(data=st.data())
def test_no_character_is_lost_or_made_up(language: str, data: st.DataObject) -> None:
    find = segmenter(language, settings_of(language).segmenters[language])
    text = data.draw(st.text(st.sampled_from(ALPHABETS[language]), max_size=60))
    words = list(find(text))
    assert "".join("".join(words).split()) == "".join(text.split())
    assert words == list(find(text))


@pytest.mark.parametrize("language", PACKAGES)
@pytest.mark.parametrize("blank", ["", " "])
def test_a_long_line(language: str, blank: str) -> None:
    """SudachiPy refuses more than 49,149 bytes."""
    sentence = {"zh": "研究生命的起源", "ja": "東京都に住んでいる", "th": "ประเทศไทยเป็นเมือง"}[
        language
    ] + blank
    text = sentence * (2 * PIECE_CHARACTERS // len(sentence) + 1)
    words = tokenise_line(text, language, settings_of(language)).split()
    assert "".join(words) == text.replace(" ", "")
    if blank:  # cut there, so the pieces are segmented as sentences are
        assert set(words) == set(tokenise_line(sentence, language, settings_of(language)).split())


def test_pythainlp_makes_no_folder_in_the_home(tmp_path: Path) -> None:
    settings = settings_of("th")
    code = (
        "from xlm_ds.tokenisation import segmenter; "
        f"assert list(segmenter('th', {settings.segmenters['th']!r})('ไทย'))"
    )
    home = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=home)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------- which, and what of it is said


@pytest.mark.parametrize("language", PACKAGES)
def test_what_is_missing_is_said_before_anything_is_read(
    tmp_path: Path, language: str, version_of: Callable[[str, str | None], None]
) -> None:
    for package in PACKAGES[language]:
        version_of(package, None)
    (tmp_path / f"raw.{language}").write_bytes(b"\xff not even UTF-8")
    with pytest.raises(InputError, match=rf"not installed; pip install 'xlm_ds\[{language}\]'"):
        prepare(config_of(language, tmp_path))
    (tmp_path / f"raw.{language}").write_text("found before\n" * 60, encoding="utf-8")
    prepare(config_of(language, tmp_path, "--tokenizer", "none"))
    words = (tmp_path / "D/tokenised" / f"test.{language}").read_text(encoding="utf-8")
    assert words == "found before\n" * 3


@pytest.mark.usefixtures("characters_are_words")
def test_library_and_version_are_recorded_and_held(
    tmp_path: Path, version_of: Callable[[str, str | None], None]
) -> None:
    (tmp_path / "raw.en").write_text("Two words.\n" * 60, encoding="utf-8")
    (tmp_path / "raw.zh").write_text("三个字\uff0c\n" * 60, encoding="utf-8")
    prepare(config_of("en,zh", tmp_path))
    record: dict[str, Any] = json.loads((tmp_path / "D/prepare.json").read_text(encoding="utf-8"))
    assert record["tokenisation"]["segmenters"] == {"zh": "rjieba 1"}
    assert (tmp_path / "D/tokenised/test.zh").read_text(encoding="utf-8") == "三 个 字 ,\n" * 3
    english = (tmp_path / "D/tokenised/test.en").stat().st_mtime_ns
    chinese = (tmp_path / "D/tokenised/test.zh").stat().st_mtime_ns
    version_of("rjieba", "2")
    with pytest.raises(InputError, match=r"segmenters\.zh was rjieba 1, is now rjieba 2; give"):
        prepare(config_of("en,zh", tmp_path))
    prepare(config_of("en,zh", tmp_path, "--overwrite"))
    assert (tmp_path / "D/tokenised/test.en").stat().st_mtime_ns == english
    assert (tmp_path / "D/tokenised/test.zh").stat().st_mtime_ns != chinese


@pytest.mark.usefixtures("characters_are_words")
def test_another_library_than_the_records_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(logger, "warning", told.append)
    now = tokenisation_of(config_of("zh", Path()))
    tokenise_line("字", "zh", now)
    assert told == []
    before = dataclasses.replace(now, segmenters={"zh": "rjieba 0"})
    assert [tokenise_line("三个", "zh", before) for _ in range(2)] == ["三 个"] * 2
    assert told == ["zh: words are found by rjieba 1, and were by rjieba 0 before; some may differ"]


def test_a_record_without_segmenters_is_of_text_that_was_not_segmented() -> None:
    old: dict[str, Any] = dataclasses.asdict(tokenisation_of(config_of("en", Path())))
    del old["segmenters"]
    assert tokenise_line("三个字。", "zh", Tokenisation(**old)) == "三个字 ."


def test_the_libraries_are_the_extras() -> None:
    """What the sentence tells to install is what is missing."""
    file = Path(__file__).parent.parent / "pyproject.toml"
    extras = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for language, packages in PACKAGES.items():
        names = [requirement.partition(">=")[0] for requirement in extras[language]]
        assert [n.lower().replace("_", "-") for n in names] == [p.lower() for p in packages]
