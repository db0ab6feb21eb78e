"""The benchmarks run to their end: ids compared, the table and the JSON written."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL_TEXT = ["--megabytes=0.3", "--slice-megabytes=0.1"]


def benchmark(
    name: str, output: Path, *arguments: str, fails: bool = False
) -> tuple[dict[str, Any], str]:
    """(its JSON, what it printed)."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), f"--output={output}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return (
        {} if fails else json.loads(output.read_text(encoding="utf-8"))
    ), done.stdout + done.stderr


def write_text(folder: Path, words: int = 400) -> tuple[Path, Path]:
    """(text, its vocabulary): made without prepare, which has tests of its own."""
    symbols = [f"wört{number}" for number in range(words)]
    lines = [" ".join(symbols[i % words] for i in range(k, k + k % 40)) for k in range(600)]
    text, vocabulary = folder / "text.txt", folder / "vocabulary"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    vocabulary.write_text("".join(f"{symbol} 9\n" for symbol in symbols[:-5]), encoding="utf-8")
    return text, vocabulary


def check_result(result: dict[str, Any], printed: str, ours: str) -> dict[str, dict[str, Any]]:
    """What holds for all three; returns the contenders by name."""
    rows = {row["name"]: row for row in result["contenders"]}
    for name, row in rows.items():
        assert f"\n{name}  " in printed
        # Less its start-up, a command is quicker than nothing now and then, for so little text.
        assert row["cpu_seconds"] > 0 or "command" in name
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    assert rows[ours]["ratio"] == {"median": 1, "min": 1, "max": 1}
    for name, reason in result["skipped"].items():
        assert f"skipped  {name}: {reason}" in printed
    assert {goal["goal"] for goal in result["goals"]}
    assert result["machine"]["cores"] >= 1
    assert {"xlm_ds", "numpy", "torch"} <= set(result["versions"])
    return rows


def test_binarize(tmp_path: Path) -> None:
    text, vocabulary = write_text(tmp_path)
    result, printed = benchmark(
        "binarize", tmp_path / "b.json", str(text), str(vocabulary), *SMALL_TEXT, "--rounds=1", "--no-peers"
    )  # fmt: skip
    rows = check_result(result, printed, "xlm_ds, 1 worker")
    assert {"fairseq-like loop", "Python loop", "xlm_ds command, 1 worker"} <= set(rows)
    assert set(result["skipped"]) >= {"HF WordLevel encode_batch", "HF WordLevel encode_batch_fast"}
    # The same tokens for the same text, of a dictionary with other ids too; the command gets it three times.
    per_text = {n: r["tokens"] / r["bytes"] for n, r in rows.items() if "tokens" in r}
    whole = [per_text[n] for n in per_text if n.startswith("xlm_ds")]
    assert max(whole) == pytest.approx(min(whole), rel=1e-12)


def test_other_ids_end_the_run(tmp_path: Path) -> None:
    """HF tokenizers does not know U+001C as a blank, which Python and fairseq do: it gives other ids."""
    text, vocabulary = write_text(tmp_path)
    text.write_text(text.read_text(encoding="utf-8").replace("wört7 ", "wört7\x1c"), "utf-8")
    _, printed = benchmark(
        "binarize", tmp_path / "b.json", str(text), str(vocabulary), *SMALL_TEXT, "--rounds=1", fails=True
    )  # fmt: skip
    assert "HF WordLevel encode_batch: failed" in printed
    assert not (tmp_path / "b.json").exists()


def test_bpe(tmp_path: Path) -> None:
    codes, vocabulary = tmp_path / "codes", tmp_path / "vocabulary"
    codes.write_text("w ö 9\nr t 8\nwö rt 7\n1 2</w> 5\n", encoding="utf-8")
    pieces = ["wört@@", *map(str, range(10)), *(f"{digit}@@" for digit in range(10)), "12"]
    vocabulary.write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    text, _ = write_text(tmp_path)
    result, printed = benchmark(
        "bpe", tmp_path / "b.json", str(text), str(codes), str(tmp_path / "vocabulary"), *SMALL_TEXT,
        "--rounds=3", "--no-peers",
    )  # fmt: skip
    rows = check_result(result, printed, "xlm_ds, unique text")
    ours, other = (result["rounds"][name] for name in ("xlm_ds, repeated text", "wc -l"))
    ratios = [
        (mine["bytes"] / mine["cpu_seconds"]) / (theirs["bytes"] / theirs["cpu_seconds"])
        for mine, theirs in zip(ours, other, strict=True)
    ]
    expected = {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}
    assert len(ratios) == 3
    assert rows["wc -l"]["ratio"] == pytest.approx(expected)
    skipped = {f"{peer}, {text}" for peer in ("fastBPE", "subword-nmt", "HF tokenizers BPE", "gigatoken (of bytes)")
               for text in ("unique text", "repeated text")}  # fmt: skip
    assert skipped <= set(result["skipped"])


