"""prove: two runs that are the same are said to be, and of others the first difference is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from test_train import train_here
from xlm_ds import prove
from xlm_ds.config import DataConfig
from xlm_ds.corpus import open_corpus
from xlm_ds.digests import FILE, chained
from xlm_ds.engine import Ranks
from xlm_ds.log import EXIT_DIFFERENT, EXIT_OK, InputError

TOKENS = 32  # per sample, as test_train's SHAPE has it
FLAGS = ["--digest-interval=2", "--max-update=6"]  # updates of 4 samples


@pytest.fixture(scope="module")
def train_in(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Callable[..., Path]:
    """Trains in this process, on `data`, into a folder that it returns."""
    folder = tmp_path_factory.mktemp("runs")

    def start(name: str, data: Path, *flags: str) -> Path:
        train_here(data, folder / name, ranks, *FLAGS, *flags)
        return folder / name

    return start


@pytest.fixture(scope="module")
def whole(train_in: Callable[..., Path], tiny_data: Path) -> Path:
    return train_in("whole", tiny_data)


@pytest.fixture
def proved(capsys: pytest.CaptureFixture[str]) -> Callable[[Path, Path], tuple[int, str, str]]:
    """(exit code, what is said of the samples, what of the parameters), the folders by their names only."""

    def call(a: Path, b: Path) -> tuple[int, str, str]:
        code = prove.main([str(a), str(b)])
        said = capsys.readouterr().out.replace(f"{a.parent}/", "")
        found = re.fullmatch(r"samples: ([^\n]*)\nparameters: ([^\n]*)\n", said)
        assert found, said
        return code, found[1], found[2]

    return call


Proved = Callable[[Path, Path], tuple[int, str, str]]


def test_a_run_and_its_copy_are_identical(whole: Path, proved: Proved) -> None:
    same = "identical to update 6"
    assert proved(whole, whole) == (EXIT_OK, same, f"{same} (compared at 3 updates)")


def test_one_that_is_behind_is_identical_as_far_as_it_goes(
    whole: Path, tmp_path: Path, proved: Proved
) -> None:
    """Also where its last line is unfinished, as it is still at work or was killed."""
    behind = tmp_path / "behind"
    behind.mkdir()
    lines = (whole / FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    (behind / FILE).write_text("".join(lines[:4]) + lines[4][:20], encoding="utf-8")
    for pair in ((whole, behind), (behind, whole)):
        code, samples, parameters = proved(*pair)
        assert code == EXIT_OK
        assert re.fullmatch(
            r"identical to update 3, the last of \S*behind \(\S*whole has 6\)", samples
        )
        assert parameters == "identical to update 2 (compared at 1 updates)"


def test_what_differs_where_one_run_has_no_lines_is_told_by_the_chains(
    whole: Path, train_in: Callable[..., Path], tiny_data: Path, tmp_path: Path, proved: Proved
) -> None:
    """As where its disk was full. Of two runs that are the same a gap hides nothing."""
    copies = []
    for name, source in (("same", whole), ("other", train_in("seed_two", tiny_data, "--seed=2"))):
        shutil.copytree(source, tmp_path / name)
        copies.append(tmp_path / name)
    same, other = copies
    lines = (whole / FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    (same / FILE).write_text("".join(lines[:3] + lines[5:]), encoding="utf-8")
    assert proved(whole, same)[:2] == (EXIT_OK, "identical to update 6")
    content = [json.loads(line) for line in lines]
    chain = content[2]["chain"]
    others = [json.loads(line) for line in (other / FILE).read_text("utf-8").splitlines()]
    content[3]["digest"] = others[3]["digest"]
    for line in content[3:]:
        link = chained(bytes.fromhex(chain), line["update"], bytes.fromhex(line["digest"]))
        chain = line["chain"] = link.hex()
    text = [json.dumps(line) + "\n" for line in content]
    (other / FILE).write_text("".join(text[:3] + text[4:]), encoding="utf-8")
    code, samples, _ = proved(whole, other)
    assert (code, samples) == (
        EXIT_DIFFERENT,
        "identical to update 2, and from 4 to 6, but not between, where one run has no lines: their chains differ",
    )


# ----------------------------------------------------------------------------------------- samples


def other_token(data: Path, copy: Path, sample: int) -> str:
    """A copy of the data where one token of this sample is another; returns the sample's language and block."""
    shutil.copytree(data, copy)
    config = DataConfig(data=data, tokens_per_sample=TOKENS)
    corpus = open_corpus(config)
    ((language,), _, (block,)) = corpus.order.samples(sample, 1)
    name = corpus.languages[language]
    path = copy / f"train.{name}.bin"
    tokens = np.fromfile(path, "<u2")
    place = int(block) * (TOKENS - 1) + 9  # which is number 10 of the sample, as eos comes first
    tokens[place] = 5 + (tokens[place] == 5)
    tokens.tofile(path)
    return f"{name} (language {language}) block {block}"


