"""The curves are drawn from the run's own lines, also those of a run that was resumed."""

import json
from pathlib import Path

import pytest

from xlm_ds import report
from xlm_ds.log import InputError


def write_run(folder: Path, records: list[dict[str, object]]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def record(kind: str, update: int, loss: float) -> dict[str, object]:
    return {"kind": kind, "update": update, "loss_per_language": {"ar": loss}, "lr": 1e-3}


def test_a_png_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path, [record("train", 1, 9.0), record("train", 2, 8.0), record("valid", 2, 8.5)])
    assert report.main([str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_unigram_level_is_drawn(tmp_path: Path) -> None:
    """Half the level's perplexity is one bit below it."""
    run = write_run(
        tmp_path,
        [{**record("train", u, 9.0), "loss_at_mask": 9.0, "below_unigram": 50.0} for u in (1, 2)],
    )
    report.draw_curves(report.read_metrics(run), tmp_path / "curves.png")
    assert report.unigram_levels(report.read_metrics(run)) == [(1, 10.0), (2, 10.0)]


def test_the_later_line_of_a_resumed_update_counts(tmp_path: Path) -> None:
    write_run(tmp_path, [record("train", 1, 9.0), record("train", 2, 5.0), record("train", 2, 8.0)])
    losses = [r["loss_per_language"]["ar"] for r in report.read_metrics(tmp_path)]
    assert losses == [9.0, 8.0]


def test_half_a_line_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a loss of power leaves in the middle of a file that goes on."""
    write_run(tmp_path, [record("train", 1, 9.0)])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "tr\n' + json.dumps(record("train", 3, 7.0)) + "\n")
    with caplog.at_level("INFO", logger="xlm_ds"):
        assert [r["update"] for r in report.read_metrics(tmp_path)] == [1, 3]
    assert "line 2: left out" in caplog.text


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        report.read_metrics(tmp_path)
    write_run(tmp_path, [record("train", 1, 9.0)])
    with pytest.raises(InputError, match=r"ends in \.png"):
        report.main([str(tmp_path), "--output", str(tmp_path / "x.xyz")])
