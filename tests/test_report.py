"""The page says what the run's files say, reads well wide and narrow, light and dark, and needs no network."""

import html.parser
import json
import math
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from xlm_ds import report
from xlm_ds.log import InputError
from xlm_ds.run_folder import read_metrics, read_run

SECONDS = {"data": 1.0, "forward_backward": 7.0, "optimizer": 1.0, "checkpoint": 0.5, "other": 0.5}


def train(update: int, **more: Any) -> dict[str, Any]:
    """A line of training; ten seconds each."""
    return {
        "kind": "train", "update": update, "loss": 9.0 - update / 100, "lr": 1e-3, "gradient_norm": 1.5,
        "loss_per_language": {"ar": 9.5 - update / 100, "de-en": 8.5 - update / 100}, "tokens_per_second": 4e3,
        "loss_at_mask_per_language": {"ar": 9.0, "de-en": 8.0}, "below_unigram": 50.0, "seconds": SECONDS,
        "below_unigram_per_language": {"ar": 50.0, "de-en": -100.0},
    } | more  # fmt: skip


def valid(update: int, loss: float) -> dict[str, Any]:
    return {
        "kind": "valid", "update": update, "loss": loss, "perplexity": 2 ** min(loss, 700), "below_unigram": 12.34,
        "loss_per_language": {"ar": loss + 0.25, "de-en": loss - 0.25},
        "loss_at_mask_per_language": {"ar": loss + 1}, "below_unigram_per_language": {"ar": 12.5},
    }  # fmt: skip


RECORDS = [
    *(train(update) for update in (10, 20, 30)),
    valid(10, 8.9), valid(20, 8.1), valid(30, 8.4),
    {"kind": "retrieve", "update": 30, "cosine": {"de-en": 10.25, "en-de": 11.5},
     "margin": {"de-en": 20.5, "en-de": 21.25}},
]  # fmt: skip
LOG = """2026-11-23 10:00:00 | INFO | xlm_ds | vm, process 1, cpu, of 1 ranks
2026-11-23 10:01:00 | WARNING | xlm_ds | the <gradient> is not finite
2026-11-23 10:02:00 | INFO | xlm_ds | going on from run/checkpoint_1_10: update 10, 80 samples
2026-11-23 10:02:00 | INFO | xlm_ds | going on from run/checkpoint_1_10: update 10, 80 samples
no line of a log
"""