@pytest.fixture
def other_data(tiny_data: Path, tmp_path: Path) -> tuple[Path, str]:
    copy = tmp_path / "other_data"
    return copy, other_token(tiny_data, copy, 14)


def test_one_other_token_is_named(
    whole: Path, train_in: Callable[..., Path], other_data: tuple[Path, str], proved: Proved
) -> None:
    data, which = other_data
    code, samples, parameters = proved(whole, train_in("other_token", data))
    assert code == EXIT_DIFFERENT
    assert re.fullmatch(
        r"identical to update 3; update 4 differs: in sample 14, "
        + re.escape(which)
        + r" in pass 0, 1 of 32 tokens differ, first number 10: \d+ \(\S+\) in whole, [56] \(\S+\) in other_token",
        samples,
    ), samples
    assert re.fullmatch(
        r"identical to update 2 \(compared at 1 updates\); update 4 differs: \d+ of 32 parameters, first [a-z_.]+",
        parameters,
    )


def test_masks_alone_are_told_apart(
    whole: Path, train_in: Callable[..., Path], tiny_data: Path, proved: Proved
) -> None:
    other = train_in("other_masks", tiny_data, "--mask-ratio=0.15@0,0.3@2")
    code, samples, _ = proved(whole, other)
    assert code == EXIT_DIFFERENT
    assert re.fullmatch(
        r"identical to update 2; update 3 differs: in sample 8, \w+ \(language \d\) block \d+ in pass 0, the masks "
        "differ, and the tokens are the same",
        samples,
    )


def test_another_block_is_named(
    whole: Path, train_in: Callable[..., Path], tiny_data: Path, proved: Proved
) -> None:
    code, samples, _ = proved(whole, train_in("other_seed", tiny_data, "--seed=1"))
    assert code == EXIT_DIFFERENT
    block = r"\w+ \(language \d\) block \d+ in pass 0"
    assert re.fullmatch(
        rf"update 1 differs: its sample \d is {block} in whole and {block} in other_seed", samples
    )


def test_another_length_is_named(
    whole: Path, train_in: Callable[..., Path], tiny_data: Path, proved: Proved
) -> None:
    """The same block of the same language, by chance: with lines as blocks there are as many."""
    flags = ["--sample-break-mode=eos", "--max-update=1"]
    a = train_in("length_a", tiny_data, *flags)
    b = train_in("length_b", tiny_data, *flags, "--tokens-per-sample=64", "--max-tokens=256")
    assert proved(whole, a)[0] == EXIT_DIFFERENT
    assert re.search(r"the length differs: 32 tokens in length_a, 64 in length_b$", proved(a, b)[1])


def test_data_that_are_gone_or_others_are_said(
    whole: Path, train_in: Callable[..., Path], other_data: tuple[Path, str], proved: Proved
) -> None:
    """The update is named all the same; a sample of data that were not trained on never is."""
    data, _ = other_data
    other = train_in("gone", data)
    tokens = np.fromfile(data / "train.en.bin", "<u2")
    np.full_like(tokens, 7).tofile(data / "train.en.bin")
    code, samples, _ = proved(whole, other)
    assert code == EXIT_DIFFERENT
    start = "identical to update 3; update 4 differs: which sample is not to be found out: "
    changed = f"{data} with gone/config.toml does not give the samples any more that update 4 had"
    assert samples == start + changed
    shutil.rmtree(data)
    assert proved(whole, other)[1].startswith(f"{start}{data}: no such folder")
    (other / "config.toml").write_text("lr = [", encoding="utf-8")
    assert proved(whole, other)[1].startswith(f"{start}gone/config.toml: not a TOML file: ")
    (other / "config.toml").unlink()
    assert proved(whole, other)[1] == f"{start}gone/config.toml: no such file or directory"


def test_runs_of_other_batches_are_refused(
    whole: Path, train_in: Callable[..., Path], tiny_data: Path
) -> None:
    other = train_in("other_batch", tiny_data, "--update-freq=2", "--max-update=1")
    with pytest.raises(
        InputError, match=r"^[^\n]*1 is samples 0 to 3 in [^\n]* 0 to 7 [^\n]*--global-batch"
    ):
        prove.main([str(whole), str(other)])


def test_a_batch_that_changes_on_the_way_is_a_difference(
    whole: Path, train_in: Callable[..., Path], tiny_data: Path, proved: Proved
) -> None:
    train_in("batch_changes", tiny_data, "--max-update=3")
    other = train_in("batch_changes", tiny_data, "--update-freq=2", "--max-update=4")
    code, samples, _ = proved(whole, other)
    assert code == EXIT_DIFFERENT
    assert samples == (
        "identical to update 3; update 4 differs: it is samples 12 to 15 in whole and samples 12 to 19 in batch_changes"
    )


