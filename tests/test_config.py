"""Flags, TOML and defaults agree; what is wrong is said in one sentence with the nearest right thing."""

import shlex
from pathlib import Path

import pytest

from xlm_ds.config import BinarizeConfig, TrainConfig
from xlm_ds.flags import from_dict, parse, to_dict, to_toml
from xlm_ds.log import InputError
from xlm_ds.peer_flags import TRAIN_FLAGS
from xlm_ds.steps import Steps

RECIPE = shlex.split("""
    --task cross_lingual_lm OUT --save-dir checkpoints/mlm --max-update 2400000 --save-interval 1
    --no-epoch-checkpoints --arch xlm_base --optimizer adam --lr-scheduler reduce_lr_on_plateau
    --lr-shrink 0.5 --lr 0.0001 --stop-min-lr 1e-09 --dropout 0.1 --criterion legacy_masked_lm_loss
    --max-tokens 2048 --tokens-per-sample 256 --attention-dropout 0.1 --dataset-impl lazy --seed 0
    --masked-lm-only --monolingual-langs 'ar,de,en,hi,fr' --num-segment 5 --ddp-backend=legacy_ddp
""")


def test_the_recipe_as_printed_is_understood() -> None:
    config = parse(TrainConfig, RECIPE, peers=TRAIN_FLAGS)
    assert config.data.monolingual_langs == ("ar", "de", "en", "hi", "fr")
    assert config.optimization.lr == 1e-4
    assert config.optimization.stop_min_lr == 1e-9
    assert config.run.no_epoch_checkpoints is True
    assert config.model.num_segment == 5


def test_answered_flags_say_what_happens_instead(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="xlm_ds"):
        parse(TrainConfig, RECIPE, peers=TRAIN_FLAGS)
    assert sum("--ddp-backend" in message for message in caplog.messages) == 1
    assert sum("--dataset-impl" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["OUT", "--max-updates", "3"], "did you mean --max-update?"),
        (["OUT", "--lr", "fast"], "--lr fast: not a number"),
        (["OUT", "--task", "language_modeling"], "there is cross_lingual_lm"),
        (["OUT", "--lr-scheduler", "inverse_sqr"], "did you mean inverse_sqrt?"),
        (["OUT", "--max-tokens", "0"], "must be in [1, 2147483647]"),
        (["OUT", "--mask-ratio", "0"], "must be in (0, 1]"),
        (["OUT", "--mask-ratio", "nan"], "must be in (0, 1]"),
        (["OUT", "--mask-ratio", "0.1@0,1.5@9"], "--mask-ratio 0.1@0,1.5@9: must be in (0, 1]"),
        (["OUT", "--mask-ratio", "x"], "--mask-ratio x: 'x' is not a number"),
        (["OUT", "--sampling-alpha", "0.7@0,-1@9"], "must be in [0, inf)"),
        (["OUT", "--sampling-alpha", "0.7@3"], "--sampling-alpha 0.7@3: must start at update 0"),
        (["OUT", "--adam-betas", "1.5,2"], "must be in [0, 1)"),
        (["OUT", "--adam-betas", "0.9,x"], "not numbers as a,b"),
        (["OUT", "--lr-shrink", "2"], "must be in (0, 1)"),
        (["OUT", "--seed", "99999999999999999999"], "must be in [0, 18446744073709551615]"),
        (["OUT", "--adam-betas", "0.9"], "must be 2 values"),
        (["OUT", "--save-dir", ""], "--save-dir: an empty path would be the current folder"),
        (["OUT", "--save-dir", "r\udcff"], r"--save-dir 'r\udcff': is not UTF-8; type it"),
        (["OUT", "--mlm-steps", "en,\udcff"], r"--mlm-steps 'en,\udcff': is not UTF-8"),
        (["OUT\udce9"], r"DATA 'OUT\udce9': is not UTF-8"),
        (["OUT", "--save-dir"], "--save-dir: a value must follow it"),
        (["OUT", "--no-epoch-checkpoints=3"], "--no-epoch-checkpoints: takes no value"),
        (["OUT", "stray"], "unexpected argument 'stray'"),
        ([], "DATA is missing"),
    ],
)
def test_wrong_flags_get_one_sentence(argv: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*$") as caught:
        parse(TrainConfig, argv)
    assert expected in str(caught.value)


def test_a_missing_flag_is_named() -> None:
    with pytest.raises(InputError, match="--destdir is missing"):
        parse(BinarizeConfig, [])


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    flags = ["--adam-betas", "(0.9, 0.98)", "--lr", "5e-4", "--sampling-alpha", "0.7@0,0.5@100000"]
    config = parse(TrainConfig, ["OUT", *flags])
    assert to_dict(config)["data"]["sampling_alpha"] == "0.7@0,0.5@100000"
    assert to_dict(config)["data"]["mask_ratio"] == 0.15
    (tmp_path / "run.toml").write_text(to_toml(config), encoding="utf-8")
    assert parse(TrainConfig, ["--config", str(tmp_path / "run.toml")]) == config
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("data = 'OUT'\nlr = 1\nmax-tokens = 512\n", encoding="utf-8")
    config = parse(TrainConfig, ["--config", str(tmp_path / "run.toml"), "--max-tokens", "1024"])
    assert (config.optimization.lr, config.optimization.max_tokens) == (1.0, 1024)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", Steps((1.0,))),
        ("0.3", Steps((0.3,))),
        ("'0.3'", Steps((0.3,))),
        ("'0.3@0,0.5@9'", Steps((0.3, 0.5), (0, 9))),
        ("'0.3@0,0.5@9samples'", Steps((0.3, 0.5), (0, 9), True)),
    ],
)
def test_steps_in_toml(tmp_path: Path, value: str, expected: Steps) -> None:
    (tmp_path / "run.toml").write_text(f"mask-ratio = {value}\n", encoding="utf-8")
    config = parse(TrainConfig, ["OUT", "--config", str(tmp_path / "run.toml")])
    assert config.data.mask_ratio == expected


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("lrr = 1", "did you mean lr?"),
        ("lr = 'x'", "not a number"),
        ("lr = [", "not a TOML file"),
        ("save-dir = ''", "save_dir: an empty path would be the current folder"),
        ("mask-ratio = '0.1@0,0.2@0.5'", "@0.5 is not where a value can start"),
        ("mask-ratio = true", "not a number, or numbers as X@0,X@UPDATE"),
    ],
)
def test_wrong_toml_gets_one_sentence(tmp_path: Path, toml: str, expected: str) -> None:
    (tmp_path / "run.toml").write_text(toml, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        parse(TrainConfig, ["OUT", "--config", str(tmp_path / "run.toml")])
    assert expected in str(caught.value)
    assert "run.toml" in str(caught.value)
