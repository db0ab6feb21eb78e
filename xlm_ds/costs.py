"""What an update costs: memory by part and seconds by part, from arithmetic alone.

    job = Job(shape, geometry, tokens=256, masked=39, settings=settings, device=GPUS["h100"])
    memory(job)                                # {part: Moments(backward, update)}, bytes of one rank
    seconds(job)                               # {part: seconds of an update}

Sizes follow from the code of model.py and engine.py. Speeds are a model: peaks are the makers', and the shares of them
that are reached are the constants below, most of them estimates. docs/decisions/0011-scale.md has what was measured of
the communication.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from xlm_ds.architectures import ModelShape, flops_by_part, parameter_count, tensor_sizes
from xlm_ds.deepspeed_config import looks_for_nan, precision_of, suits_flat_gradients, sums_in_fp32
from xlm_ds.devices import GIB, Device, Speed
from xlm_ds.geometry import Geometry

# Of the peak, what matrix products of many rows reach; on an H100 half of that at 900 rows. These two give the 480, 660
# and 690 TFLOP/s that were estimated, not measured, for 2,048, 16,384 and 65,536 rows of width 1,024 on an H200.
MATRIX_SHARE = 0.7
HALF_SPEED_ROWS = 900
ATTENTION_SHARE = 0.3  # of the peak; estimated
BANDWIDTH_SHARE = 0.9  # a copy on an H200: 4.3 of 4.8 TB/s
LINK_SHARE = 0.8  # of a GPU's link or a node's network, what NCCL's rings carry; estimated
LINK_SHARE_CPU = 0.95  # of Ethernet: TCP carries 1,448 of 1,514 bytes
# Numbers read and written per token, layer and width by what is between the products, where layers are compiled:
# 2 ms for 16,384 tokens of xlm_base, estimated.
POINTWISE_NUMBERS = 43
LAUNCH_SECONDS = 4e-4  # that a GPU waits for its host per layer, forward and backward; estimated
HOST_BANDWIDTH = 20e9  # bytes a second of Adam on the host, each rank; estimated
HOST_LINK = 20e9  # bytes a second between a GPU and its host; estimated


class Ring(NamedTuple):
    """How a library sends around a ring of all ranks, one node after another."""

    start: float  # seconds, once a collective
    hop_inside: float  # seconds from rank to rank of a node
    hop_between: float  # seconds from node to node
    share: float  # of the bandwidth


# What NCCL itself reckons with where it chooses a protocol (hwLat of its src/graph/tuning.cc, with NVLink): Simple for
# much, LL for little. Its trees, NVLS and PAT are quicker where ranks are many and messages small: not in this model.
NCCL_RINGS = (Ring(8.4e-6, 3.4e-6, 14e-6, 1.0), Ring(6.6e-6, 1.1e-6, 2.7e-6, 0.25))
# A single number took 0.2 to 1.2 ms around 2 hosts and 0.3 to 2.4 ms around 3 (namespaces of 2 cores, November 2026).
GLOO_RINGS = (Ring(2e-4, 5e-4, 5e-4, 1.0),)

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
        """Bytes of a number of the gradients."""
        geometry = self.geometry
        in_fp32 = self.flat and sums_in_fp32(geometry.accumulation, geometry.world_size)
        return 4 if in_fp32 else self.size

    @property
    def sent_gradient_size(self) -> int:
        """Bytes of a number of the gradients on its way to other ranks."""
        asked = self.settings.get("communication_data_type")
        return self.gradient_size if asked is None else 4 if asked == "fp32" else 2

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
    def nodes(self) -> int:
        return -(-self.ranks // self.gpus_per_node)

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
    ends += rows * (job.size * dim + 8) * shape.normalize_embeddings
    # What is multiplied with the table; and the masked states, and two between, where there is a transform.
    head = (4 if shape.head_transform else 1) * job.size * job.geometry.rows * job.masked * dim
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
    parts["communication"] = sum(send_seconds(job, speed, sent) for sent in collectives(job))
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
        checks = job.dtype != "fp32" and looks_for_nan(job.settings)
        partition = adam + 2 * size + 18 + 4 + size + 8 * job.clips + 28 * checks
    on_device = whole * job.parameters / (BANDWIDTH_SHARE * speed.memory)
    if job.offloads:
        return on_device + mine * (partition / HOST_BANDWIDTH + (4 + size) / HOST_LINK)
    return on_device + partition * mine / (BANDWIDTH_SHARE * speed.memory)


# ------------------------------------------------------------------------------------ communication


class Collectives(NamedTuple):
    """Those of an update that are alike."""

    what: str  # gradients, weights or norm
    number: float
    size: float  # bytes of each, all ranks' parts together
    passes: int  # around the ring: 1 of a reduce-scatter or an all-gather, 2 of an all-reduce


def collectives(job: Job) -> list[Collectives]:
    """What DeepSpeed 0.19.8 and FlatGradients send in an update; none of one rank.

    As tests/count_collectives.py counts them on 2 ranks; the first update of ZeRO 3, which does not know the order of
    its layers yet, has others.
    """
    if job.ranks == 1:
        return []
    micro_batches = job.geometry.accumulation
    gradients = job.sent_gradient_size * job.parameters
    scatter = 2 if job.device.is_cpu else 1  # gloo sums on all ranks, and drops the rest
    norm = Collectives("norm", 1, 4, 2)
    if job.stage == 3:
        n = micro_batches * _buckets(job)
        return [
            Collectives("gradients", n, micro_batches * gradients / n, scatter),
            *_gathers(job),
            norm,
        ]
    if job.flat:
        sums = Collectives("gradients", 1, gradients, scatter)
    else:
        # DeepSpeed's own path sums on all ranks, at stage 2 for every micro-batch.
        times = micro_batches if job.stage == 2 else 1
        n = times * _buckets(job)
        sums = Collectives("gradients", n, times * gradients / n, 2)
    # All weights at once: allgather_bucket_size decides nothing where torch has all_gather_into_tensor.
    return [sums, Collectives("weights", 1, job.size * job.parameters, 1), norm]


def _buckets(job: Job) -> int:
    return math.ceil(job.parameters / job.zero_number("reduce_bucket_size", 5e8))


def _gathers(job: Job) -> list[Collectives]:
    """ZeRO 3's weights: small tensors are kept, and sent one by one after every update; the others for every
    micro-batch, and again in its backward pass where that is too far away for them to be kept.
    """
    threshold = job.zero_number("stage3_param_persistence_threshold", 1e5)
    kept = [size for size in tensor_sizes(job.shape) if size <= threshold]
    divided = job.parameters - sum(kept)
    # A tensor with x numbers before it is used again 2 (P - x) numbers later.
    reach = job.zero_number("stage3_max_reuse_distance", 1e9) / 2
    again = max(0.0, divided - reach)
    micro_batches = job.geometry.accumulation
    gathers = []
    if divided:
        modules = 6 * job.shape.layers + 5
        ahead = job.zero_number("stage3_prefetch_bucket_size", 5e7)
        at_once = min(modules, 1 + math.ceil(divided / ahead)) if ahead else modules
        n = at_once * (1 + again / divided)
        size = job.size * (divided + again) / n
        gathers.append(Collectives("weights", micro_batches * n, size, 1))
    if kept:
        size = job.size * sum(kept) / len(kept)
        gathers.append(Collectives("weights", len(kept), size, 1))
    return gathers


def communicated(job: Job) -> tuple[float, float]:
    """Bytes that a rank sends in an update: of gradients, of weights. Each is a ring's (n - 1) / n of the whole."""
    of = dict.fromkeys(("gradients", "weights", "norm"), 0.0)
    for sent in collectives(job):
        of[sent.what] += sent.number * _sent_by_a_rank(job, sent)
    return of["gradients"], of["weights"]


def _sent_by_a_rank(job: Job, sent: Collectives) -> float:
    """Bytes of one of them."""
    return sent.passes * sent.size * (job.ranks - 1) / job.ranks


def send_seconds(job: Job, speed: Speed, sent: Collectives) -> float:
    """Of all of them, one after another: the ring's hops, and its bytes at the rate of its slowest place."""
    rings = GLOO_RINGS if job.device.is_cpu else NCCL_RINGS
    link, bytes_sent = _link(job, speed), _sent_by_a_rank(job, sent)
    between = job.nodes - 1
    inside = job.ranks - 1 - between
    return sent.number * min(
        ring.start
        + sent.passes * (inside * ring.hop_inside + between * ring.hop_between)
        + bytes_sent / (ring.share * link)
        for ring in rings
    )


def _link(job: Job, speed: Speed) -> float:
    """Bytes a second around the ring: its slowest place is between nodes, where there are several."""
    share = LINK_SHARE_CPU if job.device.is_cpu else LINK_SHARE
    across = job.bandwidth if job.nodes > 1 else speed.link
    return share * min(across, speed.link)
