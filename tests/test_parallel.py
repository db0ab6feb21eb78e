"""Parallel text to pairs whose lines translate each other: byte for byte, and no line without a translation."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xlm_ds import binarize, shards
from xlm_ds.log import InputError
from xlm_ds.pairs import split_and_language

WORDS = ["alpha", "beta", "gamma", "unknown", "<mask>", "</s>"]
KINDS = ("bin", "idx", "counts.npy")


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "vocab"
    path.write_text("alpha 5\nbeta 4\ngamma 3\ndelta 2\n", encoding="utf-8")
    return path


def write_sides(folder: Path, en: list[str], fr: list[str], split: str = "train") -> None:
    folder.mkdir(exist_ok=True)
    for language, lines in (("en", en), ("fr", fr)):
        text = "".join(line + "\n" for line in lines)
        (folder / f"{split}.{language}").write_text(text, encoding="utf-8")


def run(vocabulary: Path, text: Path, out: Path, *flags: str, split: str = "train") -> None:
    given = [f"--srcdict={vocabulary}", f"--{split}pref={text / split}", f"--destdir={out}"]
    assert binarize.main(["-s=en", "--target-lang=fr", *given, "--workers=1", *flags]) == 0


def content(out: Path, split: str = "train.en-fr") -> dict[str, bytes]:
    names = [f"{split}.{language}.{kind}" for language in ("en", "fr") for kind in KINDS]
    return {name: (out / name).read_bytes() for name in names}


def record(out: Path, pair: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / f"{pair}.json").read_text(encoding="utf-8"))
    return found


def test_each_side_is_what_it_would_be_alone(vocabulary: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    write_sides(text, ["alpha beta", "gamma x"], ["delta", "alpha alpha beta"])
    run(vocabulary, text, out)
    flags = [f"--srcdict={vocabulary}", f"--trainpref={text / 'train'}", f"--destdir={out}"]
    assert binarize.main([*flags, "--langs=en,fr"]) == 0
    for language in ("en", "fr"):
        for kind in KINDS:
            alone = (out / f"train.{language}.{kind}").read_bytes()
            assert (out / f"train.en-fr.{language}.{kind}").read_bytes() == alone
    assert record(out, "train.en-fr.fr")["split"] == "train.en-fr"
    assert record(out, "train.en-fr.fr")["language"] == "fr"


def test_a_change_of_one_side_makes_both_anew(
    vocabulary: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A line that is left out on one side is left out on the other."""
    text, out = tmp_path / "text", tmp_path / "out"
    write_sides(text, ["alpha", "beta", "gamma"], ["alpha", "beta", "gamma"])
    run(vocabulary, text, out, "--unaligned=skip")
    with caplog.at_level("INFO", logger="xlm_ds"):
        run(vocabulary, text, out, "--unaligned=skip")
    assert caplog.text.count("not redone") == 2
    (text / "train.fr").write_text("alpha\n\ngamma delta\n", encoding="utf-8")
    run(vocabulary, text, out, "--unaligned=skip")
    assert [record(out, f"train.en-fr.{lg}")["lines"] for lg in ("en", "fr")] == [2, 2]
    (out / "train.en-fr.en.idx").unlink()
    caplog.clear()
    with caplog.at_level("INFO", logger="xlm_ds"):
        run(vocabulary, text, out, "--unaligned=skip")
    assert "not redone" not in caplog.text


