"""The model in a DeepSpeed engine, and the only room that knows DeepSpeed.

    ranks = start_ranks()                                     # one process, or as the launcher says
    settings = resolve_deepspeed_config(read_deepspeed_config(path, ranks.device.type), optimization, rows=8, …)
    engine = Engine(model, settings, ranks)
    losses = engine(batch)                                    # nats per masked token
    engine.backward(losses.sum() * scale)
    engine.step(lr)

Facts about DeepSpeed 0.19.8 were measured 2026-11-22 on a CPU machine unless said otherwise.
"""

import contextlib
import logging
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from xlm_ds.batches import LabelledBatch, MaskedBatch, Rows
from xlm_ds.deepspeed_config import (
    check_monitors,
    has_fused_adam,
    suits_flat_gradients,
    sums_in_fp32,
)
from xlm_ds.lifeline import leave_at_once
from xlm_ds.log import EXIT_BAD_INPUT, EXIT_FAULT, Fault, InputError, logger
from xlm_ds.model import XlmEncoder

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else importing DeepSpeed prints a warning
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own deprecations are not ours to act on
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

FLAT_GRADIENTS_KNOW = ("0.19.8",)  # versions of DeepSpeed whose inside they have been tested with
PROBED_WEIGHTS = 4096
# A weight of 0.02 has steps of 2e-9 in fp32: smaller updates may rightly move none (seen below 1e-12).
LEAST_LR_THAT_MOVES = 1e-9
NORM_CHUNK = 1 << 20  # torch 2.13's norm of 3e7 numbers in fp32 on a CPU is off by 2e-3
_REPORT = "that is a fault of the engine, please report it with deepspeed.json of the run's folder"
MOMENTS = ("exp_avg", "exp_avg_sq")
# What DeepSpeed raises for a configuration that it cannot use, depending on where it notices.
CONFIG_ERRORS = (ValidationError, DeepSpeedConfigError, ValueError, TypeError, AssertionError)
# What mpirun (Open MPI, MPICH) and srun say of the number of processes; torchrun and deepspeed set RANK and WORLD_SIZE.
TASK_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")

COLLECTIVES = (
    "all_reduce",
    "reduce",
    "reduce_scatter_tensor",
    "all_gather",
    "all_gather_into_tensor",
)

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has deprecated: a warning at every step.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")


# ------------------------------------------------------------------------------------------ ranks


class Ranks(NamedTuple):
    """This process among all of the run. `control` carries small messages between them on the CPU."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None
    timeout: timedelta = timedelta(seconds=600)

    @property
    def control_interval(self) -> int:
        """Updates from one question to all ranks to the next: gloo's ring has 2 (n - 1) hops, which at 30 microseconds
        (assumed) are 8 ms for 128 ranks."""
        return -(-self.world_size // 128)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank, on all ranks."""
        return bool(self.largest(flag)[0])

    def largest(self, *flags: int) -> list[int]:
        """The largest of all ranks' of each, on all ranks."""
        if self.world_size == 1:
            return list(flags)
        values = torch.tensor(flags)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.control)
        return values.tolist()

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value (small), on all of them."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks of a CPU tensor, on all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def each(self, value: float) -> list[float]:
        """Every rank's value, on all ranks."""
        values = torch.zeros(self.world_size, dtype=torch.float64)
        values[self.rank] = value
        found: list[float] = self.sum(values).tolist()
        return found

    def on_first(self, action: Callable[[], None]) -> None:
        """Runs `action` on rank 0, the others waiting; if it fails, its error is raised there and all ranks end."""
        error: InputError | OSError | None = None
        if self.rank == 0:
            try:
                action()
            except (InputError, OSError) as caught:
                error = caught
        self.raise_on_all(error)

    def raise_on_all(self, error: InputError | OSError | None) -> None:
        """Raises `error` where there is one; if there is on any rank, the others end."""
        if self.any(error is not None):
            if self.world_size > 1:
                stop_ranks()  # or the end of this process may be an abort, and 134 the exit code
            raise error or SystemExit(EXIT_BAD_INPUT)


