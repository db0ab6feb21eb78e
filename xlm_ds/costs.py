"""What an update costs: memory by part and seconds by part, from arithmetic alone.

    job = Job(shape, geometry, tokens=256, masked=39, settings=settings, device=GPUS["h100"])
    memory(job)                                # {part: Moments(backward, update)}, bytes of one rank
    seconds(job)                               # {part: seconds of an update}

Sizes follow from the code of model.py and engine.py. Speeds are a model: peaks are the makers', and the shares of them
that are reached are the constants below, most of them estimates.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from xlm_ds.architectures import ModelShape, flops_by_part, parameter_count
from xlm_ds.deepspeed_config import precision_of, suits_flat_gradients
from xlm_ds.devices import GIB, Device, Speed
from xlm_ds.geometry import Geometry

# Of the peak, what matrix products of many rows reach; on an H100 half of that at 900 rows. These two give the 480, 660
# and 690 TFLOP/s that were estimated, not measured, for 2,048, 16,384 and 65,536 rows of width 1,024 on an H200.
MATRIX_SHARE = 0.7
HALF_SPEED_ROWS = 900
ATTENTION_SHARE = 0.3  # of the peak; estimated
BANDWIDTH_SHARE = 0.9  # a copy on an H200: 4.3 of 4.8 TB/s
LINK_SHARE = 0.8  # estimated
# Numbers read and written per token, layer and width by what is between the products, where layers are compiled:
# 2 ms for 16,384 tokens of xlm_base, estimated.
POINTWISE_NUMBERS = 43
LAUNCH_SECONDS = 4e-4  # that a GPU waits for its host per layer, forward and backward; estimated
HOST_BANDWIDTH = 20e9  # bytes a second of Adam on the host, each rank; estimated
HOST_LINK = 20e9  # bytes a second between a GPU and its host; estimated

# Of a GPU: CUDA's context, kernels and the libraries' workspaces; estimated. Of a CPU: a process of 0.4 GiB that has
# updated a tiny model, and what else is not counted here. With it the peaks of ten configurations at stages 1 to 3,
# of 1 to 4 GB, were predicted at 0.91 to 1.06 of what was measured (November 2026; tests/test_plan.py repeats some).
START_BYTES = 1.0 * GIB
START_BYTES_CPU = 0.5 * GIB
USABLE = 0.95  # the rest is lost between the allocator's blocks
TILE = 128  # linear_cross_entropy.TILE


@dataclass(frozen=True, slots=True)
class Job:
    """An update: what is computed, how it is divided, and by what."""

    shape: ModelShape
    geometry: Geometry
    tokens: int  # of a sample
    masked: int  # of a sample
    settings: dict[str, Any]  # DeepSpeed's JSON
    device: Device
    gpus_per_node: int = 8
    bandwidth: float = 12.5e9  # bytes a second out of a node
    clips: bool = False

    @property
    def zero(self) -> dict[str, Any]:
        zero: dict[str, Any] = self.settings["zero_optimization"]
        return zero

    @property
    def stage(self) -> int:
        return int(self.zero["stage"])

    @property
    def dtype(self) -> str:
        return precision_of(self.settings)

    @property
    def size(self) -> int:
        """Bytes of a number that is computed with."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def gradient_size(self) -> int:
        """Bytes of a number of the gradients: engine.FlatGradients has fp32 where they are added up, or not sent."""
        geometry = self.geometry
        adds_up = geometry.accumulation > 1 or geometry.world_size == 1
        return 4 if self.flat and adds_up else self.size

    @property
    def flat(self) -> bool:
        return suits_flat_gradients(self.settings)

    @property
    def offloads(self) -> bool:
        offload = self.zero.get("offload_optimizer") or {}
        return bool(offload.get("device", "none") != "none")

    def zero_number(self, key: str, default: float) -> float:
        value = self.zero.get(key)
        return value if isinstance(value, int | float) else default

    @property
    def ranks(self) -> int:
        return self.geometry.world_size

    @property
    def micro_tokens(self) -> int:
        return self.geometry.rows * self.tokens

    @property
    def update_tokens(self) -> int:
        return self.geometry.batch * self.tokens

    @property
    def parameters(self) -> int:
        return parameter_count(self.shape)

    @property
    def flop_peak(self) -> float:
        """Operations a second that the maker states for what is computed with; 0 if not known."""
        return self.device.speed.peak(self.dtype) if self.device.speed else 0.0

    @property
    def update_flops(self) -> float:
        """Of one rank."""
        return self.geometry.accumulation * sum(self.micro_flops.values())

    @property
    def micro_flops(self) -> dict[str, float]:
        rows = self.geometry.rows
        return flops_by_part(self.shape, rows=rows, tokens=self.tokens, masked=self.masked)


