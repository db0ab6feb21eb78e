"""What the parser does with others' flags is what docs/coming-from.md says of them."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from xlm_ds import config, flags, peer_flags
from xlm_ds.config import BinarizeConfig, TrainConfig
from xlm_ds.flags import PeerFlag, parse
from xlm_ds.log import InputError
from xlm_ds.peer_flags import BINARIZE_FLAGS, PEERS, RUN_MLM, TRAIN_FLAGS

ROOT = Path(__file__).parent.parent
STAGES: dict[str, tuple[type[Any], tuple[PeerFlag, ...], list[str]]] = {
    "binarize": (BinarizeConfig, BINARIZE_FLAGS, ["--destdir=D"]),
    "train": (TrainConfig, TRAIN_FLAGS, ["OUT"]),
}
CASES = [(peer.stage, flag) for peer in PEERS for flag in peer.flags]


def name_of(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def knobs_of(config_class: type[Any]) -> set[str]:
    """Flags of a stage, also by their other names."""
    names = set()
    for item in flags._knobs(config_class):
        names |= {item.name, *(name_of(alias) for alias in item.meta["aliases"])}
    return names


def spellings(flag: str) -> set[str]:
    return (
        {"--" + name_of(flag).replace("_", "-"), "--" + name_of(flag)} if flag[1] == "-" else {flag}
    )


@pytest.mark.parametrize(
    ("stage", "entry"), CASES, ids=[f"{s} {e.program} {e.flag}" for s, e in CASES]
)
def test_the_parser_does_as_the_table_says(
    stage: str, entry: PeerFlag, caplog: pytest.LogCaptureFixture
) -> None:
    config_class, known, needed = STAGES[stage]
    is_knob = name_of(entry.flag) in knobs_of(config_class)
    caplog.set_level("INFO", logger="xlm_ds")
    for flag in spellings(entry.flag):
        caplog.clear()
        if entry.verdict == "ignored":
            assert not is_knob
            first = next(e for e in known if name_of(e.flag) == name_of(entry.flag))
            assert (first.why, first.takes_value) == (entry.why, entry.takes_value)
            argv = [*needed, flag, "x"] if entry.takes_value else [flag, *needed]
            if not entry.takes_value:  # as XLM and transformers take it
                for value in ("true", "False", "1"):
                    with_value = parse(config_class, [flag, value, *needed], peers=known)
                    assert with_value == parse(config_class, needed)
                caplog.clear()
            expected = [f"{entry.flag.replace('_', '-')}: {entry.why}"] if entry.why else []
            assert parse(config_class, argv, peers=known) == parse(config_class, needed)
            assert [message.replace("_", "-", 1) for message in caplog.messages] == [
                message.replace("_", "-", 1) for message in expected
            ]
        elif is_knob:
            assert entry.verdict in ("same", "changed")
        else:
            assert entry.verdict in ("changed", "refused")
            first = next(e for e in known if name_of(e.flag) == name_of(entry.flag))
            value = "x"
            if first.verdict == "ignored":  # DeepSpeed's --deepspeed, which takes no value
                assert entry.verdict == "changed"
                first, value = entry, "x.json"
            with pytest.raises(InputError) as caught:
                parse(config_class, [*needed, flag, value], peers=known)
            message = str(caught.value)
            assert message == f"{flag}: of {first.program}, {first.verdict} here: {first.why}"
    assert entry.why or entry.verdict in ("same", "ignored")
    assert "\n" not in entry.why


def test_a_flag_that_is_named_instead_is_there() -> None:
    """Every --flag of a sentence is one of some stage, or DeepSpeed's launcher's."""
    classes = [
        value
        for value in vars(config).values()
        if isinstance(value, type)
        and value.__name__.endswith("Config")
        and dataclasses.is_dataclass(value)
    ]
    known = {name for config_class in classes for name in knobs_of(config_class)} | {
        *("hostfile", "master_port"),
    }
    sentences = [entry.why for _, entry in CASES] + list(peer_flags.FILES.values())
    named = {name_of(flag) for text in sentences for flag in re.findall(r"--[a-z][a-z_-]*", text)}
    assert len(named) > 30
    assert named <= known


def test_every_flag_of_the_recipe_is_in_the_table() -> None:
    recipe = importlib.import_module("test_config").RECIPE
    table = {entry.flag for entry in peer_flags.FAIRSEQ_TRAIN}
    assert {word.split("=")[0] for word in recipe if word.startswith("--")} <= table


def test_every_argument_of_transformers_is_in_the_table() -> None:
    transformers: Any = importlib.import_module("transformers")
    pinned = re.search(
        r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    assert pinned is not None
    if transformers.__version__ != pinned[1]:
        pytest.skip(f"the table is of {pinned[1]}")
    there = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert there <= {name_of(entry.flag) for entry in RUN_MLM}


def test_all_of_a_commands_answers_come_at_once() -> None:
    with pytest.raises(InputError) as caught:
        parse(
            TrainConfig,
            ["OUT", "--emb_dim", "8", "--output_dir=x", "--n_heads=2"],
            peers=TRAIN_FLAGS,
        )
    message = str(caught.value)
    assert message.count(" here: ") == 3
    assert "--output_dir: of run_mlm.py, changed here: --save-dir" in message
    with pytest.raises(
        InputError, match=r"^--deepspeed: of run_mlm.py, changed here: --deepspeed_c"
    ):
        parse(TrainConfig, ["OUT", "--deepspeed", "ds.json"], peers=TRAIN_FLAGS)
    assert parse(TrainConfig, ["--deepspeed", "OUT"], peers=TRAIN_FLAGS).data.data == Path("OUT")


def test_a_value_of_another_program_is_told_what_takes_its_place() -> None:
    with pytest.raises(
        InputError,
        match=r"adam,lr=0.1 is not supported.*\(.*XLM's is changed here: adam, its numbers",
    ):
        parse(TrainConfig, ["OUT", "--optimizer", "adam,lr=0.1"], peers=TRAIN_FLAGS)
    with pytest.raises(
        InputError, match=r"polynomial_decay is not supported.*linear for polynomial_decay"
    ):
        parse(TrainConfig, ["OUT", "--lr-scheduler", "polynomial_decay"], peers=TRAIN_FLAGS)


def test_what_is_ignored_is_never_recommended() -> None:
    for flag in ("--data_buffer_sise", "--num-worker"):
        with pytest.raises(InputError, match="see --help for those there are"):
            parse(TrainConfig, ["OUT", flag, "3"], peers=TRAIN_FLAGS)


def test_no_flag_is_twice_in_a_table() -> None:
    for peer in PEERS:
        names = [entry.flag for entry in peer.flags]
        assert len(set(names)) == len(names)
        assert {entry.verdict for entry in peer.flags} <= {"same", "changed", "ignored", "refused"}


def test_the_page_is_the_tables() -> None:
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    assert page == peer_flags.document(), "python -m xlm_ds.peer_flags > docs/coming-from.md"