def test_the_tools_for_pairs_know_the_sides(
    vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    write_sides(text, ["alpha", "beta beta"], ["gamma", "delta"])
    run(vocabulary, text, out)
    assert shards.main(["verify", str(out)]) == 0
    assert shards.main(["inspect", str(out / "train.en-fr.fr"), "--lines=0:2"]) == 0
    assert "delta" in capsys.readouterr().out
    joined = tmp_path / "twice" / "train.en-fr.en"
    assert shards.main(["merge", str(joined), *[str(out / "train.en-fr.en")] * 2]) == 0
    assert record(joined.parent, "train.en-fr.en")["lines"] == 4
    assert split_and_language(Path("OUT/train.ar-None.ar")) == ("train", "ar")


REFUSED = {
    "shorter": (
        ["alpha"] * 3,
        ["alpha"] * 2,
        r"train.en has 3 lines and \S*train.fr 2, .*line 3 of \S*train.en is the first without one, or one is lost",
    ),
    "longer": (
        ["alpha"],
        ["beta"] * 2,
        r"train.en has 1 lines .*line 2 of \S*train.fr is the first",
    ),
    "empty": (
        ["alpha"] * 3,
        ["alpha", " \u3000", ""],
        r"train.fr, line 2: is empty, so line 2 of \S*train.en has no translation \(2 such in all\)",
    ),
    "empty first side": (["alpha", ""], ["beta", "beta"], r"train.en, line 2: is empty"),
    "both empty": (["alpha", ""], ["beta", ""], r"train.en, line 2: is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_aligned_is_refused_and_leaves_nothing(
    case: str, vocabulary: Path, tmp_path: Path
) -> None:
    en, fr, message = REFUSED[case]
    text, out = tmp_path / "text", tmp_path / "out"
    write_sides(text, en, fr)
    with pytest.raises(InputError, match=message) as caught:
        run(vocabulary, text, out)
    assert "--unaligned skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in out.iterdir() if "train" in p.name) == []


def test_a_refused_split_leaves_those_before_it(vocabulary: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    write_sides(text, ["alpha"], ["beta"])
    write_sides(text, ["alpha"], ["", "beta"], split="valid")
    with pytest.raises(InputError, match=r"valid.en has 1 lines"):
        run(vocabulary, text, out, f"--validpref={text / 'valid'}")
    assert content(out)
    assert not list(out.glob("*valid*"))


def test_what_was_there_before_survives_a_refusal(vocabulary: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    write_sides(text, ["alpha", "beta"], ["gamma", "delta"])
    run(vocabulary, text, out)
    before = content(out)
    write_sides(text, ["alpha", "beta", ""], ["gamma", "delta", "delta"])
    with pytest.raises(InputError, match="line 3: is empty"):
        run(vocabulary, text, out)
    assert content(out) == before


LINES = st.lists(st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join), max_size=12)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(en=LINES, fr=LINES, implementation=st.sampled_from(["mmap", "lazy"]))
def test_skipping_gives_what_the_other_lines_alone_give(
    en: list[str],
    fr: list[str],
    implementation: str,
    vocabulary: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("skip")
    write_sides(folder / "whole", en, fr)
    both = [(a, b) for a, b in zip(en, fr, strict=False) if a and b]
    write_sides(folder / "kept", [a for a, _ in both], [b for _, b in both])
    flags = ["--unaligned=skip", f"--dataset-impl={implementation}"]
    if not both:
        with pytest.raises(InputError, match="no line that has a translation"):
            run(vocabulary, folder / "whole", folder / "a", *flags)
        return
    run(vocabulary, folder / "whole", folder / "a", *flags)
    run(vocabulary, folder / "kept", folder / "b", *flags)
    assert content(folder / "a") == content(folder / "b")
    for pair in ("train.en-fr.en", "train.en-fr.fr"):
        a, b = record(folder / "a", pair), record(folder / "b", pair)
        for name in ("lines", "tokens", "unknown", "blank", "literal_specials", "sha256"):
            assert a[name] == b[name], name


def test_skipped_lines_are_counted_in_a_sentence(
    vocabulary: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_sides(tmp_path / "t", ["alpha", "", "beta", "beta"], ["alpha", "beta", "gamma"])
    with caplog.at_level("INFO", logger="xlm_ds"):
        run(vocabulary, tmp_path / "t", tmp_path / "out", "--unaligned=skip")
    assert re.search(r"left out 2 of 4 pairs of lines, .* the first is line 2\n", caplog.text)
    assert caplog.text.count("left out") == 1
    (warning,) = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert re.search(
        r"train.en has 4 lines and \S*train.fr 3, .*line 4 of \S*train.en is the first without one, or one is lost "
        "before, in which case all lines after it are paired wrongly$",
        warning,
    )
    caplog.clear()
    write_sides(tmp_path / "t", ["alpha", "", "beta"], ["alpha", "beta", "gamma"])
    with caplog.at_level("INFO", logger="xlm_ds"):
        run(vocabulary, tmp_path / "t", tmp_path / "out", "--unaligned=skip")
    assert "left out 1 of 3" in caplog.text
    assert "WARNING" not in caplog.text  # what is empty shifts no other line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source-lang=en", "--target-lang=en"], "en is named twice"),
        (["--langs=en,fr", "--target-lang=de"], "leave out --langs"),
        (["--source-lang=en", "--target-lang=fr", "--only-source"], "leave out --only-source"),
        (["--source-lang=en", "--target-lang=xx"], "train.xx: not found"),
        (["--target-lang=fr"], "--source-lang LG"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    flags: list[str], message: str, vocabulary: Path, tmp_path: Path
) -> None:
    write_sides(tmp_path / "text", ["alpha"], ["beta"])
    given = [f"--srcdict={vocabulary}", f"--trainpref={tmp_path / 'text' / 'train'}"]
    with pytest.raises(InputError, match=message):
        binarize.main([*flags, *given, f"--destdir={tmp_path / 'out'}"])


def test_what_prepare_leaves_is_not_mistaken(vocabulary: Path, tmp_path: Path) -> None:
    """D/train.en beside D/train.en-fr.en is a language's text: of as many lines, it would pass for parallel text."""
    text, out = tmp_path / "text", tmp_path / "out"
    write_sides(text, ["alpha"], ["beta"])
    write_sides(text, ["alpha"], ["beta"], split="train.en-fr")
    given = [f"--srcdict={vocabulary}", f"--destdir={out}", f"--trainpref={text / 'train'}"]
    for one, other in (("en", "fr"), ("fr", "en")):
        with pytest.raises(InputError, match=r"give --trainpref \S*train.en-fr$"):
            binarize.main([f"-s={one}", f"-t={other}", *given])
    with pytest.raises(InputError, match=r"not found, but \S*train.en-fr.en is; give --trainpref"):
        binarize.main(["-s=fr", "-t=en", *given, f"--trainpref={text / 'train.fr-en'}"])
    with pytest.raises(InputError, match=r"train.en-fr.en is there: parallel text needs --source"):
        binarize.main(["--langs=en,en-fr", *given])
    run(vocabulary, text, out, f"--trainpref={text / 'train.en-fr'}")


def test_several_files_are_splits_of_their_own_and_not_joined(
    vocabulary: Path, tmp_path: Path
) -> None:
    """Two files of which one has lost a line and the other has one too many would look whole together."""
    text, out = tmp_path / "text", tmp_path / "out"
    for split in ("a", "b"):
        write_sides(text, ["alpha"], ["beta"], split=split)
    both = f"{text / 'a'},{text / 'b'}"
    with pytest.raises(InputError, match="are not joined"):
        run(vocabulary, text, out, f"--trainpref={both}")
    flags = [f"--srcdict={vocabulary}", f"--validpref={both}", f"--destdir={out}"]
    assert binarize.main(["-s=en", "-t=fr", *flags]) == 0
    assert content(out, "valid.en-fr") == {
        name.replace("valid1", "valid"): text for name, text in content(out, "valid1.en-fr").items()
    }


@pytest.fixture
def many(tmp_path: Path) -> Callable[[], None]:
    """Some thousand lines, of which a few are empty on a side."""
    rng = np.random.default_rng(0)

    def lines() -> list[str]:
        return [" ".join(rng.choice(WORDS[:4], n)) for n in rng.integers(0, 9, 4000)]

    def write() -> None:
        write_sides(tmp_path / "many", lines(), lines()[:3990])

    return write


def test_the_bytes_do_not_depend_on_the_threads(
    many: Callable[[], None], vocabulary: Path, tmp_path: Path
) -> None:
    many()
    for workers in (1, 5):
        out = tmp_path / f"out{workers}"
        run(vocabulary, tmp_path / "many", out, "--unaligned=skip", f"--workers={workers}")
    assert content(tmp_path / "out1") == content(tmp_path / "out5")
    assert int(str(record(tmp_path / "out1", "train.en-fr.en")["lines"])) > 2000