def from_update_4(whole: Path, folder: Path) -> list[str]:
    """The header, and updates 4 to 6: of a run that went on from a checkpoint in a new folder."""
    folder.mkdir()
    lines = (whole / FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    return [lines[0], *lines[4:]]


def test_the_chain_knows_what_was_before(whole: Path, tmp_path: Path, proved: Proved) -> None:
    late = tmp_path / "late"
    (late / FILE).write_text("".join(from_update_4(whole, late)), encoding="utf-8")
    assert proved(whole, late)[:2] == (EXIT_OK, "identical to update 6")


def test_a_chain_of_another_past_is_a_difference(
    whole: Path, tmp_path: Path, proved: Proved
) -> None:
    late = tmp_path / "late"
    lines = from_update_4(whole, late)
    chain = "11" * 8
    for i, line in enumerate(lines[1:], start=1):
        content = json.loads(line)
        digest = bytes.fromhex(content["digest"])
        chain = chained(bytes.fromhex(chain), content["update"], digest).hex()
        lines[i] = json.dumps({**content, "chain": chain}) + "\n"
    (late / FILE).write_text("".join(lines), encoding="utf-8")
    code, samples, _ = proved(whole, late)
    assert (code, samples) == (
        EXIT_DIFFERENT,
        "identical from update 4 to 6, but not before: their chains differ",
    )


# -------------------------------------------------------------------------------------- parameters


def test_another_learning_rate_leaves_the_samples_identical(
    whole: Path, train_in: Callable[..., Path], tiny_data: Path, proved: Proved
) -> None:
    train_in("other_lr", tiny_data, "--max-update=3")
    code, samples, parameters = proved(whole, train_in("other_lr", tiny_data, "--lr=2e-3"))
    assert (code, samples) == (EXIT_DIFFERENT, "identical to update 6")
    known = "identical to update 2 (compared at 1 updates); update 4 differs: 32 of 32 parameters"
    assert parameters == f"{known}, first token_embedding.weight"


def test_the_first_parameter_that_differs_is_named(
    whole: Path, tmp_path: Path, proved: Proved
) -> None:
    """With a file as a run would have written it whose third and ninth parameter were others at update 6."""
    other = tmp_path / "other"
    other.mkdir()
    lines = (whole / FILE).read_text(encoding="utf-8").splitlines()
    content = json.loads(lines[6])
    digests = re.findall("." * 16, content["parameters"])
    digests[2], digests[8] = digests[8], digests[2]
    content["parameters"] = "".join(digests)
    before = json.loads(lines[4])["parameters_chain"]
    content["parameters_chain"] = chained(
        bytes.fromhex(before), 6, bytes.fromhex(content["parameters"])
    ).hex()
    (other / FILE).write_text("\n".join([*lines[:6], json.dumps(content)]) + "\n", encoding="utf-8")
    name = json.loads(lines[0])["parameters"][2]
    code, samples, parameters = proved(whole, other)
    assert (code, samples) == (EXIT_DIFFERENT, "identical to update 6")
    known = "identical to update 4 (compared at 2 updates); update 6 differs"
    assert parameters == f"{known}: 2 of 32 parameters, first {name}"


def test_other_networks_and_no_digests_are_said(
    whole: Path, train_in: Callable[..., Path], tiny_data: Path, proved: Proved
) -> None:
    code, samples, parameters = proved(whole, train_in("deep", tiny_data, "--encoder-layers=3"))
    assert (code, samples) == (EXIT_DIFFERENT, "identical to update 6")
    assert parameters.startswith("those of other networks: layers.2.")
    code, samples, parameters = proved(whole, train_in("never", tiny_data, "--digest-interval=0"))
    assert (code, samples) == (EXIT_OK, "identical to update 6")
    assert parameters == "not compared: no update has them in both runs (--digest-interval)"


# --------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_compared_is_one_sentence(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=rf"^[^\n]*{FILE}: not found; give the --save-dir of a run$"
    ):
        prove.main([str(whole), str(tmp_path)])
    lines = (whole / FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / FILE).write_text(lines[0], encoding="utf-8")
    with pytest.raises(
        InputError, match=r"^no update is in both: the last in [^\n]* is 6, in [^\n]* 0$"
    ):
        prove.main([str(whole), str(tmp_path)])
    (tmp_path / FILE).write_text("".join([*lines[:2], "x\n", *lines[3:]]), encoding="utf-8")
    with pytest.raises(InputError, match=rf"^[^\n]*{FILE}, line 3: damaged: [^\n]*$"):
        prove.main([str(whole), str(tmp_path)])
