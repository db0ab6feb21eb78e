"""The commands as users type them: the recipe, the launcher with two ranks, kill -9, Ctrl-C."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from conftest import LANGUAGES
from test_train import SHAPE, losses_in
from xlm_ds import checkpoint
from xlm_ds.deepspeed_config import CONFIG_DIRECTORY

ROOT = Path(__file__).parent.parent
STAGES = (
    "prepare",
    "binarize",
    "train",
    "finetune",
    "evaluate",
    "retrieve",
    "fill",
    "prove",
    "report",
)
MODULE = [sys.executable, "-m"]


def environment() -> dict[str, str]:
    """As a user's shell: no trace of a launcher, this environment's programs first."""
    dropped = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return {**env, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def call(*command: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def succeed(*command: str | Path) -> str:
    result = call(*command)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def launcher(tmp_path: Path, ranks: int) -> list[str | Path]:
    """deepspeed with a hostfile of so many slots on this host, on a port of its own."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(f"localhost slots={ranks}\n", encoding="utf-8")
    port = 20000 + os.getpid() % 20000
    # Without address and no_ssh_check the launcher asks this very host for its name by ssh.
    here = [f"--master_port={port}", "--master_addr=127.0.0.1", "--no_ssh_check"]
    deepspeed = Path(sys.executable).parent / "deepspeed"
    return [deepspeed, "--hostfile", hostfile, *here, "--module"]


def test_the_recipe_as_printed(tiny_corpus: Path, tmp_path: Path) -> None:
    """fairseq's commands with the program's name changed, and less of everything."""
    out, run = tmp_path / "out", tmp_path / "checkpoints" / "mlm"
    vocabulary = tmp_path / "vocab_mlm"
    texts = [(tiny_corpus / f"train.{lg}").read_text(encoding="utf-8") for lg in LANGUAGES]
    words = Counter(word for text in texts for word in text.split()).most_common(1000)
    vocabulary.write_text("".join(f"{w} {n}\n" for w, n in words), encoding="utf-8")
    for language in LANGUAGES:
        succeed(*MODULE, "xlm_ds.binarize", "--task", "cross_lingual_lm", "--srcdict", vocabulary,
                "--only-source", "--trainpref", tiny_corpus / "train", "--validpref", tiny_corpus / "valid",
                "--testpref", tiny_corpus / "test", "--destdir", out, "--workers", "20",
                "--source-lang", language)  # fmt: skip
    output = succeed(*launcher(tmp_path, 1), "xlm_ds.train",
                     "--task", "cross_lingual_lm", out, "--save-dir", run,
                     "--max-update", "3", "--save-interval", "1", "--no-epoch-checkpoints",
                     "--arch", "xlm_base", "--optimizer", "adam", "--lr-scheduler", "reduce_lr_on_plateau",
                     "--lr-shrink", "0.5", "--lr", "0.0001", "--stop-min-lr", "1e-09",
                     "--dropout", "0.1", "--criterion", "legacy_masked_lm_loss",
                     "--max-tokens", "2048", "--tokens-per-sample", "256", "--attention-dropout", "0.1",
                     "--dataset-impl", "lazy", "--seed", "0", "--masked-lm-only",
                     "--monolingual-langs", "ar,en,hi", "--num-segment", "5", "--ddp-backend=legacy_ddp",
                     "--encoder-layers", "1", "--encoder-embed-dim", "32")  # fmt: skip
    assert "--ddp-backend: gradients go through DeepSpeed ZeRO" in output
    text = succeed(*MODULE, "xlm_ds.evaluate", run / checkpoint.BEST, out, "--split", "test")
    assert [line.split()[0] for line in text.splitlines()[-5:]] == ["language", *LANGUAGES, "all"]
    written = json.loads((run / "checkpoint_best-test.json").read_text(encoding="utf-8"))
    assert [score["language"] for score in written["scores"]] == [*LANGUAGES, "all"]


def train_command(data: Path, save_dir: Path, *flags: str) -> list[str | Path]:
    return ["xlm_ds.train", data, f"--save-dir={save_dir}", *SHAPE, *flags]


NO_DROPOUT = ["--dropout=0", "--attention-dropout=0"]


