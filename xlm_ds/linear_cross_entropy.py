"""The loss of a large vocabulary: one matrix of logits, turned in place into its own gradient.

    losses = linear_cross_entropy(hidden, weight, bias, targets, ignore_index=PAD)   # (N,) fp32 nats

is F.cross_entropy(F.linear(hidden, weight).float() + bias, targets, reduction="none"), forward and backward, but the
logits (N, V) exist once, in the dtype of `hidden`, and what is done to them is one pass over memory for the log-sum-exp
and one for softmax - onehot. On CUDA both are a Triton kernel, a program per row; elsewhere torch does it, some rows at
a time. Sums are in fp32: near a log-probability of -10, bf16 steps are 1/16 wide.

With Z = H W' + b and P = softmax(Z), dL_i/dZ_i = P_i - onehot(t_i). The incoming gradient g (N,) is multiplied into the
small sides of the products and never into the (N, V): dH = g (dZ W), dW = dZ' (g H), db = dZ' g. In fp16, where g
has the loss scale and dZ has not, dZ is kept multiplied by a constant, or a probability of 1e-5 would have two digits.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128  # columns; a row of logits begins at a multiple of it, which matrix units want at any size of vocabulary
CHUNK_ELEMENTS = 1 << 22  # of logits in fp32 at a time, without the kernel: 16 MB
GRADIENT_SCALE_FP16 = 2.0**10
HAS_TRITON = importlib.util.find_spec("triton") is not None  # torch's CPU builds come without


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *, ignore_index: int
) -> Tensor:
    """Negative log-likelihood (N,) in fp32 nats of targets (N,); 0 where a target is `ignore_index`.

    `hidden` (N, d) and `weight` (V, d) have one dtype; `bias` (V,).
    """
    # Inside of an autograd function gradients are always off.
    losses: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, ignore_index, torch.is_grad_enabled()
    )
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        ignore_index: int,
        grad_enabled: bool,
    ) -> Tensor:
        wants_gradient = grad_enabled and any(ctx.needs_input_grad)
        ctx.gradient_scale = GRADIENT_SCALE_FP16 if hidden.dtype == torch.float16 else 1.0
        logits = _empty_logits(len(hidden), len(weight), hidden)
        torch.mm(hidden, weight.t(), out=logits)
        losses = _cross_entropy_(
            logits,
            bias,
            targets,
            ignore_index=ignore_index,
            gradient_scale=ctx.gradient_scale if wants_gradient else None,
        )
        if wants_gradient:
            ctx.save_for_backward(hidden, weight, logits)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, gradient = ctx.saved_tensors
        dtype = hidden.dtype
        scale = (grad_losses / ctx.gradient_scale)[
            :, None
        ]  # in fp32: bf16 would round all rows alike
        grad_hidden = ((gradient @ weight) * scale).to(dtype)
        grad_weight = gradient.t() @ (hidden * scale).to(dtype)
        # bf16's gradient.t() @ scale is ten times slower on a CPU. The largest is 1, so that equal ones are exact.
        largest = scale.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        grad_bias = (((scale / largest).to(dtype).t() @ gradient)[0] * largest).to(dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _empty_logits(rows: int, columns: int, like: Tensor) -> Tensor:
    """Its padding is zeros: oneDNN's bf16 product reads beyond the columns and multiplies what is there with 0, which a
    NaN survives (torch 2.13.0 on an AMD EPYC; at 301 and 302 columns of 384).
    """
    padded = -(-columns // TILE) * TILE
    whole = torch.empty(rows, padded, dtype=like.dtype, device=like.device)
    whole[:, columns:].zero_()
    return whole[:, :columns]


def _cross_entropy_(logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
    if not (HAS_TRITON and logits.is_cuda):
        return cross_entropy_(logits, *arguments, **options)
    from xlm_ds import cross_entropy_kernel

    return cross_entropy_kernel.cross_entropy_(logits, *arguments, **options)


def cross_entropy_(
    logits: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    gradient_scale: float | None,
) -> Tensor:
    """What cross_entropy_kernel.cross_entropy_ does, by torch, on any device."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    rows_at_a_time = max(1, CHUNK_ELEMENTS // logits.shape[1])
    for begin in range(0, len(logits), rows_at_a_time):
        rows = slice(begin, begin + rows_at_a_time)
        log_p = torch.log_softmax(logits[rows].float() + bias.float(), dim=1)
        losses[rows] = F.nll_loss(log_p, targets[rows], ignore_index=ignore_index, reduction="none")
        if gradient_scale is not None:
            counts = (targets[rows] != ignore_index).float()[:, None] * gradient_scale
            gradient = log_p.exp_().mul_(counts)
            gradient.scatter_add_(1, targets[rows, None], -counts)
            logits[rows] = gradient
    return losses
