"""Cross-lingual transfer of a pretrained model: trained on English sentences, tested in every language.

    python benchmarks/finetune.py RUN CLASSIFICATION --work FOLDER

RUN is a pretrained checkpoint (or a run: its best), CLASSIFICATION a folder with {train,valid,test}.LANG.tsv whose row
i is the same sentence in every language. Accuracies of
    zero-shot     the pretrained network, trained on --source alone
    untrained     the same network with random weights, trained the same way
    bag of words  logistic regression on tf-idf of the model's own subwords, trained on --source alone
    in language   the pretrained network, trained on the tested language: what transfer could reach at most
each network with several seeds. Learning rate and pooling, for the pretrained and the untrained network apart, and the
bag's regularisation are chosen by the accuracy on the --source validation texts alone (of a tie, the first); no figure
of another language has decided anything but which epoch of `in language` is its best. Intervals are of a paired
bootstrap over the test sentences, the same ones in all languages, each with the mean of its seeds.

A run that is done is not done again: give the same --work to go on.
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
from numpy.typing import NDArray

from xlm_ds.checkpoint import checkpoint_folder, read_manifest
from xlm_ds.labelled import find_labelled
from xlm_ds.text_ids import TextToIds

PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ZERO_SHOT, UNTRAINED, BAG, CEILING = "zero-shot", "untrained", "bag of words", "in language"
GOAL_POINTS = 8.0
Correct = dict[
    str, NDArray[np.float64]
]  # by language (N,): of each test sentence, the share of seeds that are right


class Setting(NamedTuple):
    """What is chosen on the validation texts."""

    lr: float
    pooling: str


class Job(NamedTuple):
    """One fine-tuning."""

    setting: Setting
    seed: int
    language: str
    random_weights: bool

    @property
    def name(self) -> str:
        kind = "untrained" if self.random_weights else "pretrained"
        return f"{kind}-{self.language}-{self.setting.pooling}-{self.setting.lr:g}-seed{self.seed}"


class Outcome(NamedTuple):
    valid: float  # accuracy in percent, in the language trained on, of the best epoch
    correct: Correct


# ---------------------------------------------------------------------------------------- networks


def finetuned(job: Job, arguments: argparse.Namespace) -> Outcome:
    """Runs it, unless it has run, and keeps its figures without its checkpoints."""
    folder = arguments.work / job.name
    result = folder / "outcome.json"
    made_of = {"model": read_manifest(checkpoint_folder(arguments.model))["manifest_sha256"],
               "data": str(arguments.data), "epochs": arguments.epochs, "batch_size": arguments.batch_size,
               "deepspeed_config": str(arguments.deepspeed_config)}  # fmt: skip
    if result.exists() and json.loads(result.read_text(encoding="utf-8")).get("made_of") != made_of:
        sys.exit(f"{result}: of another model, data or flags; give another --work, or delete it")
    if not result.exists():
        config = arguments.deepspeed_config
        command = [sys.executable, "-m", "xlm_ds.finetune", str(checkpoint_folder(arguments.model)),
                   str(arguments.data), f"--save-dir={folder}", f"--train-langs={job.language}",
                   f"--lr={job.setting.lr}", f"--pooling={job.setting.pooling}", f"--seed={job.seed}",
                   f"--max-epoch={arguments.epochs}", f"--batch-size={arguments.batch_size}", "--warmup-updates=20",
                   *(["--random-weights"] if job.random_weights else []),
                   *([f"--deepspeed_config={config}"] if config else [])]  # fmt: skip
        begun = time.monotonic()
        path = os.pathsep.join(filter(None, [str(harness.ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | harness.CHILD_ENVIRONMENT | {"PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{job.name}: failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        tested = json.loads((folder / "test.json").read_text(encoding="utf-8"))
        best = read_manifest(folder / "checkpoint_best")["progress"]["best_accuracy"]
        content = {"made_of": made_of, "valid": best, "languages": tested["languages"]}
        result.write_text(json.dumps(content), encoding="utf-8")
        for checkpoint in folder.glob("checkpoint*"):
            checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint)
        print(f"{job.name}: {best:.1f} % on valid, {time.monotonic() - begun:.0f} s", flush=True)
    content = json.loads(result.read_text(encoding="utf-8"))
    correct = {
        language: (np.array(found["labels"]) == np.array(found["predicted"])).astype(np.float64)
        for language, found in content["languages"].items()
    }
    return Outcome(content["valid"], correct)


def run_all(jobs: Sequence[Job], arguments: argparse.Namespace) -> dict[Job, Outcome]:
    with ThreadPoolExecutor(arguments.jobs) as threads:
        return dict(
            zip(jobs, threads.map(lambda job: finetuned(job, arguments), jobs), strict=True)
        )


def choose(outcomes: dict[Job, Outcome], random_weights: bool) -> tuple[Setting, dict[str, float]]:
    """The setting with the best mean over the seeds on the validation texts, and the means of all."""
    by_setting: dict[Setting, list[float]] = {}
    for job, outcome in outcomes.items():
        if job.random_weights == random_weights:
            by_setting.setdefault(job.setting, []).append(outcome.valid)
    means = {setting: float(np.mean(values)) for setting, values in by_setting.items()}
    best = max(means, key=lambda setting: means[setting])
    return best, {f"{s.pooling}, lr {s.lr:g}": value for s, value in means.items()}


def mean_correct(outcomes: Sequence[Outcome]) -> Correct:
    return {
        language: np.mean([outcome.correct[language] for outcome in outcomes], axis=0)
        for language in outcomes[0].correct
    }


# ------------------------------------------------------------------------------------ bag of words


def bag_of_words(
    data: Path, folder: Path, source: str, languages: Sequence[str]
) -> tuple[Correct, dict[str, Any]]:
    """Trained on `source`; its penalty is the best on the validation texts of `source`."""
    files, to_ids = find_labelled(data), TextToIds.load(folder)
    size = len(to_ids.dictionary)

    def read(split: str, language: str) -> tuple[torch.Tensor, list[str]]:
        examples = files.read(split, language).examples
        counts = [np.bincount(to_ids(e.texts[0], language), minlength=size) for e in examples]
        return torch.from_numpy(np.stack(counts)).float(), [e.label for e in examples]

    counts, labels = read("train", source)
    names = sorted(set(labels))
    inverse = torch.log((1 + len(counts)) / (1 + (counts > 0).sum(dim=0))) + 1

    def features(counts: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(counts.log1p() * inverse, dim=1)

    targets = torch.tensor([names.index(label) for label in labels])

    def fitted(penalty: float) -> torch.nn.Linear:
        model = torch.nn.Linear(size, len(names))
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=200, line_search_fn="strong_wolfe"
        )
        inputs = features(counts)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            loss = loss + penalty * model.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return model

    def right(model: torch.nn.Linear, split: str, language: str) -> NDArray[np.float64]:
        found, expected = read(split, language)
        with torch.no_grad():
            predicted = model(features(found)).argmax(dim=1).tolist()
        return np.array(
            [names[p] == label for p, label in zip(predicted, expected, strict=True)], np.float64
        )

    models = {penalty: fitted(penalty) for penalty in PENALTIES}
    valid = {p: 100 * float(right(m, "valid", source).mean()) for p, m in models.items()}
    best = max(valid, key=lambda penalty: valid[penalty])
    tested = {language: right(models[best], "test", language) for language in languages}
    return tested, {"penalty": best, "valid": {f"{p:g}": value for p, value in valid.items()}}


# ----------------------------------------------------------------------------------------- figures


def differences(
    one: Correct, other: Correct, languages: Sequence[str], transfer: Sequence[str], draws: int
) -> dict[str, dict[str, float]]:
    """By language, and of the mean over `transfer`: points that `one` is better by, with its 95 % interval."""
    table = 100 * np.stack([one[language] - other[language] for language in languages])  # (L, N)
    table = np.vstack(
        [table, table[[languages.index(language) for language in transfer]].mean(axis=0)]
    )
    count = table.shape[1]
    draw = np.random.default_rng(0)
    means = np.stack(
        [table[:, draw.integers(count, size=count)].mean(axis=1) for _ in range(draws)]
    )
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    names = [*languages, "transfer"]
    return {
        name: {"points": float(table[i].mean()), "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate(names)
    }


def percent(
    correct: Correct, languages: Sequence[str], transfer: Sequence[str]
) -> dict[str, float]:
    by_language = {language: 100 * float(correct[language].mean()) for language in languages}
    return {
        **by_language,
        "transfer": float(np.mean([by_language[language] for language in transfer])),
    }


def show(content: dict[str, Any], languages: Sequence[str]) -> None:
    columns = [*languages, "transfer"]
    print(f"{'accuracy %':<28}" + "".join(f"{name:>22}" for name in columns))
    for name, row in content["accuracy"].items():
        print(f"{name:<28}" + "".join(f"{row[column]:>22.1f}" for column in columns))
    for name, row in content["differences"].items():
        cells = (
            f"{r['points']:+.1f} [{r['low']:+.1f}, {r['high']:+.1f}]"
            for r in (row[c] for c in columns)
        )
        print(f"{name:<28}" + "".join(f"{cell:>22}" for cell in cells))
    for goal in content["goals"]:
        print(
            f"goal  {goal['goal']}: {goal['points']:+.1f}, {'reached' if goal['reached'] else 'NOT reached'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a checkpoint's folder, or a run's")
    parser.add_argument("data", type=Path, help="folder with {train,valid,test}.LANG.tsv")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--source", default="en", help="language trained on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--poolings", nargs="+", default=["first", "mean"])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        help="as of finetune: zero1_bf16.json is faster where the processor has bf16",
    )
    parser.add_argument("--draws", type=int, default=10_000, help="of the bootstrap")
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="runs at a time, a thread each",
    )
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "finetune.json")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    machine, source = harness.machine(), arguments.source
    folder = checkpoint_folder(arguments.model).resolve()
    manifest = read_manifest(folder)
    tested = find_labelled(arguments.data).languages("test")
    languages = [language for language in manifest["languages"] if language in tested]
    transfer = [language for language in languages if language != source]

    settings = [Setting(*pair) for pair in itertools.product(arguments.lrs, arguments.poolings)]
    seeds = range(arguments.seeds)
    grid = [
        Job(s, seed, source, fresh) for fresh in (False, True) for s in settings for seed in seeds
    ]
    outcomes = run_all(grid, arguments)
    chosen, means = choose(outcomes, random_weights=False)
    chosen_untrained, means_untrained = choose(outcomes, random_weights=True)
    ceilings = run_all(
        [Job(chosen, seed, lg, False) for lg in transfer for seed in seeds], arguments
    )
    outcomes |= ceilings

    def mean(setting: Setting, language: str, random_weights: bool) -> Correct:
        return mean_correct([outcomes[Job(setting, s, language, random_weights)] for s in seeds])

    correct = {
        ZERO_SHOT: mean(chosen, source, False),
        UNTRAINED: mean(chosen_untrained, source, True),
        CEILING: {language: mean(chosen, language, False)[language] for language in languages},
    }
    correct[BAG], bag = bag_of_words(arguments.data, folder, source, languages)
    compared = {
        f"{ZERO_SHOT} - {other}": differences(
            correct[ZERO_SHOT], correct[other], languages, transfer, arguments.draws
        )
        for other in (UNTRAINED, BAG, CEILING)
    }
    gains = {
        other: compared[f"{ZERO_SHOT} - {other}"]["transfer"]["points"]
        for other in (UNTRAINED, BAG)
    }
    content = {
        "benchmark": "finetune",
        "command": shlex.join(["python", "benchmarks/finetune.py", *sys.argv[1:]]),
        "machine": machine,
        "versions": harness.versions([]) | {"deepspeed": harness.version_of("deepspeed")},
        "about": {
            "model": {k: manifest["configuration"][k] for k in ("model", "data", "optimization")},
            "updates": manifest["progress"]["update"],
            "source": source,
            "transfer": "the mean over all languages but the source",
            "test_sentences": len(correct[ZERO_SHOT][source]),
            "seeds": arguments.seeds,
            "epochs": arguments.epochs,
            "batch_size": arguments.batch_size,
            "deepspeed_config": str(arguments.deepspeed_config or "zero1_fp32.json"),
            "draws": arguments.draws,
        },
        "chosen_on_source_valid": {
            ZERO_SHOT: {"lr": chosen.lr, "pooling": chosen.pooling, "valid": means},
            UNTRAINED: {
                "lr": chosen_untrained.lr, "pooling": chosen_untrained.pooling, "valid": means_untrained,
            },
            BAG: bag,
        },
        "accuracy": {name: percent(found, languages, transfer) for name, found in correct.items()},
        "differences": compared,
        "goals": [
            {
                "goal": f"{ZERO_SHOT}, points above {other} in the mean over languages not trained on",
                "least": GOAL_POINTS,
                "points": points,
                "reached": points >= GOAL_POINTS,
            }
            for other, points in gains.items()
        ],
        "runs": {
            job.name: {
                "valid": outcome.valid,
                **{lg: 100 * float(values.mean()) for lg, values in outcome.correct.items()},
            }
            for job, outcome in outcomes.items()
        },
    }  # fmt: skip
    show(content, languages)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