def write_run(folder: Path, records: list[dict[str, Any]] | None = None, **settings: Any) -> Path:
    """A run's folder with all that a page can tell, beside its data."""
    data = folder.parent / f"{folder.name}-data"
    for path in (folder / "checkpoint_last", data):
        path.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records or RECORDS)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    values = {
        "data": str(data), "monolingual_langs": ["ar", "de", "en"], "sampling_alpha": 0.5, "tlm_share": 0.25,
        "lr": 0.001,
    } | settings  # fmt: skip
    toml = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    (folder / "config.toml").write_text(f"[all]\n{toml}", encoding="utf-8")
    manifest = {"blocks": {"ar": 400, "de": 100, "de-en": 50}, "progress": {"samples": 1000}}
    (folder / "checkpoint_last" / "manifest.json").write_text(
        json.dumps(manifest), encoding="utf-8"
    )
    for name, tokens in (("ar", 4000), ("de-en.de", 300), ("de-en.en", 200)):
        record = {"tokens": tokens, "unknown": tokens // 100}
        (data / f"train.{name}.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "train.log").write_text(LOG, encoding="utf-8")
    (folder / "ended.json").write_text('{"exit_code": 0, "what": "done"}', encoding="utf-8")
    scores = [{
        "language": "ar", "masked_tokens": 1234, "loss": 7.125, "perplexity": 139.6, "accuracy": 12.345,
        "perplexity_at_mask": 160.25,
        "unigram_perplexity": 800.5, "below_unigram": 80.25,
    }]  # fmt: skip
    (folder / "checkpoint_best-test.json").write_text(
        json.dumps({"scores": scores}), encoding="utf-8"
    )
    return folder


class Tables(html.parser.HTMLParser):
    """The cells of each table, by its title and in rows; and what the page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.loads: list[str] = []
        self.ids: list[str] = []
        self._title = ""
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [v or "" for k, v in attrs if k == "id"]
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag == "script":
            self.loads.append("script")
        if tag == "table":
            self._title = given["data-title"] or ""
            self.tables[self._title] = []
        elif tag == "tr":
            self.tables[self._title].append([])
        elif tag in ("td", "th"):
            self._in_cell = True
            self.tables[self._title][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[self._title][-1][-1] += data


def tables_of(*runs: Path) -> dict[str, list[list[str]]]:
    return Tables(report.page([read_run(run) for run in runs])).tables


# ----------------------------------------------------------------------------------------- numbers


def test_the_numbers_are_the_files(tmp_path: Path) -> None:
    tables = tables_of(write_run(tmp_path / "run"))
    assert tables["Validation"][1:] == [
        ["ar", "8.650", f"{2**8.65:.1f}", "8.350", "20", "9.400", "12.5"],
        ["de-en", "8.150", f"{2**8.15:.1f}", "7.850", "20", "", ""],
    ]
    assert tables["Retrieval"][1:] == [["de-en", "10.2", "20.5"], ["en-de", "11.5", "21.2"]]
    assert tables["Evaluation: checkpoint_best-test.json"][1] == [
        *("ar", "1,234", "7.125", "139.6", "12.35", "160.2", "800.5", "80.2"),
    ]
    drawn = {"ar": 50.0, "de": 25.0, "de-en": 25.0}  # roots of 400 and 100 share what pairs leave
    assert tables["Data"][1:] == [
        ["ar", "400", "4,000", "1.00", "72.7", f"{drawn['ar']:.1f}", "1.25"],
        ["de", "100", "not known", "not known", "18.2", f"{drawn['de']:.1f}", "2.50"],
        ["de-en", "50", "500", "1.00", "9.1", f"{drawn['de-en']:.1f}", "5.00"],
    ]
    assert tables["Events"] == [
        ["2026-11-23 10:01:00", "the <gradient> is not finite"],
        ["2026-11-23 10:02:00", "going on from run/checkpoint_1_10: update 10, 80 samples"],
    ]
    assert ["lr", "0.001"] in tables["Configuration"]


def test_what_is_drawn_is_what_was_measured(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    ar, ar_valid, ar_level, pair, _, pair_level = report.loss_lines(run, float)
    assert (ar.label, ar.points) == ("ar", [(10, 9), (20, 9), (30, 9)])
    assert (ar_valid.style, ar_valid.points) == ("o", [(10, 9.9), (20, 9.1), (30, 9.4)])
    assert ar_level.points == [(10, 10), (20, 10), (30, 10)]  # at half its perplexity
    assert (pair.label, pair_level.points) == ("de-en", [(10, 7), (20, 7), (30, 7)])  # at twice it
    assert ar.colour == ar_valid.colour == ar_level.colour != pair.colour
    hours = [run.hours_at(update) for update in (10, 20, 30)]
    assert hours == pytest.approx([10 / 3600, 20 / 3600, 30 / 3600])
    state = f"{run.folder}: update 30, 0.01 hours of computing; done"
    assert report.state_of(run).startswith(state)
    titles = [chart.title for chart in report.charts_of(run)]
    assert titles == [
        "Loss at <mask> (dots: validation, dotted: unigram level) over updates",
        "The same over hours", report.BELOW,
        "Retrieval, margin", "Learning rate", "Norm of the gradient",
        "Tokens per second", "Where the time goes",
    ]  # fmt: skip


def test_other_charts_are_drawn_from_the_records_too(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    drawn = {drawing.title: drawing for drawing in report.drawings_of(run)}

    def points(title: str) -> dict[str, Any]:
        return {line.label: list(line.points) for line in drawn[title].lines}

    hours = [(run.hours_at(update), 9) for update in (10, 20, 30)]
    assert drawn["The same over hours"].lines[0].points == hours
    below = points(report.BELOW)
    assert below == {"ar": [(10, 12.5), (20, 12.5), (30, 12.5)]}
    assert points("Retrieval, margin") == {"de-en": [(30, 20.5)], "en-de": [(30, 21.25)]}
    assert points("Learning rate") == {"": [(10, 1e-3), (20, 1e-3), (30, 1e-3)]}
    assert points("Norm of the gradient") == {"": [(10, 1.5), (20, 1.5), (30, 1.5)]}
    assert points("Tokens per second") == {"": [(10, 4e3), (20, 4e3), (30, 4e3)]}
    shares = report.time_shares(run)
    assert shares["forward_backward"] == [(10, 70), (20, 70), (30, 70)]
    losses = {line.label: line.points for line in report.valid_lines([run], ["run"])}
    assert losses == {"run": [(10, 8.9), (20, 8.1), (30, 8.4)]}


def test_passes_are_of_all_that_was_drawn(tmp_path: Path) -> None:
    """Also where the shares have changed since: 200 samples as they are (4 to 1), then 100 of each alike."""
    run = write_run(tmp_path / "run", sampling_alpha="1.0@0,0.0@200samples", tlm_share=0.0)
    manifest = json.loads((run / "checkpoint_last" / "manifest.json").read_text(encoding="utf-8"))
    manifest |= {"blocks": {"ar": 400, "de": 100}, "progress": {"samples": 400}}
    (run / "checkpoint_last" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    rows = {row[0]: row for row in tables_of(run)["Data"][1:]}
    assert [rows[name][-2:] for name in ("ar", "de")] == [["50.0", "0.65"], ["50.0", "1.40"]]


def test_faults_and_skipped_updates_are_events(tmp_path: Path) -> None:
    """As the run writes them: a traceback follows its line in the log, and what is skipped stands in the figures."""
    records = [train(10), train(20, skipped_updates=2), train(30, skipped_updates=3)]
    run = write_run(tmp_path / "run", records)
    (run / "train.log").write_text(
        "2026-11-23 10:00:00 | ERROR | xlm_ds | after update 12:\n"
        "Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n'
        "ValueError: no\n",
        encoding="utf-8",
    )
    assert tables_of(run)["Events"] == [
        ["", "2 skipped by update 20, as the gradient was not finite; 2 in all"],
        ["", "1 skipped by update 30, as the gradient was not finite; 3 in all"],
        ["2026-11-23 10:00:00", "after update 12: ValueError: no"],
    ]


@pytest.mark.parametrize("bits", [math.nan, math.inf, 2000.0])
def test_a_run_that_has_diverged_is_shown(tmp_path: Path, bits: float) -> None:
    records = [train(10), valid(10, 8.5), train(20, loss=bits), valid(20, bits)]
    records[2]["loss_at_mask_per_language"] = {"ar": bits, "de-en": bits}
    run = write_run(tmp_path / "run", records)
    records[3]["below_unigram_per_language"] = {"ar": -bits * 1e300}
    rows = {row[0]: row for row in tables_of(run)["Validation"][1:]}
    assert rows["ar"][3:5] == ["8.750", "10"]
    assert max(len(cell) for cell in rows["ar"]) < 10
    assert report.main([str(run), "--output", str(tmp_path / "x.svg")]) == 0


@pytest.mark.parametrize("streams", [29, 100])
def test_many_languages_have_room(tmp_path: Path, streams: int) -> None:
    """Warnings are errors here, and matplotlib has one for a chart that its legend leaves no room."""
    losses = {f"l{number}": 9.0 for number in range(streams)}
    keys = ("loss_per_language", "loss_at_mask_per_language", "below_unigram_per_language")
    records = [{**train(update), **dict.fromkeys(keys, losses)} for update in (10, 20)]
    page = report.page([read_run(write_run(tmp_path / "run", records))])
    assert f"{streams - len(report.COLOURS)} others" in page


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name)) for name in ("a/_run $x", "b/_run $x")]
    assert report.names_of(runs) == ["a/_run $x", "b/_run $x"]
    page = report.page(runs)
    assert all(f"{tmp_path}/{name}/_run $x: update 30" in page for name in "ab")
    assert report.names_of(runs[:1]) == ["_run $x"]
    alone = [read_run(runs[0].folder), read_run(write_run(tmp_path / "c"))]
    assert " _run $x" in report.comparison(alone, report.names_of(alone)).charts[0].svg


def test_runs_are_compared_by_what_differs(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", [*RECORDS[:3], valid(30, 7.5)], lr=0.002, seed=1)
    tables = tables_of(one, other)
    rows = {row[0]: row[1:] for row in tables["Different in their configurations"][1:]}
    assert rows["lr"] == ["0.001", "0.002"]
    assert rows["seed"] == ["not given", "1"]
    assert "tlm_share" not in rows
    assert tables["Last validation"][1:] == [
        ["update", "30", "30"],
        ["validation loss, bits", "8.400", "7.500"],
    ]


def test_a_finetuning_has_accuracies(tmp_path: Path) -> None:
    record = valid(10, 1.0) | {
        "accuracy": 50.0,
        "accuracy_per_language": {"ar": 40.0, "de-en": 60.5},
    }
    records = [train(10), record]
    for each in records:
        for key in ("loss_at_mask_per_language", "below_unigram_per_language"):
            del each[key]
    run = write_run(tmp_path / "run", records)
    drawn = report.charts_of(read_run(run))
    assert drawn[0].title == "Loss (dots: validation) over updates"
    tested = {
        "languages": {"hi": {"examples": 204, "accuracy": 31.25, "labels": [], "predicted": []}}
    }
    (run / "test.json").write_text(json.dumps(tested), encoding="utf-8")
    tables = tables_of(run)
    assert tables["Validation"][1][-1] == "40.0"
    assert tables["Classification: test.json"][1] == ["hi", "204", "31.2"]
    assert "Accuracy in validation" in [chart.title for chart in report.charts_of(read_run(run))]


def test_a_run_that_has_hardly_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert "going on, or ended without a word" in report.page([read_run(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train(1)) + "\n", encoding="utf-8")
    assert "unigram level) over updates" in report.page([read_run(tmp_path)])


# ------------------------------------------------------------------------------------------- files


def test_the_later_line_of_a_resumed_update_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [train(1), train(2, loss=5.0), train(2, loss=8.0)])
    assert [record["loss"] for record in read_metrics(run)] == [8.99, 8.0]


def test_a_run_that_went_back_shows_what_it_is_now(tmp_path: Path) -> None:
    """It came to 40, went on from a checkpoint of 10 with other figures, and is at 20."""
    attempts = [
        train(10),
        valid(10, 8.9),
        train(20),
        train(30),
        valid(30, 8.0),
        train(40),
        train(20),
    ]
    run = write_run(tmp_path / "run", attempts)
    assert [(r["kind"], r["update"]) for r in read_metrics(run)] == [
        ("train", 10), ("valid", 10), ("train", 20),
    ]  # fmt: skip


def test_half_a_line_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a loss of power leaves in the middle of a file that goes on."""
    run = write_run(tmp_path / "run", [train(1)])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "tr\n' + json.dumps(train(3)) + "\n")
    with caplog.at_level("INFO", logger="xlm_ds"):
        assert [r["update"] for r in read_metrics(run)] == [1, 3]
    assert "line 2: left out" in caplog.text


def test_what_is_no_score_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path / "run")
    for name, text in (("checkpoint_a-b.json", "[]"), ("checkpoint_c-d.json", '{"scores": [{}]}')):
        (run / name).write_text(text, encoding="utf-8")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    with caplog.at_level("INFO", logger="xlm_ds"):
        assert "checkpoint_a-b.json" not in report.page([read_run(run)])
    assert caplog.text.count("left out") == 3


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nosuch/metrics\.jsonl: not found; give the --save-dir"):
        report.main([str(tmp_path / "nosuch")])
    with pytest.raises(InputError, match="not found"):
        report.main([str(tmp_path)])
    with pytest.raises(InputError, match="RUNS is missing"):
        report.main([])
    run = write_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"ends in \.html, \.png"):
        report.main([str(run), "--output", str(tmp_path / "x.xyz")])
    with pytest.raises(InputError, match="not a file in a folder that is there"):
        report.main([str(run), "--output", str(tmp_path / "none" / "x.html")])
    with pytest.raises(InputError, match="a picture is of one run"):
        report.main([str(run), str(run), "--output", str(tmp_path / "x.png")])
    assert not (run / "report.html").exists()


