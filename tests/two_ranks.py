"""Two ranks against plain AdamW on the whole batch, for test_engine.py: torchrun … two_ranks.py NAME …"""

import sys

import torch

from test_engine import OPTIMIZATION, ROWS, plain_adamw, random_batch, settings_of, small_model
from xlm_ds.batches import MaskedBatch
from xlm_ds.engine import Engine, start_ranks


def half_of(batch: MaskedBatch, rank: int) -> MaskedBatch:
    rows, tokens = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2), batch.input_ids.shape[1]
    masked = slice(3 * rows.start, 3 * rows.stop)
    return batch._replace(
        input_ids=batch.input_ids[rows],
        languages=batch.languages[rows],
        masked_positions=batch.masked_positions[masked] - rows.start * tokens,
        targets=batch.targets[masked],
    )


torch.set_num_threads(1)
ranks = start_ranks()
updates = 3
model, _ = plain_adamw(updates)
before = small_model().state_dict()
for name in sys.argv[1:]:
    settings = settings_of(name, int(name[4]))
    settings["train_micro_batch_size_per_gpu"] = ROWS // 2
    engine = Engine(small_model(), settings, ranks)
    for update in range(updates):
        # DeepSpeed takes the mean over the ranks.
        loss = engine(half_of(random_batch(update), ranks.rank)).sum() * (2 / (3 * ROWS))
        engine.backward(loss)
        engine.step(OPTIMIZATION.lr)
    engine.check()
    moved = torch.cat([(e["weight"] - before[key]).flatten() for key, e in engine.state()])
    wanted = torch.cat([(p - before[key]).flatten() for key, p in model.state_dict().items()])
    difference = float((moved - wanted).norm() / wanted.norm())
    if ranks.rank == 0:
        sys.stdout.write(f"{name} {difference}\n")
    assert difference < (1e-4 if "fp32" in name else 0.1), f"{name}: {difference}"
