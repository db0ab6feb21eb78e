"""The loss and its gradient against fp64, by torch and by the Triton kernel (in Triton's interpreter without a GPU)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xlm_ds import linear_cross_entropy as rooms
from xlm_ds.linear_cross_entropy import CHUNK_ELEMENTS, TILE, linear_cross_entropy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IGNORE = 1
# Of a gradient between -1 and 1. In fp32 a logit near 100 has steps of 8e-6; of bf16 the interpreter cuts off what does
# not fit, where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def case(
    rows: int, columns: int, dtype: torch.dtype, spread: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, bias, targets), a row of them to be ignored, in a wider matrix as the model's are."""
    generator = torch.Generator().manual_seed(columns)
    logits = torch.randn(rows, columns + 3, generator=generator).mul(spread)
    bias = torch.randn(columns, generator=generator)
    targets = torch.randint(0, columns, (rows,), generator=generator)
    targets[0], targets[-1] = columns - 1, IGNORE
    return logits.to(DEVICE, dtype)[:, :columns], bias.to(DEVICE, dtype), targets.to(DEVICE)


def exact(logits: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, softmax - onehot) in fp64."""
    log_p = (logits.double() + bias.double()).log_softmax(dim=1)
    counts = targets != IGNORE
    gradient = (log_p.exp() - F.one_hot(targets, logits.shape[1])) * counts[:, None]
    return -log_p.gather(1, targets[:, None])[:, 0] * counts, gradient


@pytest.fixture(params=["torch", "kernel"])
def cross_entropy_(request: pytest.FixtureRequest) -> object:
    if request.param == "torch":
        return rooms.cross_entropy_
    pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    from xlm_ds import cross_entropy_kernel

    return cross_entropy_kernel.cross_entropy_


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("columns", [2, 127, 4096, 9001])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_and_gradient_are_those_of_fp64(
    cross_entropy_: Callable[..., Tensor], dtype: torch.dtype, columns: int, spread: float
) -> None:
    logits, bias, targets = case(5, columns, dtype, spread)
    losses, gradient = exact(logits, bias, targets)
    whole = logits._base
    assert whole is not None
    beside = whole[:, columns:].clone()
    scale = 1024.0 if dtype == torch.float16 else 1.0
    found = cross_entropy_(logits, bias, targets, ignore_index=IGNORE, gradient_scale=scale)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double() / scale, gradient, rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(whole[:, columns:], beside), "wrote beside the logits"
    assert not logits[-1].any()


def test_logits_stay_where_no_gradient_is_wanted(cross_entropy_: Callable[..., Tensor]) -> None:
    logits, bias, targets = case(5, 300, torch.float32, 1.0)
    before = logits.clone()
    found = cross_entropy_(logits, bias, targets, ignore_index=IGNORE, gradient_scale=None)
    assert torch.equal(logits, before)
    torch.testing.assert_close(found.double(), exact(logits, bias, targets)[0])


def test_rows_in_several_chunks_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (case(7, 50, torch.float32, 1.0)[0] for _ in range(2))
    _, bias, targets = case(7, 50, torch.float32, 1.0)
    assert whole.numel() < CHUNK_ELEMENTS
    first = rooms.cross_entropy_(whole, bias, targets, ignore_index=IGNORE, gradient_scale=1.0)
    monkeypatch.setattr(rooms, "CHUNK_ELEMENTS", 2 * 50)
    second = rooms.cross_entropy_(parts, bias, targets, ignore_index=IGNORE, gradient_scale=1.0)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(whole, parts)


def test_evaluation_makes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float | None] = []

    def noting(logits: Tensor, *_: Any, gradient_scale: float | None, **__: Any) -> Tensor:
        scales.append(gradient_scale)
        return logits.new_zeros(len(logits))

    monkeypatch.setattr(rooms, "_cross_entropy_", noting)
    hidden, weight = torch.zeros(3, 4), torch.zeros(9, 4, requires_grad=True)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            targets = torch.zeros(3, dtype=torch.long)
            linear_cross_entropy(hidden, weight, torch.zeros(9), targets, ignore_index=1)
    assert scales == [1.0, None]


def test_small_probabilities_keep_their_digits_in_fp16() -> None:
    """Of 1 in 95,000 fp16 itself has steps of 6e-8; the loss scale comes too late for them."""
    hidden = torch.zeros(1, 4, dtype=torch.float16)
    hidden[0, 0] = 1
    weight = torch.full((95_000, 4), 1e-3, dtype=torch.float16, requires_grad=True)
    bias = torch.zeros(95_000, dtype=torch.float16)
    loss = linear_cross_entropy(hidden, weight, bias, torch.tensor([7]), ignore_index=1)
    (gradient,) = torch.autograd.grad(loss.sum() * 1024, weight)
    assert float(gradient[9, 0]) / 1024 == pytest.approx(1 / 95_000, rel=2e-3)


@pytest.mark.parametrize("columns", [301, 302, 384])
def test_what_memory_had_before_does_not_matter(columns: int) -> None:
    """torch fills new memory with NaN here: none may come out."""
    torch.manual_seed(0)
    shapes = ((312, 64), (columns, 64), (columns,))
    given = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    targets = torch.randint(5, columns, (312,))
    torch.use_deterministic_algorithms(mode=True)
    try:
        losses = linear_cross_entropy(given[0], given[1], given[2], targets, ignore_index=1)
        gradients = torch.autograd.grad(losses.sum(), given)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert all(bool(found.isfinite().all()) for found in (losses, *gradients))


def test_bf16_does_not_round_a_scale_that_all_rows_share() -> None:
    """By 0.0035, in which the three gradients would all be wrong; as it is, each is rounded by itself."""
    torch.manual_seed(0)
    shapes = ((312, 64), (301, 64), (301,))
    given = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    targets = torch.randint(5, 301, (312,))
    sums = []
    for scale in (1.0, 1.0035):  # between two numbers of bf16
        losses = linear_cross_entropy(given[0], given[1], given[2], targets, ignore_index=1)
        gradients = torch.autograd.grad(losses, given, torch.full((312,), scale))
        sums.append([float(gradient.double().abs().sum()) / scale for gradient in gradients])
    assert sums[0] == pytest.approx(sums[1], rel=2e-3)


@pytest.mark.parametrize("columns", [TILE, 301])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_of_all_inputs_are_autograds(dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, dim = 11, 16
    shapes = ((rows, dim), (columns, dim), (columns,))
    ours = [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    targets = torch.randint(0, columns, (rows,), generator=generator).to(DEVICE)
    targets[3] = IGNORE
    incoming = torch.rand(rows, generator=generator).to(DEVICE)
    found = linear_cross_entropy(ours[0], ours[1], ours[2], targets, ignore_index=IGNORE)
    logits = F.linear(theirs[0], theirs[1]) + theirs[2]
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (0.03, 0.05)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)
    found_gradients = torch.autograd.grad(found, ours, incoming)
    for mine, true in zip(
        found_gradients, torch.autograd.grad(expected, theirs, incoming.double()), strict=True
    ):
        torch.testing.assert_close(mine.double(), true, rtol=rtol, atol=atol)
