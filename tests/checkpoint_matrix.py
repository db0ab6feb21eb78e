"""Checkpoints of each stage and precision, made or gone on from by some ranks, for test_checkpoint.py.

    torchrun … checkpoint_matrix.py save DATA FOLDER
    torchrun … checkpoint_matrix.py continue DATA FOLDER

FOLDER has a DeepSpeed JSON of each. What `save` makes with N ranks is in FOLDER/NAME-of-N, and what becomes of it
without an interruption in FOLDER/save-N.jsonl; `continue` goes on from all that are there, once with each JSON, and
writes continue-N.jsonl.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from test_train import SHAPE
from xlm_ds import checkpoint
from xlm_ds.checkpoint import Progress
from xlm_ds.config import TrainConfig
from xlm_ds.corpus import micro_batch, update_targets
from xlm_ds.digests import Digests
from xlm_ds.engine import Engine, Ranks, adam_steps, start_ranks, stop_ranks
from xlm_ds.flags import parse
from xlm_ds.lifeline import LOGS
from xlm_ds.log import InputError
from xlm_ds.run import Run, begin_run
from xlm_ds.run import save as begin_save
from xlm_ds.schedule import lr_at

# 12 samples, which 1 to 4 ranks share in 3, 2, 1 and 1 micro-batches of 4, 3, 4 and 3 rows.
FLAGS = [*SHAPE, "--global-batch-tokens=384", "--dropout=0", "--attention-dropout=0"]
FLAGS += ["--warmup-updates=9"]  # so that no two updates have the same rate
# ZeRO 3 leaves another one in its process, which in bf16 rounds otherwise: a run has a process of its own.
PLAIN_LINEAR = torch.nn.functional.linear
BEFORE, AFTER, SKIPPED = 4, 3, 1  # updates; SKIPPED is the number of the one that is left out


@contextlib.contextmanager
def begun(folder: Path, name: str, data: str, ranks: Ranks) -> Iterator[tuple[Run, Progress]]:
    """The run in `folder` with the JSON of that name: a new one, or gone on with."""
    torch.nn.functional.linear = PLAIN_LINEAR
    flags = [data, f"--save-dir={folder}", f"--deepspeed_config={folder.parent / name}.json"]
    ranks.on_first(lambda: (folder / LOGS).mkdir(parents=True, exist_ok=True))
    config = parse(TrainConfig, [*flags, *FLAGS])
    run, progress = begin_run(config, ranks, hosts=["here"] * ranks.world_size)
    with contextlib.closing(run.log):
        yield run, progress


def advance(run: Run, progress: Progress, updates: int) -> tuple[Progress, list[float]]:
    """The progress after so many updates, and their losses in nats, over all ranks."""
    corpus, geometry, engine, ranks = run.corpus, run.geometry, run.engine, run.ranks
    digests = Digests(
        None,
        progress.chains,
        interval=1,
        computed="",
        masters=engine.master_fragments,
        sum_over_ranks=ranks.sum,
    )
    found = []
    engine.train()
    for _ in range(updates):
        targets = update_targets(corpus, geometry, first=progress.samples)
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(geometry.accumulation):
            first = geometry.first_sample(progress.samples, micro, ranks.rank)
            batch = micro_batch(corpus, geometry, first=first)
            digests.add(batch, first)
            losses = engine(batch)
            scale = geometry.accumulation * ranks.world_size / targets
            bad = float("nan") if progress.update == SKIPPED else 1.0
            engine.backward(losses.sum() * (scale * bad))
            engine.step(lr_at(progress.update, run.config.optimization, progress.plateau))
            total += losses.detach().double().sum()
        found.append(float(ranks.sum(total)) / targets)
        digests.end_update(progress.update + 1, progress.samples, geometry.batch)
        progress = dataclasses.replace(
            progress,
            update=progress.update + 1,
            samples=progress.samples + geometry.batch,
            skipped_updates=engine.skipped_updates(),
        )
    engine.check()
    return dataclasses.replace(progress, chains=digests.write()), found


def outcome(engine: Engine, progress: checkpoint.Progress, losses: list[float]) -> dict[str, Any]:
    """What two runs are compared by."""
    return {
        "losses": losses,
        "samples_chain": progress.chains[:16],
        "parameters_chain": progress.chains[16:],
        "adam_steps": sorted(adam_steps(engine._engine)),
        "update": progress.update,
        "skipped": progress.skipped_updates,
    }


def state_digest(engine: Engine) -> str:
    """Of all weights and moments."""
    state = hashlib.sha256()
    for name, kinds in engine.state():
        for kind in checkpoint.TENSORS:
            state.update(f"{name} {kind}".encode() + kinds[kind].numpy().tobytes())
    return state.hexdigest()


def save(folder: Path, name: str, data: str, ranks: Ranks) -> dict[str, Any]:
    here = f"{name}-of-{ranks.world_size}"
    with begun(folder / here, name, data, ranks) as (run, progress):
        progress, _ = advance(run, progress, BEFORE)
        begin_save(run, progress, [checkpoint.LAST])
        run.saver.finish()
        end = advance(run, progress, AFTER)
        return {"saved": here, "state": state_digest(run.engine)} | outcome(run.engine, *end)


def go_on(folder: Path, name: str, data: str, ranks: Ranks) -> dict[str, Any]:
    here = f"{name}-of-{ranks.world_size}"
    with begun(folder, name, data, ranks) as (run, progress):
        assert progress.update == BEFORE
        end = advance(run, progress, AFTER)
        state = {"state": state_digest(run.engine)} if here == folder.name else {}
        return {"saved": folder.name, "continued": here} | state | outcome(run.engine, *end)


def refusal(run: Path, file: str, ranks: Ranks) -> str:
    """What all ranks say of a copy of the run whose checkpoint has lost this file."""
    copy = run.with_name(f"damaged-{ranks.world_size}")

    def make() -> None:
        shutil.copytree(run, copy, symlinks=True)
        (copy / checkpoint.LAST / file).unlink()

    ranks.on_first(make)
    try:
        checkpoint.find_whole(copy, checkpoint.LAST, ranks)
        said = "nothing"
    except InputError as error:
        said = str(error)
    ranks.on_first(lambda: shutil.rmtree(copy))
    (sentence,) = set(ranks.gathered(said))
    return str(sentence)


def main(what: str, data: str, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = start_ranks()
    gc.freeze()  # or each collection looks through all modules, half a second
    names = sorted(path.stem for path in folder.glob("*.json"))
    runs = sorted(path for path in folder.iterdir() if "-of-" in path.name)
    with (folder / f"{what}-{ranks.world_size}.jsonl").open("a", encoding="utf-8") as file:

        def note(content: dict[str, Any]) -> None:
            if ranks.rank == 0:
                file.write(json.dumps(content) + "\n")
                file.flush()
            gc.collect()  # engines are cycles

        if what == "save":
            for name in names:
                note(save(folder, name, data, ranks))
        else:
            for run in runs:
                for name in names:
                    note(go_on(run, name, data, ranks))
            lost = "exp_avg-00003-of-00004.safetensors"
            note({"refused": refusal(folder / f"{names[0]}-of-4", lost, ranks)})
    stop_ranks()


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
