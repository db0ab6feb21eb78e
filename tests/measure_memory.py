"""Two updates as a run on one CPU makes them, by the flags of plan; prints the predicted and the measured peak."""

import json
import re
import sys
from pathlib import Path

import torch

from xlm_ds import plan
from xlm_ds.batches import MaskedBatch
from xlm_ds.config import PlanConfig
from xlm_ds.costs import peak
from xlm_ds.deepspeed_config import resolve_deepspeed_config
from xlm_ds.devices import this_cpu
from xlm_ds.engine import Engine, start_ranks
from xlm_ds.flags import parse
from xlm_ds.model import build_model


def main() -> None:
    config = parse(PlanConfig, sys.argv[1:])
    ground = plan.Ground(this_cpu(), 1, 1)
    facts = plan.read_facts(config)
    job = plan.build_job(config.data, config.model, config.optimization, config.run, facts, ground)
    rows, accumulation, _ = job.geometry
    settings = resolve_deepspeed_config(
        job.settings, config.optimization, rows=rows, accumulation=accumulation
    )
    engine = Engine(build_model(job.shape, seed=0), settings, start_ranks())
    engine.train()
    positions = [torch.arange(1, job.masked + 1) + row * job.tokens for row in range(rows)]
    for _ in range(2 * accumulation):
        ids = torch.randint(5, job.shape.vocab_size, (rows, job.tokens))
        masked = torch.cat(positions)
        batch = MaskedBatch(
            ids, torch.zeros(rows, dtype=torch.int64), masked, ids.flatten()[masked], False
        )
        engine.backward(engine(batch).sum() / len(masked))
        engine.step(1e-4)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kib = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert kib is not None
    sys.stdout.write(json.dumps({"predicted": peak(job), "measured": 1024 * int(kib[1])}) + "\n")


if __name__ == "__main__":
    main()
