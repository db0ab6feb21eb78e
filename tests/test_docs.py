"""What the documentation tells people to type is run, with less text and fewer updates; its links and figures hold."""

import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from test_end_to_end import call

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DEMO = Path(__file__).parent / "data" / "demo"
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md"), *DOCS.glob("*/*.md")})
RECIPES = DOCS / "recipes.md"

# In a page's commands: less of everything.
CODES, EPOCHS = ("--bpe-codes 8000", "--bpe-codes 300"), ("--max-epoch 10", "--max-epoch 1")
SMALL_RUN = {
    "max-update": 3,
    "max-tokens": 512,
    "encoder-layers": 1,
    "encoder-embed-dim": 32,
    "encoder-ffn-embed-dim": 64,
    "warmup-updates": 1,
    "decay-updates": 1,
    "validate-interval-updates": 3,
    "save-interval-updates": 3,
}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, content) of each fenced block."""
    text = page.read_text(encoding="utf-8")
    return ((m[1], m[2]) for m in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S))


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each line of a page's shell blocks, continued lines joined."""
    for language, content in blocks(page):
        if language == "sh":
            for line in content.replace("\\\n", " ").splitlines():
                yield shlex.split(line, comments=True)


# ------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading"


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_is_one_screen() -> None:
    """What a README is for: anything longer has a page of its own."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 140


# What the README calls the contenders of the benchmarks, in the order of its figures; "a / b" are their CPU-seconds.
CONTENDERS = {
    "fairseq's loop, rewritten": ["fairseq-like loop"],
    "Hugging Face WordLevel, its fast call": ["HF WordLevel encode_batch_fast"],
    "a plain Python loop": ["Python loop"],
    "fastBPE and a dictionary": ["fastBPE, unique text", "fastBPE, repeated text"],
    "Hugging Face tokenizers": [
        "HF tokenizers BPE, unique text",
        "HF tokenizers BPE, repeated text",
    ],
    "gigatoken": ["gigatoken (of bytes), unique text", "gigatoken (of bytes), repeated text"],
    "gigatoken, which is faster there": [
        "gigatoken (of bytes), unique text",
        "gigatoken (of bytes), repeated text",
    ],
    "Hugging Face datasets and collator": ["HF datasets + MLM collator"],
    "litdata": ["litdata"],
    "a numpy loop over a memmap": ["numpy memmap loop"],
    "fairseq-like, all logits": ["fairseq-like fp32", "bf16, times a fairseq-like step"],
    "Hugging Face XLM": ["HF XLM fp32", "HF XLM fp32 / xlm_ds bf16"],
    "our network in plain torch": ["plain torch fp32", "plain torch bf16"],
}


def test_the_readmes_ratios_are_those_measured() -> None:
    """Each row of the table names its source, or has that of the row above."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| work | against |") :].split("\n\n")[0].splitlines()[2:]
    source = ""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    for _, against, figures, link in rows:
        found = re.search(r"\]\((.+)\)", link)
        source = found[1] if found else source
        result = json.loads((ROOT / source).read_text(encoding="utf-8"))
        ratios = {row["name"]: row["ratio"]["median"] for row in result["contenders"]}
        ratios |= {row["goal"]: row["median"] for row in result["goals"] if "median" in row}
        seconds = {row["name"]: row.get("cpu_seconds", 0.0) for row in result["contenders"]}

        def ratio(name: str, ratios: dict[str, float], seconds: dict[str, float]) -> float:
            other, _, ours = name.partition(" / ")
            return seconds[other] / seconds[ours] if ours else ratios[name]

        measured = [shown(ratio(name, ratios, seconds)) for name in CONTENDERS[against]]
        assert re.findall(r"(?<![\w.])\d+(?:\.\d+)?", figures) == measured, against
    assert len(rows) == len(CONTENDERS)


def shown(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}"


# ---------------------------------------------------------------------------- tutorial and README


@pytest.fixture(scope="module")
def own_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the tutorial's reader brings, and a small docs/tutorial.toml."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in ("raw", "para", "labelled", "docs"):
        (folder / name).mkdir()
    for language in ("de", "en", "fr"):
        lines = (DEMO / f"train.{language}").read_text(encoding="utf-8").splitlines()
        (folder / "raw" / f"{language}.txt").write_text("\n".join(lines[:400]), encoding="utf-8")
        for split, first in (("train", 400), ("valid", 440), ("test", 460)):
            rows = [f"{'long' if len(x) > 80 else 'short'}\t{x}" for x in lines[first : first + 20]]
            target = folder / "labelled" / f"{split}.{language}.tsv"
            target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    for split in ("train", "valid", "test"):
        for pair in ("de-en", "fr-en"):
            for language in pair.split("-"):
                # The corpus's own pairs are of other languages; to the commands, text is text.
                lines = (DEMO / f"train.{language}").read_text(encoding="utf-8").splitlines()
                target = folder / "para" / f"{split}.{pair}.{language}"
                target.write_text("\n".join(lines[:40]) + "\n", encoding="utf-8")
    settings = tomllib.loads((DOCS / "tutorial.toml").read_text(encoding="utf-8"))
    assert settings.keys() >= SMALL_RUN.keys()
    small = "".join(f"{key} = {json.dumps(x)}\n" for key, x in {**settings, **SMALL_RUN}.items())
    (folder / "docs" / "tutorial.toml").write_text(small, encoding="utf-8")
    return folder


def run_page(page: Path, folder: Path, smaller: Sequence[tuple[str, str]]) -> list[str]:
    """Runs its blocks in order and returns what each wrote."""
    text = page.read_text(encoding="utf-8")
    assert all(long in text for long, _ in smaller)
    outputs = []
    for language, content in blocks(page):
        for long, short in smaller:
            content = content.replace(long, short)
        # One port for each test run, as the launcher would take 29500 for all.
        content = content.replace("deepspeed ", f"deepspeed --master_port={port()} ")
        command = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
        if language in command:
            outputs.append(run([*command[language], content], folder))
    return outputs


def run(command: Sequence[str], folder: Path) -> str:
    result = call(*command, folder=folder)
    assert result.returncode == 0, f"{command[-1]}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout + result.stderr


def port() -> int:
    return 20000 + os.getpid() % 20000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorials_commands_run(own_texts: Path) -> None:
    output = "\n".join(run_page(DOCS / "tutorial.md", own_texts, [CODES, EPOCHS]))
    assert "(2, 32)" in output
    assert "BertForMaskedLM" in output
    assert "Classified(" in output
    made = ("run/report.html", "both.html", "ft/test.json", "hf/config.json", "fairseq/model.pt")
    assert not [name for name in made if not (own_texts / name).exists()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_readmes_commands_run(own_texts: Path, tmp_path: Path) -> None:
    for name in ("raw", "docs"):
        shutil.copytree(own_texts / name, tmp_path / name)
    run_page(ROOT / "README.md", tmp_path, [CODES])
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "hf" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_make_demo_makes_a_table_and_a_page(tmp_path: Path) -> None:
    """In this environment, with the demo's text and a smaller run."""
    settings = tomllib.loads((DOCS / "demo.toml").read_text(encoding="utf-8"))
    small = {**settings, **SMALL_RUN}
    toml = tmp_path / "small.toml"
    toml.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in small.items()), encoding="utf-8")
    here = [f"VENV={sys.prefix}", f"DEMO={tmp_path / 'demo'}", f"DEMO_CONFIG={toml}"]
    output = run(["make", "-o", "setup", *here, f"DEMO_PORT={port()}", "demo"], ROOT)
    assert re.search(r"^ +all +\d", output, re.M)
    assert (tmp_path / "demo" / "report.html").exists()


# ---------------------------------------------------------------------------------------- recipes


def recipe_plans() -> list[tuple[list[str], list[str]]]:
    """Each `plan` of the page that needs no data, and what the page says that it answers."""
    plans: list[tuple[list[str], list[str]]] = []
    last: list[str] = []
    for language, content in blocks(RECIPES):
        if language == "text":
            assert last, "output without its command"
            plans.append((last, content.splitlines()))
        words = shlex.split(content) if language == "sh" and "\nxlm-ds" not in content else []
        last = words if words[:2] == ["xlm-ds", "plan"] else []
    return plans


@pytest.mark.parametrize(("command", "lines"), recipe_plans())
def test_plan_says_what_the_recipes_say(command: list[str], lines: list[str]) -> None:
    answered = run([sys.executable, "-m", "xlm_ds", *command[1:]], ROOT).splitlines()
    assert lines
    assert [line for line in lines if line not in answered] == []
    hours = re.search(r"in ([\d.]+) hours", "\n".join(lines))
    gigabit = "12.5" in command  # the slower of two networks is not in the table
    if hours and not gigabit:
        assert f"| {hours[1]} for " in RECIPES.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["five", "fifteen", "hundred"])
def test_recipes_start(name: str, tmp_path: Path) -> None:
    """train --dry-run of each, on text of as many languages and pairs; with two layers, for which there is room."""
    from xlm_ds import binarize

    toml = DOCS / "recipes" / f"{name}.toml"
    settings = tomllib.loads(toml.read_text(encoding="utf-8"))
    data = settings.get("data", {})
    steps = (
        [f"x{n:02}" for n in range(100)]  # any names: all that there are
        if name == "hundred"
        else data.get("mlm-steps") or data["monolingual-langs"]
    )
    languages = [step for step in steps if "-" not in step]
    text = (DEMO / "train.en").read_text(encoding="utf-8").splitlines()[:40]
    for step in steps:
        for ending in [step] if step in languages else [f"{step}.{lg}" for lg in step.split("-")]:
            (tmp_path / f"text.{ending}").write_text("\n".join(text) + "\n", encoding="utf-8")
    out = tmp_path / "OUT"
    common = [f"--destdir={out}", "--workers=1"]

    def prefs(name: str) -> list[str]:
        return [f"--{split}pref={tmp_path / name}" for split in ("train", "valid")]

    assert binarize.main([*common, *prefs("text"), f"--langs={','.join(languages)}"]) == 0
    for pair in [step for step in steps if step not in languages]:
        source, target = pair.split("-")
        sides = [f"--source-lang={source}", f"--target-lang={target}"]
        dictionary = f"--srcdict={out / 'dict.txt'}"
        assert binarize.main([*common, *prefs(f"text.{pair}"), *sides, dictionary]) == 0
    answer = run(
        [
            *(sys.executable, "-m", "xlm_ds.train", str(out), "--config", str(toml)),
            *(
                "--save-dir",
                str(tmp_path / "run"),
                "--max-tokens=512",
                "--encoder-layers=2",
                "--dry-run",
            ),
        ],
        ROOT,
    )
    update = settings.get("optimization", settings)["global-batch-tokens"]
    assert f"An update is {update:,} tokens" in answer
    assert not (tmp_path / "run").exists()


def test_the_recipes_name_what_their_files_have() -> None:
    """Every file is in a command, and the languages in the commands are those of the file."""
    text = RECIPES.read_text(encoding="utf-8")
    files = {f"docs/recipes/{path.name}" for path in (DOCS / "recipes").iterdir()}
    assert files == set(re.findall(r"docs/recipes/\w+\.toml", text))
    five, fifteen = (
        tomllib.loads((DOCS / "recipes" / f"{name}.toml").read_text(encoding="utf-8"))["data"]
        for name in ("five", "fifteen")
    )
    assert f"--langs {','.join(five['monolingual-langs'])} " in text
    languages = [step for step in fifteen["mlm-steps"] if "-" not in step]
    pairs = [step for step in fifteen["mlm-steps"] if "-" in step]
    assert (len(languages), len(pairs)) == (15, 14)
    assert f"LANGS={','.join(languages)}\nPAIRS={','.join(pairs)}\n" in text


def test_stages_in_the_recipes_are_ours() -> None:
    """With their flags, as the parser knows them."""
    started = 0
    for words in commands(RECIPES):
        text = " ".join(words)
        for stage, rest in re.findall(r"(?:xlm-ds |-m xlm_ds\.|--module xlm_ds\.)(\w+)(.*)", text):
            known = help_of(stage)
            for flag in re.findall(r"(?<=\s)--[a-z][\w-]+", rest.split(" -- ")[0]):
                assert re.search(rf"{flag}\b", known), f"{stage} has no {flag}"
            started += 1
    assert started >= 15


def help_of(stage: str, shown_before: dict[str, str] = {}) -> str:  # noqa: B006 - asked once
    if stage not in shown_before:
        shown_before[stage] = run([sys.executable, "-m", "xlm_ds", stage, "--help"], ROOT)
    return shown_before[stage]
