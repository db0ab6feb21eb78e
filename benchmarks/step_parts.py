"""The parts of a step by themselves, as step_gpu.py measures them: each function gives the rows of one table.

Data are random: products of zeros are faster than those of real numbers. On a CPU everything runs too, as a rehearsal.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from step_models import Size
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import xlm_ds.linear_cross_entropy as head
from xlm_ds.devices import this_gpu
from xlm_ds.dictionary import PAD
from xlm_ds.model import XlmEncoder

Job: TypeAlias = dict[str, Any]
Rows: TypeAlias = list[dict[str, Any]]


class Laps(NamedTuple):
    """Seconds on the device of each repeat; per repeat, seconds and CPU-seconds of the host until all were issued."""

    seconds: list[float]
    host_seconds: float
    cpu_seconds: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def laps(
    device: torch.device, action: Callable[[], object], *, repeats: int, warm_up: int = 3
) -> Laps:
    """Times an action by events of the device, which is not waited for between the repeats."""
    for _ in range(warm_up):
        action()
    synchronize(device)
    cuda = device.type == "cuda"
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)] if cuda else []
    moments = [time.perf_counter()]
    cpu = time.process_time()
    if cuda:
        events[0].record()
    for i in range(repeats):
        action()
        moments.append(time.perf_counter())
        if cuda:
            events[i + 1].record()
    host, cpu = moments[-1] - moments[0], time.process_time() - cpu
    synchronize(device)
    seconds = [end - begin for begin, end in itertools.pairwise(moments)]
    if cuda:
        seconds = [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(events)]
    return Laps(seconds, host / repeats, cpu / repeats)


def release(device: torch.device) -> None:
    """Leaves the device's memory to the other processes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def peak_memory(device: torch.device, row: dict[str, Any]) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    yield
    row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:60]


# ---------------------------------------------------------------------------------------- ceilings


def ceilings(job: Job) -> Rows:
    """What the device can do: a copy, counted read and written, and a large matrix product in bf16."""
    device = torch.device(job["device"])
    count, side = job["copy_bytes"] // 4, job["product_side"]
    source, target = (randn(count, device=device) for _ in range(2))  # 2 bytes each
    copy = laps(device, partial(target.copy_, source), repeats=job["repeats"]).median
    del source, target
    release(device)
    found = product(job)["wall_seconds"]
    return [
        {"what": "copy", "ms": copy * 1e3, "GB/s": 4 * count / copy / 1e9},
        {"what": f"{side}^3 product", "ms": found * 1e3, "TFLOP/s": 2 * side**3 / found / 1e12},
    ]


def product(job: Job) -> dict[str, Any]:
    """The large matrix product, as a contender that is measured between the others."""
    device, side = torch.device(job["device"]), job["product_side"]
    a, b = (randn(side, side, device=device) for _ in range(2))
    found = laps(device, partial(torch.mm, a, b), repeats=job["repeats"])
    return {
        "useful_flops": 2 * side**3,
        "wall_seconds": found.median,
        "host_seconds": found.host_seconds,
        "cpu_seconds": found.cpu_seconds,
    }


