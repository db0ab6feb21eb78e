"""Some ranks against plain AdamW on the whole batch, for test_engine.py: torchrun … parity_of_ranks.py NAME …"""

import sys

import torch

from test_engine import (
    OPTIMIZATION,
    ROWS,
    norm_tolerance,
    plain_adamw,
    random_batch,
    settings_of,
    small_model,
)
from xlm_ds.batches import MaskedBatch, on_device
from xlm_ds.checkpoint import TENSORS
from xlm_ds.digests import fragment_digest
from xlm_ds.engine import Engine, Ranks, start_ranks, stop_ranks

UPDATES = 3
OVERFLOWS = 16  # that fp16 is given to find its loss scale


def part_of(batch: MaskedBatch, ranks: Ranks) -> MaskedBatch:
    each = ROWS // ranks.world_size
    rows = slice(ranks.rank * each, (ranks.rank + 1) * each)
    masked = slice(3 * rows.start, 3 * rows.stop)
    part = batch._replace(
        input_ids=batch.input_ids[rows],
        languages=batch.languages[rows],
        masked_positions=batch.masked_positions[masked] - rows.start * batch.input_ids.shape[1],
        targets=batch.targets[masked],
    )
    return on_device(part, ranks.device)


def parts_of(engine: Engine) -> list[tuple[torch.Tensor, int]]:
    return [(part, offset) for _, offset, part in engine.master_fragments()]


torch.set_num_threads(1)
ranks = start_ranks()
model, _, norms = plain_adamw(UPDATES)
before = small_model().state_dict()
for name in sys.argv[1:]:
    settings = settings_of(name, int(name[4]), device=ranks.device.type)
    settings["train_micro_batch_size_per_gpu"] = ROWS // ranks.world_size
    engine = Engine(small_model(), settings, ranks)
    update = overflows = 0
    while update < UPDATES:
        # DeepSpeed takes the mean over the ranks.
        loss = engine(part_of(random_batch(update), ranks)).sum()
        engine.backward(loss * (ranks.world_size / (3 * ROWS)))
        engine.step(OPTIMIZATION.lr)
        applied = engine.skipped_updates() == overflows
        overflows += not applied
        norm = engine.gradient_norm() / norms[update] if applied else 1.0
        assert abs(norm - 1) < norm_tolerance(name), f"{name}: {norm} times the gradient"
        assert overflows <= OVERFLOWS * ("fp16" in name), f"{name}: update {update} is not applied"
        update += applied
    engine.check()
    state = {key: {k: v.cpu().clone() for k, v in e.items()} for key, e in engine.state()}
    moved = torch.cat([(e["weight"] - before[key]).flatten() for key, e in state.items()])
    wanted = torch.cat([(p - before[key]).flatten() for key, p in model.state_dict().items()])
    difference = float((moved - wanted).norm() / wanted.norm())
    if ranks.rank == 0:
        sys.stdout.write(f"{name} {difference}\n")
    assert difference < (1e-4 if "fp32" in name else 0.1), f"{name}: {difference}"
    if "fp16" not in name:  # whose scale would change
        last = ranks.rank == ranks.world_size - 1
        loss = engine(part_of(random_batch(0), ranks)).sum()
        engine.backward(loss * float("nan") if last else loss)
        engine.step(OPTIMIZATION.lr)
        engine.check()
        assert engine.skipped_updates() == 1, f"{name}: one rank's gradient is not finite"
        for key, values in engine.state():
            assert all(torch.equal(values[k].cpu(), state[key][k]) for k in values), (
                f"{name}: {key}"
            )
    sums = torch.stack([fragment_digest(*part) for part in parts_of(engine)])
    whole = torch.stack([fragment_digest(e["weight"].flatten(), 0) for e in state.values()])
    assert torch.equal(ranks.sum(sums.cpu()), whole), f"{name}: the parts are not the whole"
    resumed = Engine(small_model(), settings, ranks)
    batch = part_of(random_batch(0), ranks)
    by_kind = {kind: {key: e[kind] for key, e in state.items()} for kind in TENSORS}
    resumed.load_state(by_kind, update=UPDATES, samples=UPDATES * ROWS, warm_up_batch=batch)
    for key, values in resumed.state():
        assert all(torch.equal(values[k].cpu(), state[key][k]) for k in values), f"{name}: {key}"
stop_ranks()