def test_loader_and_the_figure_of_its_result(tmp_path: Path) -> None:
    text, vocabulary = write_text(tmp_path)
    result, printed = benchmark(
        "loader", tmp_path / "loader.json", str(text), str(vocabulary), "--million-tokens=0.2", "--rounds=1",
        "--no-peers",
    )  # fmt: skip
    rows = check_result(result, printed, "xlm_ds")
    ours = {"xlm_ds", "xlm_ds fill_batch", "xlm_ds, one of 8 ranks"}
    assert set(rows) == {*ours, "numpy memmap loop"}
    assert all(row["first_batch_seconds"] > 0 for row in rows.values())
    assert set(result["skipped"]) == {"HF datasets + MLM collator", "mosaicml-streaming", "litdata"}
    picture = tmp_path / "ratios.svg"
    command = [
        sys.executable,
        str(BENCHMARKS / "figure.py"),
        f"--results={tmp_path}",
        f"--output={picture}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    drawn = picture.read_text(encoding="utf-8")
    assert "numpy memmap loop" in drawn
    assert ">xlm_ds<" not in drawn
    assert f"Python {result['machine']['python']}" in done.stdout


TINY = ["--vocab-size=500", "--rows=2", "--tokens=32", "--layers=1", "--dim=32"]


@pytest.mark.slow
def test_step_cpu(tmp_path: Path) -> None:
    result, printed = benchmark("step_cpu", tmp_path / "s.json", *TINY, "--rounds=1", "--no-peers")
    rows = check_result(result, printed, "xlm_ds fp32")
    losses = result["about"]["first_losses_without_dropout"]
    assert losses["xlm_ds fp32"] == pytest.approx(losses["fairseq-like fp32"], rel=1e-5)
    assert rows["xlm_ds bf16"]["loss"] == pytest.approx(losses["xlm_ds bf16"], rel=0.05)
    assert rows["xlm_ds fp32, rows 2 times as long"]["tokens"] == rows["xlm_ds fp32"]["tokens"]
    assert "need 4 rows" in result["skipped"]["xlm_ds fp32, rows 4 times as long"]


@pytest.mark.slow
def test_step_gpu_without_one(tmp_path: Path) -> None:
    """Every section runs, on a CPU; the processes compute the same, and what was not measured is said to be."""
    result, printed = benchmark(
        "step_gpu", tmp_path / "s.json", "--device=cpu", "--small", "--no-peers", "--budget=3000"
    )
    assert result["skipped"] == {"HF XLM bf16": "--no-peers"}
    losses = result["losses without dropout"]
    assert len(losses) == 8
    for name, (first, _, last) in losses.items():
        assert first == pytest.approx(losses["fairseq-like fp32"][0], rel=2e-3), name
        assert last < first, name
    rows = {row["name"]: row for row in result["contenders"]}
    assert all(row["wall_seconds"] > 0 for row in rows.values())
    # Ours by hand, 2 rows of 32 tokens: 2 layers of 64, 10 masked tokens, 500 words.
    forward = 64 * 2 * (24 * 64**2 + 4 * 32 * 64) + 10 * 2 * (500 * 64 + 64**2)
    assert rows["xlm_ds"]["useful_flops"] == 3 * forward
    assert rows["xlm_ds, large vocabulary"]["vocab_size"] == 1000
    for section in ("ceilings", "products", "attention", "optimizer", "one row"):
        assert all(row["what"] for row in result[section])
    assert len(result["profile"]["top"]) == 20
    assert {row["loss, most"] < 0.05 for row in result["cross-entropy"]} == {True}
    measured = {goal["goal"] for goal in result["goals"]}
    assert "of plain torch's rate" in measured
    assert "goal  times HF's XLM: not measured" in printed
    assert "host synchronisations of 3 steady steps: not measured" in printed


def test_step_gpu_without_time(tmp_path: Path) -> None:
    """What cannot be finished is not begun, and listed; the result is written all the same."""
    result, printed = benchmark(
        "step_gpu", tmp_path / "s.json", "--device=cpu", "--small", "--budget=1"
    )
    assert {"ceilings", "ladder", "other sizes", "attention"} <= set(result["skipped"])
    assert result["contenders"] == []
    assert "skipped  ladder: 0 s were left, and it may take" in printed


def test_scale_says_what_it_needs(tmp_path: Path) -> None:
    """Where there is no ip and no tc."""
    script = BENCHMARKS / "scale.py"
    command = [sys.executable, str(script), f"--output={tmp_path / 's.json'}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "PATH": ""}
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("scale.py needs root, ip and tc")
    assert not list(tmp_path.iterdir())