def start_ranks(timeout_seconds: float = 600.0) -> Ranks:
    """Joins the processes that the launcher started; without a launcher, a run of one process.

    A rank that others have waited for longer than `timeout_seconds` ends the run. DeepSpeed looks for MPI unless all
    five variables are set (LOCAL_RANK too).
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" in os.environ:
        told = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in told if name not in os.environ]:
            raise InputError(
                f"RANK is set, but not {', '.join(missing)}; a launcher sets all of them (deepspeed and torchrun do, "
                "and launch/ has examples for others), and a run of one process none"
            )
    else:
        for name in TASK_COUNTS:
            if int(os.environ.get(name, "1")) > 1:
                raise InputError(
                    f"started as {os.environ[name]} tasks ({name}) that do not know their rank, so each would be a run "
                    "of its own; start them with deepspeed or torchrun, or as launch/mpi.sh and launch/slurm.sbatch do"
                )
        os.environ.update(alone)
        os.environ["MASTER_PORT"] = str(_free_port())
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        # Else the first start compiles this op (75 s on two cores); only inference's all-reduce uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if cuda else "gloo"
    with _given_up_after(timeout_seconds):
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            _join_again(backend, device, timeout)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    world = dist.get_world_size()
    control = dist.new_group(backend="gloo", timeout=timeout) if world > 1 else None
    return Ranks(dist.get_rank(), world, device, control, timeout)


def _join_again(backend: str, device: torch.device, timeout: timedelta) -> None:
    """Joins the ranks that torchrun has started again, if it has one store for all its attempts.

    There are still the addresses of the ranks that have ended, which gloo would connect to: no restart succeeded (torch
    2.13, one host, November 2026; PyTorch's issues 135712 and 167288). Of several hosts each counts its own restarts,
    so they need stores of their own (launch/torchrun.sh).
    """
    own_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if own_store or os.environ["GROUP_WORLD_SIZE"] != "1":
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    attempt = f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(attempt, store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=device if device.type == "cuda" and world > 1 else None,  # as DeepSpeed has it
    )


@contextlib.contextmanager
def _given_up_after(seconds: float) -> Iterator[None]:
    """Says in a sentence why this rank does not meet the others, and ends it when their time is up.

    torch 2.13 waits without end for the first answer of whatever listens at the port (measured 2026-11-23).
    """
    here = f"rank {os.environ['RANK']} on {socket.gethostname()}"
    port, first = os.environ["MASTER_PORT"], os.environ["MASTER_ADDR"]
    sentence = (
        f"{here} has not met rank 0 at port {port} of {first} in {seconds:g} s: that has not started, cannot be "
        "reached, or the port is another program's"
    )

    def give_up() -> None:
        leave_at_once(EXIT_FAULT, lambda: logger.error(sentence))

    timer = threading.Timer(seconds + 1, give_up)  # torch notices the other reasons itself, in time
    timer.daemon = True
    timer.start()
    try:
        yield
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise Fault(sentence) from error
        raise InputError(
            f"port {port} of {socket.gethostname()} is in use, perhaps by another run; end that, or give the launcher "
            "another --master_port"
        ) from error
    finally:
        timer.cancel()


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective has failed because another rank has ended or does not answer."""
    of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return of_gloo or isinstance(error, dist.DistError)


def stop_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        # A thread of gloo's gives the last collective's tensors back to Python, and aborts the process if that has
        # begun to end (torch 2.13, whose groups DeepSpeed keeps alive: one run in twenty that ended at once).
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ----------------------------------------------------------------------------------------- engine


@contextlib.contextmanager
def collectives_timed(enter: Callable[[str], str]) -> Iterator[None]:
    """Calls `enter("communication")` before each collective, and afterwards `enter` with what that returned.

    Those that are waited for: all of ZeRO 1 and 2. What ZeRO 3 starts ahead of its use is not told apart.
    """

    def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            before = enter("communication")
            try:
                return collective(*arguments, **options)
            finally:
                enter(before)

        return call

    with contextlib.ExitStack() as undone:
        # DeepSpeed's calls go by its own names, and ZeRO 3's by those inside them.
        for module in (dist, deepspeed.comm, deepspeed.comm.comm):
            for name in COLLECTIVES:
                if collective := getattr(module, name, None):
                    setattr(module, name, timed(collective))
                    undone.callback(setattr, module, name, collective)
        yield


def takes_flat_gradients(settings: Mapping[str, Any]) -> bool:
    """Whether FlatGradients does what DeepSpeed would; `return False` here is DeepSpeed's own path for all."""
    return deepspeed.__version__ in FLAT_GRADIENTS_KNOW and suits_flat_gradients(settings)


def without_norm(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With what FlatGradients does itself left out: the norm, clipping by it, and skipping where it is not finite."""
    zero = {**settings["zero_optimization"], "compute_grad_norm": False}
    changed: dict[str, Any] = {"zero_optimization": zero, "gradient_clipping": 0.0}
    if "bf16" in settings:
        changed["bf16"] = {**settings["bf16"], "check_grad_overflow": False}
    return {**settings, **changed}


class FlatGradients:
    """The gradients of ZeRO stage 1 in one buffer, laid out as ZeRO's own flat weights, in place of its buckets.

    A gradient is copied (or, after the first micro-batch, added) once where autograd leaves it, and each rank takes its
    part of the whole at the end: of the stock path's passes over all gradients the bucket, the division, the
    concatenation and the norm through float64 are gone. Weights, moments and the step itself stay ZeRO's; it is given
    the gradient as its own DeepCompile does (compile/init_z1_and_2.py). Needs "compute_grad_norm": false, which leaves
    norm and clipping to us.
    """

    def __init__(self, engine: Any, *, clip_norm: float) -> None:
        zero = engine.optimizer
        engine.enable_backward_allreduce = False
        zero.contiguous_gradients = False  # no buckets
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks.clear()
        self._zero = zero
        self._clip_norm = clip_norm
        # fp32 where micro-batches are added up, and on one rank, as Adam takes it; a single micro-batch's gradient is
        # as precise in its own dtype, and half as much to send; but not the sum of very many ranks'.
        in_fp32 = sums_in_fp32(engine.gradient_accumulation_steps(), dist.get_world_size())
        self._buffers, self._views = [], {}
        for weights, parameters in zip(zero.bit16_groups_flat, zero.bit16_groups, strict=True):
            dtype = torch.float32 if in_fp32 else weights.dtype
            buffer = torch.zeros_like(weights, dtype=dtype)
            self._buffers.append(buffer)
            for parameter in parameters:
                offset = parameter.data_ptr() - weights.data_ptr()
                view = buffer.narrow(0, offset // weights.element_size(), parameter.numel())
                self._views[parameter] = view.view_as(parameter)
                parameter.register_post_accumulate_grad_hook(self._take)
        self._fresh = set(self._views)  # parameters without a gradient in this update
        self.norm = torch.zeros(())

    def _take(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if parameter in self._fresh:
            self._fresh.remove(parameter)
            self._views[parameter].copy_(gradient)
        else:
            self._views[parameter].add_(gradient)

    def hand_over(self) -> None:
        """Gives ZeRO this rank's part of the gradient, averaged over the ranks and clipped, in fp32."""
        for parameter in self._fresh:
            self._views[parameter].zero_()
        self._fresh = set(self._views)
        parts = [self._reduced(i, buffer) for i, buffer in enumerate(self._buffers)]
        chunks = [chunk for part in parts for chunk in torch.split(part, NORM_CHUNK)]
        squares = torch.nn.utils.get_total_norm(chunks).square()
        if dist.get_world_size() > 1:
            dist.all_reduce(squares)
        self.norm = squares.sqrt()
        if self._clip_norm > 0:
            factor = (self._clip_norm / (self.norm + 1e-6)).clamp(max=1.0)
            factor = factor.nan_to_num(1.0)  # else what lies between parameters is no zero again
            for part in parts:
                part.mul_(factor)
        for i, part in enumerate(parts):
            self._zero.averaged_gradients[i] = _FlatPart(part)
        skip_unless_finite(self._zero.optimizer, self.norm)

    def _reduced(self, group: int, buffer: Tensor) -> Tensor:
        ranks = self._zero.real_dp_process_group[group]
        world = dist.get_world_size(ranks)
        if world == 1:
            return buffer
        part = torch.empty_like(buffer[: buffer.numel() // world])
        dist.reduce_scatter_tensor(part, buffer, group=ranks)
        return part.float().div_(world)


def skip_unless_finite(adam: torch.optim.Optimizer, norm: Tensor) -> None:
    """Where `found_inf` is 1 torch's fused Adam changes nothing and counts no step, and the host need not know."""
    adam.found_inf = (~(norm.isfinite() & (norm >= 0))).float()  # type: ignore[attr-defined]


def skip_by_norm(zero: Any) -> None:
    """The same in DeepSpeed's own path of stages 1 and 2, whose norm is -1 where a gradient is not finite.

    Its `check_grad_overflow` reads every gradient once more, and the host in each update.
    """
    norm_of = zero.scaled_global_norm

    def scaled_global_norm(*arguments: Any, **options: Any) -> Any:
        norm = norm_of(*arguments, **options)
        skip_unless_finite(zero.optimizer, torch.as_tensor(norm))
        return norm

    zero.scaled_global_norm = scaled_global_norm


class Skips:
    """Updates that were left out because their gradient was not finite, counted where the gradient lies."""

    def __init__(self, device: torch.device, count: int = 0) -> None:
        self.count = torch.tensor(count, device=device)
        self._in_row = torch.zeros_like(self.count)
        self._longest = torch.zeros_like(self.count)
        self._begin = torch.zeros_like(self.count)

    def after_update(self, skipped: Tensor, update: int) -> None:
        """`skipped` (): whether `update` (from 0) was."""
        self.count += skipped
        self._in_row = (self._in_row + 1) * skipped
        longer = self._in_row > self._longest
        self._longest = torch.where(longer, self._in_row, self._longest)
        self._begin = torch.where(longer, update + 1 - self._in_row, self._begin)

    def longest_row(self) -> tuple[int, int]:
        """(updates, the first of them, from 0). Reads the device."""
        return int(self._longest), int(self._begin)


class _FlatPart(list[Tensor]):
    """A gradient that is flat already, as ZeRO's step looks for it."""

    def __init__(self, part: Tensor) -> None:
        super().__init__([part])
        self.flat_partition = part


class Invariants:
    """What must hold of every update: weights move, those computed with are the masters', gradients are gone, and the
    optimizer has counted as many updates.

    DeepSpeed has broken each of them without a word (its issues 8415, 7839, 7985). What lies on the device is compared
    there, a few thousand weights an update, and read in `violation`.
    """

    def __init__(self, engine: Any, skips: Skips, updates: int = 0) -> None:
        self._engine = engine
        self._skips = skips
        self.updates = updates
        masters, copies = _masters_and_copies(engine.optimizer)
        self._masters = [_probe(flat) for flat in masters]
        self._before = [probe.clone() for probe in self._masters]
        self._copies = [_probe(flat) for flat in copies]
        device = self._masters[0].device
        self._unmoved = torch.zeros((), dtype=torch.int64, device=device)
        self._stale = torch.zeros((), dtype=torch.int64, device=device)
        self._left = 0  # parameters with a gradient after an update

    def after_update(self, lr: float, skipped: Tensor) -> None:
        self.updates += 1
        if lr >= LEAST_LR_THAT_MOVES:
            pairs = zip(self._masters, self._before, strict=True)
            moved = torch.stack([(now != before).any() for now, before in pairs]).any()
            self._unmoved += ~(moved | skipped.to(moved.device))
        torch._foreach_copy_(self._before, self._masters)
        for master, copy in zip(self._masters, self._copies, strict=True):
            if master.device == copy.device:  # else it is offloaded
                differs = (master.to(copy.dtype) != copy) & ~master.isnan()
                self._stale += differs.any()
        self._left = max(
            self._left, sum(p.grad is not None for p in self._engine.module.parameters())
        )

    def violation(self) -> str | None:
        """Reads the device."""
        if self._left:
            return (
                f"the gradients of {self._left} parameters are still there after an update and would be added to the "
                "next ones"
            )
        if unmoved := int(self._unmoved):
            return f"{unmoved} of {self.updates} updates have not moved the weights"
        if stale := int(self._stale):
            return f"after {stale} of {self.updates} updates the weights to compute with were not the masters'"
        counted, applied = adam_steps(self._engine), self.updates - int(self._skips.count)
        if applied and counted != {applied}:
            return f"there were {applied} updates, but the optimizer has counted {sorted(counted)}"
        return None


def _masters_and_copies(zero: Any) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's flat weights in fp32, and what is computed with."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        return zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat
    rank = dist.get_rank()
    copies = [partitions[rank] for partitions in zero.parallel_partitioned_bit16_groups]
    return zero.single_partition_of_fp32_groups, copies


def _probe(flat: Tensor) -> Tensor:
    return flat.detach()[:: max(1, flat.numel() // PROBED_WEIGHTS)]


def adam_steps(engine: Any) -> set[int]:
    """The updates that Adam has counted: one number, if all is well."""
    adam = engine.optimizer.optimizer
    # DeepSpeed's FusedAdam has another in its groups, which it does not count on.
    counts = [values["step"] for values in adam.state.values() if "step" in values]
    return {int(count) for count in counts}


def _master_fragment(parameter: Any, rank: int) -> tuple[int, Tensor]:
    """Where this rank's part of a parameter's fp32 weights begins, and the part, flat."""
    if hasattr(parameter, "ds_tensor"):  # equal parts; what fills up the last is left out
        part = safe_get_local_fp32_param(parameter).detach()
        begin = min(part.numel() * rank, parameter.ds_numel)
        return begin, part[: parameter.ds_numel - begin]
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, torch.empty(0, device=parameter.device)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach()


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        found = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return "; ".join(found)
    return " ".join(str(error).split())


class Engine:
    """A model with an encoder in it under DeepSpeed: forward, backward, step, and its whole state at any ZeRO stage.

    `compiles`: its layers are compiled at their first call, but not in ZeRO 3, whose hooks break the graphs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: Mapping[str, Any],
        ranks: Ranks,
        *,
        compiles: bool = False,
        where: str = "this configuration",
    ) -> None:
        self._compiled = compiles and settings["zero_optimization"]["stage"] < 3
        encoders = [module for module in model.modules() if isinstance(module, XlmEncoder)]
        if self._compiled:
            for encoder in encoders:
                encoder.compile_layers()
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        weights = {name: parameter.detach().clone() for parameter, name in self._names.items()}
        # ZeRO 3 gathers a module's own parameters; the encoder itself reads the tied table.
        for encoder in encoders:
            deepspeed.zero.register_external_parameter(encoder, encoder.token_embedding.weight)
        self.settings = dict(settings)
        self.ranks = ranks
        ranks.on_first(lambda: check_monitors(self.settings))  # which has the monitors
        flat = takes_flat_gradients(settings)
        if flat:
            settings = without_norm(settings)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._engine, *_ = deepspeed.initialize(
                    model=model, model_parameters=list(model.parameters()), config=dict(settings)
                )
        except CONFIG_ERRORS as error:
            raise InputError(f"DeepSpeed does not take {where}: {_sentence(error)}") from error
        # DeepSpeed makes groups of its own, whose collectives wait 30 minutes on gloo (0.19.8, torch 2.13).
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(ranks.timeout, group)
        for parameter, name in self._names.items():
            self._set(parameter, "weight", weights[name])  # DeepSpeed's are rounded to bf16
        clip_norm = self.settings["gradient_clipping"]
        self._flat = FlatGradients(self._engine, clip_norm=clip_norm) if flat else None
        if (
            not flat
            and has_fused_adam(settings)
            and hasattr(self._engine.optimizer, "scaled_global_norm")
        ):
            skip_by_norm(self._engine.optimizer)
        self._skips = Skips(ranks.device)
        self._invariants = Invariants(self._engine, self._skips)
        self._norm = torch.zeros((), device=ranks.device)
        self._updates = 0

    def __call__(self, batch: MaskedBatch | Rows | LabelledBatch) -> Tensor:
        """Negative log likelihood in nats of every masked token; 0 where the target is padding. Of rows without targets
        the final hidden states (B, T, d), and of a classifier's the scores of the labels (B, C).

        In ZeRO 3 all ranks must make the same calls.
        """
        # Validation has batches of many shapes, and torch compiles a layer for no more than eight.
        as_written = self._compiled and not self._engine.module.training
        with torch.compiler.set_stance("force_eager") if as_written else contextlib.nullcontext():
            losses: Tensor = self._engine(batch)
        return losses

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """`loss` is divided by the accumulation and averaged over the ranks by DeepSpeed."""
        self._engine.backward(loss)

    def step(self, lr: float) -> None:
        """Counts a micro-step; on the last of an update, applies the gradient with this learning rate."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        ends_update = self._engine.is_gradient_accumulation_boundary()
        if self._flat and ends_update:
            self._flat.hand_over()
        self._engine.step()
        if not ends_update:
            return
        found = self._flat.norm if self._flat else self._engine.get_global_grad_norm()
        norm = torch.as_tensor(found, device=self._norm.device)
        applied = norm.isfinite() & (norm >= 0) & self._engine.was_step_applied()
        self._norm = torch.where(applied, norm, self._norm)
        self._skips.after_update(~applied, self._updates)
        self._invariants.after_update(lr, ~applied)
        self._updates += 1

    def check(self) -> None:
        """Reads the device. Raises Fault, on all ranks, if an update since the start was not what it is counted as."""
        violation = self._invariants.violation()
        if self.ranks.any(violation is not None):
            raise Fault(f"{violation or 'see the message of another rank'}; {_REPORT}")

    def gradient_norm(self) -> float:
        """L2 norm of the last applied gradient before clipping. Reads the device: for log lines only."""
        return float(self._norm)

    def skipped_updates(self) -> int:
        """Those of the run that were left out as their gradient was not finite. Reads the device."""
        return int(self._skips.count)

    def skipped_in_a_row(self) -> tuple[int, int]:
        """(how many, the first update) of the longest such row since this process's start. Reads the device."""
        return self._skips.longest_row()

    def write_events(self, figures: Mapping[str, float]) -> None:
        """Hands figures to the monitors that the JSON enables. Their steps are samples, as those of DeepSpeed's own."""
        monitor, samples = self._engine.monitor, self._engine.global_samples
        if monitor.enabled:
            monitor.write_events([(name, value, samples) for name, value in figures.items()])

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Every parameter's fp32 weight and Adam moments, whole; all ranks must iterate. Not to be kept: clone them."""
        for parameter, name in self._names.items():
            tensors = {"weight": safe_get_full_fp32_param(parameter)}
            for key in MOMENTS:
                tensors[key] = safe_get_full_optimizer_state(parameter, key)
            yield name, {key: value.detach() for key, value in tensors.items()}

    def master_fragments(self) -> Iterator[tuple[str, int, Tensor]]:
        """Every parameter's name and what this rank has of its fp32 weights: the number of the first, and (n,) of them.

        Without communication. Each weight is one rank's, so n may be 0. Not to be kept.
        """
        for parameter, name in self._names.items():
            yield name, *_master_fragment(parameter, self.ranks.rank)

    def load_state(
        self,
        state: Mapping[str, Mapping[str, Tensor]],
        *,
        update: int,
        skipped: int = 0,
        samples: int,
        warm_up_batch: MaskedBatch | LabelledBatch,
    ) -> None:
        """Takes up `state`, kind ("weight" or a moment) -> name -> whole tensor, at any stage and world size; the
        model must hold the weights already.

        The moments exist only after a first step, so one is made at learning rate 0, which moves nothing; then
        masters, moments and Adam's step count are set. (Setting the masters alone leaves the bf16 copies stale for
        one update: loss 4.59 instead of 3.50.)
        """
        monitor = self._engine.monitor
        monitored, monitor.enabled = monitor.enabled, False  # it is no update of the run
        for _ in range(self._engine.gradient_accumulation_steps()):
            self.backward(self(warm_up_batch).sum() * 0)  # in fp16 anything else may overflow
            self.step(0.0)
        for parameter, name in self._names.items():
            for key in ("weight", *MOMENTS):
                self._set(parameter, key, state[key][name])
        self._set_adam_step(update - skipped)
        self._skips = Skips(self.ranks.device, skipped)
        self._invariants = Invariants(self._engine, self._skips, update)
        self._updates = update
        self._engine.global_samples, monitor.enabled = samples, monitored

    def _set(self, parameter: Tensor, key: str, whole: Tensor) -> None:
        """Sets the master ("weight") or a moment of a parameter, or this rank's part of it."""
        values = whole.to(parameter.device)
        set_weight, set_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
        if hasattr(parameter, "ds_tensor"):
            # DeepSpeed takes none in ZeRO 3 whose numbers the ranks cannot divide evenly.
            part = parameter.ds_tensor.numel()
            begin = part * self.ranks.rank
            padded = F.pad(values.flatten(), (0, part * self.ranks.world_size - values.numel()))
            values = padded[begin : begin + part]
            set_weight, set_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
        if key == "weight":
            set_weight(parameter, values)
        else:
            set_moment(parameter, values, key)

    def _set_adam_step(self, update: int) -> None:
        adam = self._engine.optimizer.optimizer
        for values in adam.state.values():
            if isinstance(values.get("step"), Tensor):
                values["step"].fill_(update)
            else:
                values["step"] = update
        for group in adam.param_groups:
            if "step" in group:  # where DeepSpeed's FusedAdam begins to count
                group["step"] = update
