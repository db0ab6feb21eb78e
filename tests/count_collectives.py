"""The collectives of an update by the flags of plan, counted on some ranks: torchrun … count_collectives.py CASE …

A case is a JSON object: "flags" of plan, and "zero", what is changed in the ZeRO block. Rank 0 prints for each a line:
[[what, number, bytes of all, passes], …] as xlm_ds.costs.collectives has them, and as they were counted, in JSON.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import deepspeed.comm.comm
import torch
import torch.distributed as dist

from xlm_ds import plan
from xlm_ds.batches import MaskedBatch
from xlm_ds.config import PlanConfig
from xlm_ds.costs import collectives
from xlm_ds.deepspeed_config import resolve_deepspeed_config
from xlm_ds.devices import this_cpu
from xlm_ds.engine import COLLECTIVES, Engine, start_ranks, stop_ranks
from xlm_ds.flags import parse
from xlm_ds.model import build_model

UPDATES = 3  # the last is counted: ZeRO 3 learns the order of its layers in the first
# One that gloo has not, and does as an all-reduce.
PASSES = {"all_reduce": 2, "reduce_scatter_tensor": 2, "all_gather_into_tensor": 1}

counted: list[tuple[str, float, int]] = []  # name, bytes, numbers
depth = 0


def counting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        global depth
        if depth == 0:
            whole = max((a for a in arguments if isinstance(a, torch.Tensor)), key=torch.numel)
            counted.append((name, whole.nbytes, whole.numel()))
        depth += 1
        try:
            return collective(*arguments, **options)
        finally:
            depth -= 1

    return call


def as_counted() -> list[list[Any]]:
    kinds: dict[tuple[str, int], list[float]] = {}
    for name, size, numbers in counted:
        what = "weights" if PASSES[name] == 1 else "norm" if numbers == 1 else "gradients"
        kind = kinds.setdefault((what, PASSES[name]), [0, 0])
        kind[0] += 1
        kind[1] += size
    return sorted([what, *kind, passes] for (what, passes), kind in kinds.items())


torch.set_num_threads(1)
ranks = start_ranks()
for module in (dist, deepspeed.comm, deepspeed.comm.comm):
    for name in COLLECTIVES:
        if hasattr(module, name):
            setattr(module, name, counting(name, getattr(module, name)))
for case in map(json.loads, sys.argv[1:]):
    config = parse(PlanConfig, case["flags"])
    ground = plan.Ground(this_cpu(), ranks.world_size, 1)
    facts = plan.read_facts(config)
    job = plan.build_job(config.data, config.model, config.optimization, config.run, facts, ground)
    zero = job.settings["zero_optimization"] | case["zero"]
    job = dataclasses.replace(job, settings=job.settings | {"zero_optimization": zero})
    rows, accumulation, _ = job.geometry
    settings = resolve_deepspeed_config(
        job.settings, config.optimization, rows=rows, accumulation=accumulation
    )
    engine = Engine(build_model(job.shape, seed=0), settings, ranks)
    engine.train()
    masked = torch.cat([torch.arange(1, job.masked + 1) + row * job.tokens for row in range(rows)])
    for _ in range(UPDATES):
        counted.clear()
        for _ in range(accumulation):
            ids = torch.full((rows, job.tokens), 7)
            languages = torch.zeros(rows, dtype=torch.int64)
            batch = MaskedBatch(ids, languages, masked, ids.flatten()[masked], False)
            engine.backward(engine(batch).sum() / len(masked))
            engine.step(1e-4)
    predicted: dict[tuple[str, int], list[float]] = {}
    for sent in collectives(job):
        kind = predicted.setdefault((sent.what, sent.passes), [0, 0])
        kind[0] += sent.number
        kind[1] += sent.number * sent.size
    said = sorted([what, *kind, passes] for (what, passes), kind in predicted.items())
    if ranks.rank == 0:
        sys.stdout.write(json.dumps({"predicted": said, "counted": as_counted()}) + "\n")
        sys.stdout.flush()
stop_ranks()