def products(job: Job) -> Rows:
    """Our own matrix products, forward and both of backward, at three sizes of batch."""
    device, size = torch.device(job["device"]), Size(**job["size"])
    dim, rows = size.dim, []
    layer = {"qkv": (dim, 3 * dim), "out": (dim, dim), "fc1": (dim, 4 * dim), "fc2": (4 * dim, dim)}
    vocabulary = -(-size.vocab_size // head.TILE) * head.TILE
    for batch in job["batches"]:
        many = {name: (batch * size.tokens, *shape) for name, shape in layer.items()}
        many["head"] = (batch * size.masked_per_row, dim, vocabulary)
        for name, (m, k, n) in many.items():
            x, w = randn(m, k, device=device), randn(n, k, device=device)
            dy = randn(m, n, device=device)
            row: dict[str, Any] = {"what": f"{name}, {batch} rows", "m": m, "k": k, "n": n}
            for title, left, right in (
                ("forward", x, w.t()),
                ("to input", dy, w),
                ("to weight", dy.t(), x),
            ):
                seconds = laps(device, partial(torch.mm, left, right), repeats=job["repeats"])
                row[f"{title} TFLOP/s"] = 2 * m * k * n / seconds.median / 1e12
            rows.append(row)
            del x, w, dy
    return rows


# --------------------------------------------------------------------------------------- attention


def attention(job: Job) -> Rows:
    """Every implementation that torch has, on views of one projection as the model has them; forward and backward."""
    device, size = torch.device(job["device"]), Size(**job["size"])
    heads = size.shape().attention_heads
    qkv = randn(size.rows, size.tokens, 3, heads, size.dim // heads, device=device)
    qkv.requires_grad_()
    upstream = randn(size.rows, heads, size.tokens, size.dim // heads, device=device)
    flops = 3 * 4 * size.rows * size.tokens**2 * size.dim
    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    rows = []
    for dropout in (0.0, 0.1):
        for name in names:
            row: dict[str, Any] = {"what": name, "dropout": dropout}

            def step(dropout: float = dropout) -> None:
                qkv.grad = None
                query, key, value = qkv.permute(2, 0, 3, 1, 4)
                out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
                out.backward(upstream)

            try:
                with sdpa_kernel([getattr(SDPBackend, name)]), peak_memory(device, row):
                    seconds = laps(device, step, repeats=job["repeats"]).median
                row |= {"ms": seconds * 1e3, "useful TFLOP/s": flops / seconds / 1e12}
            except RuntimeError as error:  # not on this device, or not with dropout
                row["note"] = first_line(error)
            rows.append(row)
    return rows


# ----------------------------------------------------------------------------------- cross-entropy


def cross_entropy(job: Job) -> Rows:
    """The tied product and its loss, forward and backward, with the errors against fp64 of the same bf16 inputs."""
    device, size = torch.device(job["device"]), Size(**job["size"])
    count = size.rows * size.masked_per_row
    hidden = randn(count, size.dim, device=device)
    weight = (randn(size.vocab_size, size.dim, device=device) * 2 / math.sqrt(size.dim)).detach()
    bias = randn(size.vocab_size, device=device)
    targets = torch.randint(0, size.vocab_size, (count,), device=device)
    targets[::7] = PAD
    inputs = (hidden, weight, bias)

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float() + bias
        return F.cross_entropy(logits, targets, ignore_index=PAD, reduction="none")

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return head.linear_cross_entropy(hidden, weight, bias, targets, ignore_index=PAD)

    def in_fp64(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(hidden, weight) + bias
        return F.cross_entropy(logits, targets, ignore_index=PAD, reduction="none")

    cuda = device.type == "cuda"
    compiled = torch.compile(plain, dynamic=False, backend="inductor" if cuda else "aot_eager")
    truth = _with_gradients(in_fp64, tuple(tensor.double() for tensor in inputs))
    release(device)
    rows = []
    has_triton = head.HAS_TRITON
    kinds = {"torch, eager": plain, "torch, compiled": compiled, "ours by torch": ours}
    if cuda and has_triton:
        kinds["ours, Triton kernel"] = ours
    for name, function in kinds.items():
        row: dict[str, Any] = {"what": name}
        head.HAS_TRITON = has_triton and name != "ours by torch"
        try:
            with peak_memory(device, row):
                step = partial(_with_gradients, function, inputs)
                found = step()
                row["ms"] = laps(device, step, repeats=job["repeats"]).median * 1e3
            row |= _errors(found, truth)
        except torch.cuda.OutOfMemoryError as error:
            row["note"] = first_line(error)
        finally:
            head.HAS_TRITON = has_triton
        rows.append(row)
        release(device)
    if cuda and has_triton:
        rows.append(_kernel_alone(hidden @ weight.t(), bias, targets, job["repeats"]))
    return rows


def _with_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The losses, and the gradients of their sum."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    losses = function(*leaves)
    return losses.detach(), *torch.autograd.grad(losses.sum(), leaves)


def _errors(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, float]:
    errors = {"loss, most": float((found[0] - truth[0]).abs().max())}
    names = ("hidden", "weight", "bias")
    for name, gradient, exact in zip(names, found[1:], truth[1:], strict=True):
        difference = torch.linalg.vector_norm(gradient.double() - exact)
        errors[f"d{name}, relative"] = float(difference / torch.linalg.vector_norm(exact))
    return errors


def _kernel_alone(logits: Tensor, bias: Tensor, targets: Tensor, repeats: int) -> dict[str, Any]:
    from xlm_ds.cross_entropy_kernel import cross_entropy_

    step = partial(cross_entropy_, logits, bias, targets, ignore_index=PAD, gradient_scale=1.0)
    seconds = laps(logits.device, step, repeats=repeats).median
    passes = 3  # read twice and written once
    bytes_moved = passes * logits.numel() * logits.element_size()
    return {"what": "kernel alone", "ms": seconds * 1e3, "GB/s": bytes_moved / seconds / 1e9}


# --------------------------------------------------------------------------------------- optimizer


def optimizers(job: Job) -> Rows:
    """Adam on all of the model's parameters, fp32 masters of bf16 weights, from the gradient to the new weights."""
    device, size = torch.device(job["device"]), Size(**job["size"])
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in XlmEncoder(size.shape()).parameters()]
    total = sum(shape.numel() for shape in shapes)
    rows = []
    # Of fp32: gradient, master and both moments read, all but the gradient written. bf16 around it: the gradient read,
    # written and read as fp32; the weights written.
    for name, flat, lower, bytes_each in (
        ("fused AdamW, list of tensors, fp32 gradient", False, False, 28),
        ("fused AdamW, one flat tensor, fp32 gradient", True, False, 28),
        ("bf16 gradient to fp32, fused AdamW, weights to bf16; list of tensors", False, True, 40),
        ("bf16 gradient to fp32, fused AdamW, weights to bf16; one flat tensor", True, True, 40),
    ):
        sizes = [torch.Size([total])] if flat else shapes
        masters = [randn(*shape, device=device, dtype=torch.float32) for shape in sizes]
        gradients = [torch.randn_like(m, dtype=torch.bfloat16 if lower else None) for m in masters]
        weights = [m.to(torch.bfloat16) for m in masters] if lower else []
        optimizer = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0.0, fused=True)
        step = partial(_adam, optimizer, masters, gradients, weights)
        seconds = laps(device, step, repeats=job["repeats"]).median
        rows.append({"what": name, "ms": seconds * 1e3, "GB/s": bytes_each * total / seconds / 1e9})
        del masters, gradients, weights, optimizer, step
        release(device)
    return rows


@torch.no_grad()
def _adam(
    optimizer: torch.optim.Optimizer,
    masters: list[Tensor],
    gradients: list[Tensor],
    weights: list[Tensor],
) -> None:
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient.float()  # the same tensor where it is fp32
    optimizer.step()
    if weights:
        torch._foreach_copy_(weights, masters)


PARTS: dict[str, Callable[[Job], Rows]] = {
    "ceilings": ceilings,
    "products": products,
    "attention": attention,
    "cross-entropy": cross_entropy,
    "optimizer": optimizers,
}


def device_facts(job: Job) -> dict[str, Any]:
    """What the parent, which has no torch, must know of the device."""
    if job["device"] == "cpu":
        return {"available": True}
    if not torch.cuda.is_available():
        return {"available": False}
    properties = torch.cuda.get_device_properties(0)
    speed = this_gpu(properties.name, properties.total_memory).speed
    return {
        "available": True,
        "peak_flops": speed and speed.half,
        "gpu": properties.name,
        "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