# ------------------------------------------------------------------------------------------ memory


class Moments(NamedTuple):
    """Bytes of one rank when its backward pass begins, and when its optimizer steps."""

    backward: float
    update: float


def memory(job: Job) -> dict[str, Moments]:
    """By part; its peak is the larger of the two sums. Adam's moments are there from the first update on."""

    def always(amount: float) -> Moments:
        return Moments(amount, amount)

    mine = job.parameters / job.ranks
    on_device = not job.offloads
    parts = {
        "weights": always(_weights(job)),
        "fp32 masters": always(4 * mine * on_device),
        "Adam's moments": always(8 * mine * on_device),
        "gradients": _gradients(job),
        "activations": Moments(activations(job), 0),
        "logits of masked tokens": Moments(_logits(job), 0),
        "temporary": Moments(_temporary(job), 0),
        "start": always(START_BYTES_CPU if job.device.is_cpu else START_BYTES),
    }
    return {name: part for name, part in parts.items() if any(part)}


def host_memory(job: Job) -> float:
    """Bytes of masters, moments and gradients that one rank keeps on its host."""
    return job.offloads * 16 * job.parameters / job.ranks


def peak(job: Job) -> float:
    return max(map(sum, zip(*memory(job).values(), strict=True)))


def fits(job: Job) -> bool:
    return peak(job) <= USABLE * job.device.memory


def _weights(job: Job) -> float:
    if job.stage < 3:
        return job.size * job.parameters
    # Gathered weights are kept while DeepSpeed expects them to be used again among the next 1e9.
    live = min(job.parameters, job.zero_number("stage3_max_live_parameters", 1e9))
    return job.size * (job.parameters / job.ranks + live * (job.ranks > 1))


def _gradients(job: Job) -> Moments:
    mine = job.parameters / job.ranks
    if job.flat:
        buffer = job.gradient_size * job.parameters
        part = job.gradient_size * mine * (job.ranks > 1)  # reduced, in its own dtype
        return Moments(buffer, buffer + part + 4 * mine * (job.gradient_size < 4))
    bucket = job.size * job.zero_number("reduce_bucket_size", 5e8)
    buckets = bucket * (2 if job.zero.get("overlap_comm") else 1)
    if job.device.is_cpu:  # memory that is not written to is not there
        buckets = min(buckets, job.size * job.parameters)
    kept = job.size * (mine if job.stage > 1 else job.parameters)
    step = 0 if job.offloads else (4 + job.size) * mine  # flattened, and again in fp32
    return Moments(buckets + kept, kept + step)


def activations(job: Job) -> float:
    """Bytes that autograd keeps of a micro-batch for its backward pass, layers not compiled."""
    shape, rows = job.shape, job.micro_tokens
    dim, inner = shape.embed_dim, shape.ffn_embed_dim
    noise = job.size if job.device.is_cpu else 1  # bytes of a dropped number's mask
    # Of a layer: input, queries, keys, values, context, two sums, a norm; and the feed-forward's inside, once where its
    # activation remembers its result.
    numbers = 8 * dim + (2 if shape.activation_fn == "gelu" else 1) * inner
    masks = 2 * dim * (shape.dropout > 0) + inner * (shape.activation_dropout > 0)
    layer = rows * (job.size * numbers + noise * masks) + _kept_attention(job)
    ends = rows * dim * (job.size + noise * (shape.dropout > 0)) + 24 * rows
    head = 4 * job.size * job.geometry.rows * job.masked * dim
    return shape.layers * layer + ends + head


def _kept_attention(job: Job) -> float:
    """Of a layer; with dropout on a CPU nothing, as it is computed again there."""
    if not job.device.is_cpu or job.shape.attention_dropout == 0:
        return 4.0 * job.micro_tokens * job.shape.attention_heads
    return 0