def test_damaged_files_beside_the_figures_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "run")
    for name, text in (
        ("ended.json", "[]"),
        ("config.toml", "lr = ["),
        ("checkpoint_last/manifest.json", ""),
    ):
        (run / name).write_text(text, encoding="utf-8")
    with caplog.at_level("INFO", logger="xlm_ds"):
        assert report.main([str(run)]) == 0
    assert caplog.text.count("left out: ") == 3
    assert "Data" not in tables_of(run)


def test_several_runs_leave_the_page_of_the_first_as_it_is(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    assert report.main([str(one), str(other)]) == 0
    assert (one / "comparison.html").exists()
    assert not (one / "report.html").exists()


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert report.main([str(run), "--output", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_written_again_until_the_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    ended = (run / "ended.json").read_text(encoding="utf-8")
    (run / "ended.json").unlink()
    pages: list[str] = []

    def wait(seconds: float) -> None:
        assert seconds == report.WATCH_SECONDS
        pages.append((run / "report.html").read_text(encoding="utf-8"))
        with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(valid(40 + len(pages), 7.0)) + "\n")
        if len(pages) == 2:
            (run / "ended.json").write_text(ended, encoding="utf-8")

    monkeypatch.setattr(time, "sleep", wait)
    assert report.main([str(run), "--watch"]) == 0
    pages.append((run / "report.html").read_text(encoding="utf-8"))
    assert ["update 30," in pages[0], "update 41," in pages[1], "update 42," in pages[2]] == [
        True
    ] * 3
    refreshed = ['http-equiv="refresh"' in page for page in pages]
    assert refreshed == [True, True, False]  # the last is not to be loaded again for ever


# ----------------------------------------------------------------------------------------- browser


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = report.page([read_run(write_run(tmp_path / "run"))])
    loads = Tables(page).loads
    assert [target for target in loads if not target.startswith(("#", "data:"))] == []
    assert "@import" not in page
    assert "url(http" not in page


MEASURE = """<script>
addEventListener("load", () => {
  const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = rgb => rgb.reduce((sum, v, i) => sum + linear(v / 255) * [.2126, .7152, .0722][i], 0);
  const contrast = (a, b) => {
    const [most, least] = [light(a), light(b)].sort((p, q) => q - p);
    return (most + .05) / (least + .05);
  };
  const page = rgb(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll("h1, h2, h3, p, td, summary")].filter(e => e.innerText.trim());
  const least = Math.min(...texts.map(e => contrast(rgb(getComputedStyle(e).color), page)));
  const labels = [...document.querySelectorAll("svg text")];
  const onCard = e => rgb(getComputedStyle(e.closest(".card")).backgroundColor);
  const leastDrawn = Math.min(...labels.map(e => contrast(rgb(getComputedStyle(e).fill), onCard(e))));
  const drawn = labels.map(e => e.getBoundingClientRect().height).filter(height => height > 0);
  const found = { width: document.documentElement.scrollWidth, inner: innerWidth, least, leastDrawn, page,
    smallest: Math.min(...drawn), charts: document.querySelectorAll("svg").length };
  document.title = JSON.stringify(found);
});
</script></head>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    page = report.page([read_run(write_run(tmp_path / name)) for name in ("one", "other")])
    ids = Tables(page).ids
    assert len(ids) == len(set(ids)) > 100
    path = tmp_path / "page.html"
    path.write_text(page.replace("</head>", MEASURE), encoding="utf-8")
    # A frame, as a window of chromium is not narrower than 500.
    frame = f'<iframe src="page.html" style="width: {width}px; height: 3000px; border: 0"></iframe>'
    (tmp_path / "frame.html").write_text(
        f'{frame}<script>addEventListener("load", () => document.title = frames[0].document.title)</script>',
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,3000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=3000", "--dump-dom",
            str(tmp_path / "frame.html"),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    found = json.loads(title.replace("&quot;", '"'))
    assert found["inner"] == width
    assert found["width"] <= width  # nothing to scroll sideways but tables
    assert min(found["least"], found["leastDrawn"]) >= 4.5  # WCAG 2.1, AA
    assert (sum(found["page"]) < 200) == dark
    assert found["smallest"] >= 8  # CSS pixels
    assert found["charts"] == page.count("<svg") > 10
