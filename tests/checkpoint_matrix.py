"""Checkpoints of each stage and precision, made or gone on from by some ranks, for test_checkpoint.py.

    torchrun … checkpoint_matrix.py save DATA FOLDER
    torchrun … checkpoint_matrix.py continue DATA FOLDER

FOLDER has a DeepSpeed JSON of each. What `save` makes with N ranks is in FOLDER/NAME-of-N, and what becomes of it
without an interruption in FOLDER/save-N.jsonl; `continue` goes on from all that are there, once with each JSON, and
writes continue-N.jsonl.
"""

import dataclasses
import gc
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from test_train import SHAPE
from xlm_ds import checkpoint, train
from xlm_ds.architectures import shape_from_config
from xlm_ds.config import TrainConfig
from xlm_ds.corpus import Corpus, micro_batch, open_corpus, update_targets, with_sample_numbers
from xlm_ds.digests import Digests
from xlm_ds.engine import Engine, Ranks, adam_steps, start_ranks, stop_ranks
from xlm_ds.flags import parse
from xlm_ds.geometry import Geometry
from xlm_ds.log import InputError
from xlm_ds.schedule import lr_at

# 12 samples, which 1 to 4 ranks share in 3, 2, 1 and 1 micro-batches of 4, 3, 4 and 3 rows.
FLAGS = [*SHAPE, "--global-batch-tokens=384", "--dropout=0", "--attention-dropout=0"]
FLAGS += ["--warmup-updates=9"]  # so that no two updates have the same rate
# ZeRO 3 leaves another one in its process, which in bf16 rounds otherwise: a run has a process of its own.
PLAIN_LINEAR = torch.nn.functional.linear
BEFORE, AFTER, SKIPPED = 4, 3, 1  # updates; SKIPPED is the number of the one that is left out


def configuration(folder: Path, name: str, data: str) -> tuple[TrainConfig, Corpus]:
    """What train() makes of the flags."""
    flags = [data, f"--save-dir={folder}", f"--deepspeed_config={folder.parent / name}.json"]
    config = parse(TrainConfig, [*flags, *FLAGS])
    config = dataclasses.replace(config, data=with_sample_numbers(config.data, batch=12))
    corpus = open_corpus(config.data)
    return train.with_languages(config, corpus.languages), corpus


def build(
    config: TrainConfig, corpus: Corpus, saved: train.Saved | None, ranks: Ranks
) -> tuple[Engine, Geometry, checkpoint.Progress]:
    torch.nn.functional.linear = PLAIN_LINEAR
    geometry = train.run_geometry(config, saved, ranks.world_size)
    shape = shape_from_config(
        config.model,
        vocab_size=len(corpus.dictionary),
        languages=len(corpus.languages),
        tokens_per_sample=config.data.tokens_per_sample,
    )
    engine, progress = train.build_engine(config, corpus, geometry, shape, ranks, saved)
    return engine, geometry, progress


def advance(
    engine: Engine,
    config: TrainConfig,
    corpus: Corpus,
    geometry: Geometry,
    progress: checkpoint.Progress,
    updates: int,
) -> tuple[checkpoint.Progress, list[float]]:
    """The progress after so many updates, and their losses in nats, over all ranks."""
    ranks = engine.ranks
    digests = Digests(
        None,
        progress.chains,
        interval=1,
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
            engine.step(lr_at(progress.update, config.optimization, progress.plateau))
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
    config, corpus = configuration(folder / f"{name}-of-{ranks.world_size}", name, data)
    engine, geometry, progress = build(config, corpus, None, ranks)
    progress, _ = advance(engine, config, corpus, geometry, progress, BEFORE)
    saver = checkpoint.Saver(ranks)
    train.save(saver, config, corpus, geometry, engine, progress, [checkpoint.LAST])
    saver.finish()
    end = advance(engine, config, corpus, geometry, progress, AFTER)
    here = config.run.save_dir.name
    return {"saved": here, "state": state_digest(engine)} | outcome(engine, *end)


def go_on(run: Path, name: str, data: str, ranks: Ranks) -> dict[str, Any]:
    config, corpus = configuration(run, name, data)
    saved = checkpoint.find_whole(run, checkpoint.LAST, ranks)
    assert saved is not None
    engine, geometry, progress = build(config, corpus, saved, ranks)
    end = advance(engine, config, corpus, geometry, progress, AFTER)
    here = f"{name}-of-{ranks.world_size}"
    state = {"state": state_digest(engine)} if here == run.name else {}
    return {"saved": run.name, "continued": here} | state | outcome(engine, *end)


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