def _logits(job: Job) -> float:
    padded = -(-job.shape.vocab_size // TILE) * TILE
    return job.size * job.geometry.rows * job.masked * padded


def _temporary(job: Job) -> float:
    """Beside the logits: the table's gradient, alive from the head to the lookup; and of what a layer's backward pass
    computes, that which is more than the logits, gone by then.
    """
    shape = job.shape
    table = job.size * shape.vocab_size * shape.embed_dim
    layer = job.size * job.micro_tokens * 2.0 * (shape.ffn_embed_dim + shape.embed_dim)
    if job.device.is_cpu and shape.attention_dropout > 0:
        layer = max(layer, 5 * 4.0 * job.micro_tokens * shape.attention_heads * job.tokens)
    return table + max(0.0, layer - _logits(job))


# ------------------------------------------------------------------------------------------- speed


def seconds(job: Job) -> dict[str, float]:
    """Of an update, by part, nothing overlapping; empty where the device's speed is not known."""
    speed = job.device.speed
    if speed is None:
        return {}
    parts = {name: job.geometry.accumulation * s for name, s in _micro(job, speed)}
    parts["optimizer"] = _optimizer(job, speed)
    parts["communication"] = sum(communicated(job)) / _link(job, speed)
    computed = sum(parts[name] for name in ("matrix products", "attention", "between them"))
    if not job.device.is_cpu:
        launches = job.geometry.accumulation * LAUNCH_SECONDS * (job.shape.layers + 1)
        parts["waiting for kernel launches"] = max(0.0, launches - computed)
    return {name: s for name, s in parts.items() if s}


def _micro(job: Job, speed: Speed) -> list[tuple[str, float]]:
    flops, flop_rate = job.micro_flops, job.flop_peak
    rows = job.micro_tokens
    half_speed_rows = HALF_SPEED_ROWS * flop_rate / 989e12
    share = MATRIX_SHARE * rows / (rows + half_speed_rows)
    between = POINTWISE_NUMBERS * rows * job.shape.layers * job.shape.embed_dim * job.size
    logits = 3 * _logits(job)  # read twice, written once
    return [
        ("matrix products", (flops["layers"] + flops["head"]) / (share * flop_rate)),
        ("attention", flops["attention"] / (ATTENTION_SHARE * flop_rate)),
        ("between them", (between + logits) / (BANDWIDTH_SHARE * speed.memory)),
    ]


def _optimizer(job: Job, speed: Speed) -> float:
    """Passes over gradients, masters and moments, by their bytes per parameter."""
    size, micro_batches = job.size, job.geometry.accumulation
    mine = job.parameters / job.ranks
    adam = 28 + 4 + size  # reads gradient, master, two moments, writes three; copies the weight
    if job.flat:
        # Taken over, or added; then in fp32, its norm, and clipped.
        whole = micro_batches * (size + job.gradient_size) + (micro_batches - 1) * job.gradient_size
        partition = adam + (6 if job.gradient_size < 4 else 0) + 4 + 8 * job.clips
    else:
        # To the bucket and divided; then flattened, its norm in float64, in fp32, and scaled.
        whole = micro_batches * 4 * size
        checks = job.dtype != "fp32" and job.settings[job.dtype].get("check_grad_overflow", True)
        partition = adam + 2 * size + 18 + 4 + size + 8 * job.clips + 28 * checks
    on_device = whole * job.parameters / (BANDWIDTH_SHARE * speed.memory)
    if job.offloads:
        return on_device + mine * (partition / HOST_BANDWIDTH + (4 + size) / HOST_LINK)
    return on_device + partition * mine / (BANDWIDTH_SHARE * speed.memory)


def communicated(job: Job) -> tuple[float, float]:
    """Bytes that a rank sends in an update: of gradients, of weights. Each is a ring's (n - 1) / n of the whole."""
    whole = job.parameters * (job.ranks - 1) / job.ranks
    micro_batches = job.geometry.accumulation
    if job.stage == 3:
        return micro_batches * job.size * whole, micro_batches * 2 * job.size * whole
    # DeepSpeed's own path sums a bucket on all ranks (twice the bytes), at stage 2 for every micro-batch.
    times = 1 if job.flat else 2 * (micro_batches if job.stage == 2 else 1)
    return times * job.gradient_size * whole, job.size * whole


def _link(job: Job, speed: Speed) -> float:
    """Bytes a second around the ring: its slowest place is between nodes, where there are several."""
    across = job.bandwidth if job.ranks > job.gpus_per_node else speed.link
    return LINK_SHARE * min(across, speed.link)