@pytest.fixture(scope="module")
def one_rank_losses(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    save_dir = tmp_path_factory.mktemp("one_rank")
    flags = ["--max-update=4", "--global-batch-tokens=256", *NO_DROPOUT]
    succeed(*MODULE, *train_command(tiny_data, save_dir, *flags))
    return losses_in(save_dir)


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_two_ranks_give_one_ranks_losses(
    stage: int, one_rank_losses: dict[int, float], tiny_data: Path, tmp_path: Path
) -> None:
    template = json.loads((CONFIG_DIRECTORY / "zero1_fp32.json").read_text(encoding="utf-8"))
    template["zero_optimization"]["stage"] = stage
    (tmp_path / "ds.json").write_text(json.dumps(template), encoding="utf-8")
    flags = ["--max-update=4", "--global-batch-tokens=256", *NO_DROPOUT]
    flags += [f"--deepspeed_config={tmp_path / 'ds.json'}"]
    succeed(*launcher(tmp_path, 2), *train_command(tiny_data, tmp_path / "run", *flags))
    assert losses_in(tmp_path / "run") == pytest.approx(one_rank_losses, abs=1e-4)


def test_two_ranks_at_stage_1_continue_on_one_at_stage_3(
    one_rank_losses: dict[int, float], tiny_data: Path, tmp_path: Path
) -> None:
    flags = ["--global-batch-tokens=256", *NO_DROPOUT]
    run = tmp_path / "run"
    first = train_command(tiny_data, run, *flags, "--max-update=2")
    succeed(*launcher(tmp_path, 2), *first)
    template = json.loads((CONFIG_DIRECTORY / "zero1_fp32.json").read_text(encoding="utf-8"))
    template["zero_optimization"]["stage"] = 3
    (tmp_path / "ds.json").write_text(json.dumps(template), encoding="utf-8")
    flags += [f"--deepspeed_config={tmp_path / 'ds.json'}", "--max-update=4"]
    succeed(*MODULE, *train_command(tiny_data, run, *flags))
    assert losses_in(run) == pytest.approx(one_rank_losses, abs=1e-3)


@pytest.mark.slow
def test_two_ranks_at_stage_3_learn_from_pairs_what_one_does(
    parallel_data: Path, tmp_path: Path
) -> None:
    template = json.loads((CONFIG_DIRECTORY / "zero1_fp32.json").read_text(encoding="utf-8"))
    template["zero_optimization"]["stage"] = 3
    (tmp_path / "ds.json").write_text(json.dumps(template), encoding="utf-8")
    flags = ["--mlm-steps=ar,hi-en,en-ar", "--max-update=4", "--global-batch-tokens=512"]
    flags += ["--tokens-per-sample=64", "--max-tokens=256", *NO_DROPOUT]
    one, two = tmp_path / "one", tmp_path / "two"
    succeed(*MODULE, *train_command(parallel_data, one, *flags))
    flags += [f"--deepspeed_config={tmp_path / 'ds.json'}"]
    succeed(*launcher(tmp_path, 2), *train_command(parallel_data, two, *flags))
    assert losses_in(two) == pytest.approx(losses_in(one), abs=1e-4)
    result = call(*MODULE, "xlm_ds.prove", one, two)
    assert "samples: identical to update 4" in result.stdout
    tables = [
        succeed(*launched, "xlm_ds.evaluate", one / checkpoint.LAST, parallel_data, "--split=valid")
        for launched in (MODULE, launcher(tmp_path, 2))
    ]
    rows = [[line for line in text.splitlines() if " hi-en " in line][-1] for text in tables]
    assert rows[0].strip() == rows[1].split("] ")[-1].strip()


def start(*command: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_update(process: subprocess.Popen[str], save_dir: Path, update: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "ended before the update was reached"
        if (save_dir / "metrics.jsonl").exists() and max(losses_in(save_dir), default=0) >= update:
            return
        time.sleep(0.05)
    raise AssertionError(f"update {update} not reached in 120 s")


def whole_and_killed(tmp_path: Path, tiny_data: Path, prefix: list[str | Path]) -> None:
    """An uninterrupted run, and one that is killed -9 somewhere and started again: bit-equal losses.

    Languages' shares and the mask ratio change before, after and in between.
    """
    flags = ["--max-update=12", "--save-interval-updates=2"]
    flags += ["--sampling-alpha=0.7@0,0@3,1@5,0.3@9", "--mask-ratio=0.15@0,0.3@5,0.2@10"]
    succeed(*prefix, *train_command(tiny_data, tmp_path / "whole", *flags))
    command = train_command(tiny_data, tmp_path / "killed", *flags)
    process = start(*prefix, *command)
    wait_for_update(process, tmp_path / "killed", 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert max(losses_in(tmp_path / "killed")) < 12
    assert "going on from" in succeed(*prefix, *command)
    assert losses_in(tmp_path / "killed") == losses_in(tmp_path / "whole")


def test_kill_9_and_resume(tiny_data: Path, tmp_path: Path) -> None:
    whole_and_killed(tmp_path, tiny_data, [*MODULE])


@pytest.mark.slow
def test_kill_9_and_resume_on_two_ranks(tiny_data: Path, tmp_path: Path) -> None:
    whole_and_killed(tmp_path, tiny_data, launcher(tmp_path, 2))


@pytest.mark.slow
def test_full_width_with_95000_symbols(tiny_corpus: Path, tmp_path: Path) -> None:
    """xlm_base as it is: 174 million parameters, three real updates of the recipe's 2,048 tokens."""
    vocabulary = tmp_path / "vocab"
    texts = [(tiny_corpus / f"train.{lg}").read_text(encoding="utf-8") for lg in LANGUAGES]
    words = list(Counter(word for text in texts for word in text.split()))
    words += [f"filler{i}" for i in range(94_995 - len(words))]
    vocabulary.write_text("".join(f"{word} 1\n" for word in words), encoding="utf-8")
    out, run = tmp_path / "out", tmp_path / "run"
    prefs = [f"--{split}pref={tiny_corpus / split}" for split in ("train", "valid")]
    langs = ",".join(LANGUAGES)
    succeed(*MODULE, "xlm_ds.binarize", f"--srcdict={vocabulary}", *prefs, f"--langs={langs}",
            f"--destdir={out}")  # fmt: skip
    flags = ["--max-update=3", "--lr=1e-3", "--log-interval=1", "--init-output-bias=zeros"]
    succeed(*MODULE, "xlm_ds.train", out, f"--save-dir={run}", *flags)
    losses = losses_in(run)
    assert losses[3] < losses[1] == pytest.approx(math.log2(95_000), abs=1)
    manifest = checkpoint.read_manifest(run / checkpoint.LAST)
    weights = checkpoint.load_tensors(run / checkpoint.LAST, manifest, "weight")
    # Spec of xlm_base at V = 95,000, less the unused pooler and two of five rows of the language table.
    assert sum(w.numel() for w in weights.values()) == 175_322_904 - (1024**2 + 1024) - 2 * 1024


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, code: int, tiny_data: Path, tmp_path: Path
) -> None:
    process = start(*MODULE, *train_command(tiny_data, tmp_path, "--max-update=100000"))
    wait_for_update(process, tmp_path, 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "the same command goes on from" in output
    saved = checkpoint.read_manifest(tmp_path / checkpoint.LAST)
    assert saved["progress"]["update"] >= 2


@pytest.mark.slow
def test_ctrl_c_saves_on_all_ranks(tiny_data: Path, tmp_path: Path) -> None:
    """The terminal sends SIGINT to the whole process group; the launcher then sends SIGTERM too."""
    run = tmp_path / "run"
    process = start(*launcher(tmp_path, 2), *train_command(tiny_data, run, "--max-update=100000"))
    wait_for_update(process, run, 2)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the same command goes on from" in output
    assert (run / checkpoint.LAST / "manifest.json").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_bad_input_ends_with_code_2_and_one_sentence(stage: str) -> None:
    result = call(*MODULE, f"xlm_ds.{stage}", "--no-such-flag")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"{stage}: error: unknown flag --no-such-flag")


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_the_flags(stage: str) -> None:
    assert "--config" in succeed(*MODULE, "xlm_ds", stage, "--help")
