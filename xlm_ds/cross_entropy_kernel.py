"""Softmax cross-entropy in Triton, in place: a program per row of logits. Imported only where Triton is.

Written from the mathematics (linear_cross_entropy.py); the running maximum and sum are the online softmax of
Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns a program holds at a time
WARPS = 8


@triton.jit
def _row(
    logits,
    bias,
    targets,
    losses,
    columns,
    row_stride,
    IGNORE: tl.constexpr,
    WRITES_GRADIENT: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss, and over its logits the gradient of it."""
    row = tl.program_id(0).to(tl.int64)  # row * row_stride is beyond 2^31 at 22,600 rows of 95,000
    logits += row * row_stride
    target = tl.load(targets + row)
    counts = target != IGNORE
    offsets = tl.arange(0, BLOCK)

    # Lane by lane first, so that the block is reduced once and not once in every turn.
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + offsets < columns
        z = tl.load(logits + start + offsets, inside, float("-inf")).to(tl.float32)
        z += tl.load(bias + start + offsets, inside, 0.0).to(tl.float32)
        before = highest
        highest = tl.maximum(highest, z)
        # A lane that has seen -inf only: exp(-inf - -inf) would be NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(before - base) + tl.exp(z - base)
    maximum = tl.max(highest, 0)
    log_sum = maximum + tl.log(tl.sum(total * tl.exp(highest - maximum), 0))

    at_target = tl.load(logits + target).to(tl.float32) + tl.load(bias + target).to(tl.float32)
    tl.store(losses + row, tl.where(counts, log_sum - at_target, 0.0))

    if WRITES_GRADIENT:
        tl.debug_barrier()  # a thread may overwrite what another reads above
        for start in range(0, columns, BLOCK):
            column = start + offsets
            inside = column < columns
            z = tl.load(logits + column, inside, float("-inf")).to(tl.float32)
            z += tl.load(bias + column, inside, 0.0).to(tl.float32)
            gradient = tl.exp(z - log_sum) - tl.where(column == target, 1.0, 0.0)
            gradient = tl.where(counts, gradient * GRADIENT_SCALE, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), inside)


def cross_entropy_(
    logits: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    gradient_scale: float | None,
) -> Tensor:
    """Losses (N,) in fp32 nats of logits (N, V) plus bias (V,); a row's columns must lie side by side.

    With a `gradient_scale` softmax - onehot times that is left in `logits`, 0 in the rows of `ignore_index`.
    """
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _row[(rows,)](
        logits,
        bias,
        targets,
        losses,
        columns,
        logits.stride(0),
        IGNORE=ignore_index,
        WRITES_GRADIENT=gradient_scale is not None,
        GRADIENT_SCALE=gradient_scale or 0.0,
        BLOCK=min(BLOCK, triton.next_power_of_2(columns)),
        num_warps=WARPS,
    )
    return losses
