"""What is said of a run before it runs: the parts add up, and are those of what is then built."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xlm_ds import plan, train
from xlm_ds.architectures import (
    flops_by_part,
    parameters_by_part,
    shape_from_config,
    tensor_sizes,
    useful_flops,
)
from xlm_ds.config import ModelConfig, PlanConfig
from xlm_ds.costs import (
    TILE,
    Job,
    activations,
    collectives,
    communicated,
    fits,
    memory,
    peak,
    seconds,
)
from xlm_ds.deepspeed_config import CONFIG_DIRECTORY
from xlm_ds.devices import GIB, GPUS, this_cpu, this_gpu
from xlm_ds.flags import parse
from xlm_ds.log import InputError

MEASURE = Path(__file__).parent / "measure_memory.py"
RECIPE = ("--vocab-size=95000",)
MODEL_GIVEN = 2  # bytes of a bf16 weight


def job_of(*flags: str) -> Job:
    config = parse(PlanConfig, [*RECIPE, *flags])
    device = this_cpu() if config.gpu == "cpu" else GPUS[config.gpu]
    ground = plan.Ground(device, config.gpus, config.gpus_per_node, config.bandwidth * 1e9)
    return plan.build_job(
        config.data,
        config.model,
        config.optimization,
        config.run,
        plan.read_facts(config),
        ground,
    )


def shipped(name: str) -> str:
    return f"--deepspeed-config={CONFIG_DIRECTORY / name}.json"


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert plan.main([*RECIPE, *flags]) == 0
    return capsys.readouterr().out


def test_gradients_of_very_many_ranks_are_fp32() -> None:
    """As engine.FlatGradients has them; beyond its limit bf16 loses too much of the sum."""
    sizes = [job_of("--gpu=h100", f"--gpus={n}").gradient_size for n in (1, 2, 256, 264)]
    assert sizes == [4, 2, 2, 4]


# ----------------------------------------------------------------------------------- what is known


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"no_token_positional_embeddings": True},
        {"encoder_normalize_before": True},
        {"arch": "xlm"},
        {"arch": "xlm_100"},
    ],
)
def test_parameters_are_those_of_a_built_model(flags: dict[str, Any]) -> None:
    from xlm_ds.model import build_model

    config = ModelConfig(
        encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=40, encoder_attention_heads=2, **flags
    )  # fmt: skip
    shape = shape_from_config(config, vocab_size=50, languages=3, tokens_per_sample=12)
    model = build_model(shape, seed=0)
    built = {"token embedding": 0, "language and position embeddings": 0, "layers": 0, "head": 0}
    for name, parameter in model.named_parameters():
        first = name.split(".")[0]
        part = {"token_embedding": "token embedding", "layers": "layers", "head": "head"}
        built[part.get(first, "language and position embeddings")] += parameter.numel()
    assert parameters_by_part(shape) == built
    assert sorted(tensor_sizes(shape)) == sorted(p.numel() for p in model.parameters())


def test_useful_operations_are_three_times_the_products_of_a_forward_pass() -> None:
    """Counted by hand for one layer; for xlm_base, the 561.7 million a token that its size is known by."""
    job = job_of("--encoder-layers=1", "--encoder-embed-dim=4", "--encoder-ffn-embed-dim=6",
                 "--encoder-attention-heads=2", "--tokens-per-sample=10", "--max-tokens=10")  # fmt: skip
    parts = flops_by_part(job.shape, rows=1, tokens=10, masked=2)
    assert parts["layers"] == 3 * 2 * 10 * (4 * 4 * 4 + 2 * 4 * 6)
    assert parts["attention"] == 3 * 2 * (10 * 10 * 4 + 10 * 10 * 4)
    assert parts["head"] == 3 * 2 * 2 * (4 * 4 + 4 * 95_000)
    base = job_of()
    per_token = useful_flops(base.shape, rows=8, tokens=256, masked=39) / 2048
    assert per_token == pytest.approx(561.7e6, rel=1e-4)
    assert base.masked == 39


def test_what_autograd_keeps_is_what_is_predicted() -> None:
    import torch

    from xlm_ds.batches import MaskedBatch
    from xlm_ds.linear_cross_entropy import TILE as padding
    from xlm_ds.model import build_model

    assert padding == TILE
    small = (
        "--vocab-size=100", "--gpu=cpu", "--max-tokens=512", "--encoder-layers=3", "--encoder-embed-dim=64",
        "--encoder-ffn-embed-dim=256", "--encoder-attention-heads=4",
    )  # fmt: skip
    without_dropout = ("--dropout=0", "--attention-dropout=0")
    xlm = ("--arch=xlm", "--tokens-per-sample=64")
    for flags in (("--tokens-per-sample=64",), ("--tokens-per-sample=512",), without_dropout, xlm):
        job = job_of(*small, *flags)
        model = build_model(job.shape, seed=0)
        model.train()
        rows, tokens = job.geometry.rows, job.tokens
        ids = torch.full((rows, tokens), 7)
        positions = torch.cat([torch.arange(1, job.masked + 1) + r * tokens for r in range(rows)])
        languages = torch.zeros(rows, dtype=torch.long)
        batch = MaskedBatch(ids, languages, positions, ids.flatten()[positions], False)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: torch.Tensor, weights: Any = weights, kept: Any = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(batch)
        found = sum(storage.nbytes() for storage in kept.values())
        logits = memory(job)["logits of masked tokens"].backward
        assert activations(job) + logits == pytest.approx(found, rel=0.03)


CASES = [
    ("zero1_fp32", 16, 1, 0.1),
    pytest.param("zero1_bf16", 16, 1, 0.1, marks=pytest.mark.slow),
    pytest.param("zero1_bf16", 16, 4, 0.1, marks=pytest.mark.slow),
    pytest.param("zero2_bf16", 16, 1, 0.1, marks=pytest.mark.slow),
    pytest.param("zero3_bf16", 16, 1, 0.1, marks=pytest.mark.slow),
    pytest.param("zero1_fp32", 64, 1, 0.0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "rows", "micro_batches", "dropout"), CASES)
def test_the_peak_on_a_cpu_is_what_is_predicted(
    name: str, rows: int, micro_batches: int, dropout: float
) -> None:
    """Two updates in a process of their own."""
    flags = [
        "--vocab-size=60000", "--languages=2", "--tokens-per-sample=128", f"--max-tokens={128 * rows}",
        f"--update-freq={micro_batches}", f"--dropout={dropout}", f"--attention-dropout={dropout}",
        "--encoder-layers=4", "--encoder-embed-dim=256", "--encoder-ffn-embed-dim=1024", "--gpu=cpu", shipped(name),
    ]  # fmt: skip
    # Not the ranks of this process, should it have started some.
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "MASTER_PORT")}
    environment["PYTHONPATH"] = str(Path(plan.__file__).parent.parent)
    environment["OMP_NUM_THREADS"] = "1"  # several would wait for each other on a busy machine
    command = [sys.executable, str(MEASURE), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=500, env=environment
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15), found


# --------------------------------------------------------------------------------- laws of the parts


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_divides_what_it_says(stage: int) -> None:
    alone, many = (
        memory(job_of(shipped(f"zero{stage}_bf16"), f"--gpus={ranks}")) for ranks in (1, 8)
    )
    for part in ("fp32 masters", "Adam's moments"):
        assert many[part].update == alone[part].update / 8
    for part in ("activations", "logits of masked tokens"):
        assert many[part] == alone[part]
    parameters = job_of().parameters
    bucket = 2 * 2e8
    kept = {1: 2 * parameters, 2: bucket + 2 * parameters / 8, 3: bucket + 2 * parameters / 8}
    assert many["gradients"].backward == kept[stage]
    held = {1: 2 * parameters, 2: 2 * parameters, 3: 2 * parameters / 8 + 2 * parameters}
    assert many["weights"].backward == held[stage]


def test_offloading_moves_the_optimizer_to_the_host(tmp_path: Path) -> None:
    template = json.loads((CONFIG_DIRECTORY / "zero2_bf16.json").read_text(encoding="utf-8"))
    template["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    (tmp_path / "offload.json").write_text(json.dumps(template), encoding="utf-8")
    job = job_of(f"--deepspeed-config={tmp_path / 'offload.json'}")
    assert not {"fp32 masters", "Adam's moments"} & set(memory(job))
    assert peak(job) < peak(job_of(shipped("zero2_bf16")))
    assert seconds(job)["optimizer"] > seconds(job_of(shipped("zero2_bf16")))["optimizer"]


def test_the_peak_is_the_larger_sum_and_grows_with_the_micro_batch() -> None:
    job = job_of()
    backward, update = (sum(column) for column in zip(*memory(job).values(), strict=True))
    assert peak(job) == max(backward, update)
    largest = plan.largest_rows(job)
    assert fits(plan.divided(job, largest, 1))
    assert not fits(plan.divided(job, largest + 1, 1))


def test_what_is_sent() -> None:
    """(n - 1) / n of the gradients and of the weights; nothing by one rank; at stage 3 for every micro-batch."""
    weights = MODEL_GIVEN * job_of().parameters
    assert communicated(job_of()) == (0, 0)
    assert communicated(job_of("--gpus=8")) == (weights * 7 / 8, weights * 7 / 8)
    assert communicated(job_of("--gpus=8", "--update-freq=4"))[0] == 2 * weights * 7 / 8  # in fp32
    three = communicated(job_of("--gpus=8", "--update-freq=4", shipped("zero3_bf16")))
    assert three == pytest.approx((4 * weights * 7 / 8, 4 * weights * 7 / 8))


def test_a_slow_network_is_the_limit_between_nodes_only() -> None:
    for ranks, slower in ((8, False), (16, True)):
        fast, slow = (job_of(f"--gpus={ranks}", f"--bandwidth={b}") for b in (400, 1))
        assert (seconds(slow)["communication"] > seconds(fast)["communication"]) == slower


TINY = (
    "--vocab-size=500", "--tokens-per-sample=16", "--max-tokens=32", "--encoder-layers=4", "--encoder-embed-dim=64",
    "--encoder-ffn-embed-dim=256", "--encoder-attention-heads=4", "--gpu=cpu",
)  # fmt: skip
KEPT = "stage3_param_persistence_threshold"


@pytest.mark.slow
def test_collectives_are_those_that_two_ranks_make() -> None:
    """How many, of how many bytes: of every stage, with several micro-batches, buckets and tensors kept."""
    cases = [
        ("zero1_bf16", 1, {}),
        ("zero1_bf16", 2, {}),
        ("zero2_bf16", 2, {}),
        ("zero2_bf16", 1, {"reduce_bucket_size": 50_000}),
        ("zero3_bf16", 2, {KEPT: 0}),
        ("zero3_bf16", 1, {KEPT: 100_000}),
        ("zero3_bf16", 2, {KEPT: 1000}),
        ("zero3_bf16", 1, {KEPT: 0, "stage3_prefetch_bucket_size": 50_000, "reduce_bucket_size": 50_000}),
        ("zero3_bf16", 1, {KEPT: 0, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}),
    ]  # fmt: skip
    told = [
        json.dumps({"flags": [*TINY, f"--update-freq={freq}", shipped(name)], "zero": zero})
        for name, freq, zero in cases
    ]
    script = Path(__file__).parent / "count_collectives.py"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "MASTER_PORT")}
    environment |= {"PYTHONPATH": str(Path(plan.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), *told], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(cases)
    for case, line in zip(cases, lines, strict=True):
        predicted, counted = line["predicted"], line["counted"]
        assert [(p[0], p[1], p[3]) for p in predicted] == [(c[0], c[1], c[3]) for c in counted], (
            case
        )
        for said, found in zip(predicted, counted, strict=True):
            # The norm is of 4 or 8 bytes; ZeRO fills parts up to be equal.
            assert said[2] == pytest.approx(found[2], rel=0.03, abs=4), case


def test_communication_by_hand() -> None:
    """16 H100 in two machines at 12.5 GB/s: a reduce-scatter and an all-gather of 2 bytes a weight, and a norm."""
    job = job_of("--gpus=16")
    ring = 8.4e-6 + 14 * 3.4e-6 + 14e-6 + 2 * job.parameters * 15 / 16 / (0.8 * 12.5e9)
    norm = 6.6e-6 + 2 * (14 * 1.1e-6 + 2.7e-6) + 2 * 4 * 15 / 16 / (0.25 * 0.8 * 12.5e9)
    assert seconds(job)["communication"] == pytest.approx(2 * ring + norm, rel=1e-12)
    assert [(sent.what, sent.number, sent.passes) for sent in collectives(job)] == [
        ("gradients", 1, 1),
        ("weights", 1, 1),
        ("norm", 1, 2),
    ]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_communication_grows_with_ranks_and_falls_with_bandwidth(stage: int) -> None:
    def waited(gpus: int, bandwidth: float) -> float:
        job = job_of(shipped(f"zero{stage}_bf16"), f"--gpus={gpus}", f"--bandwidth={bandwidth}")
        return seconds(job).get("communication", 0.0)

    assert waited(1, 50) == 0
    by_ranks = [waited(gpus, 50) for gpus in (1, *plan.SCALE)]
    assert by_ranks == sorted(set(by_ranks))
    by_bandwidth = [waited(64, bandwidth) for bandwidth in (400, 100, 25, 12.5)]
    assert by_bandwidth == sorted(set(by_bandwidth))


def test_a_higher_stage_sends_more_of_several_micro_batches() -> None:
    sent = [
        sum(communicated(job_of(shipped(f"zero{stage}_bf16"), "--gpus=8", "--update-freq=4")))
        for stage in (1, 2, 3)
    ]
    # Stage 1 once in fp32; 2 four all-reduces in bf16; both all weights. Stage 3 both halves four times.
    weights = MODEL_GIVEN * job_of().parameters * 7 / 8
    assert sent == pytest.approx([3 * weights, 9 * weights, 8 * weights])
    # Of one micro-batch as many bytes as stage 1, in more messages.
    one, three = (job_of(shipped(f"zero{stage}_bf16"), "--gpus=8") for stage in (1, 3))
    assert sum(communicated(three)) == pytest.approx(sum(communicated(one)))
    assert seconds(three)["communication"] > seconds(one)["communication"]


def test_gradients_in_fp32_are_twice_the_bytes() -> None:
    job = job_of("--gpus=8", shipped("zero2_bf16"))
    asked = dataclasses.replace(job, settings=job.settings | {"communication_data_type": "fp32"})
    assert communicated(asked)[0] == 2 * communicated(job)[0]
    assert communicated(asked)[1] == communicated(job)[1]


def test_smaller_buckets_are_more_messages_and_as_many_bytes() -> None:
    large = job_of("--gpus=64", shipped("zero2_bf16"))
    zero = large.zero | {"reduce_bucket_size": 10_000_000}
    small = dataclasses.replace(large, settings=large.settings | {"zero_optimization": zero})
    assert [collectives(j)[0].number for j in (large, small)] == [1, 18]  # of 174 million
    assert communicated(large) == pytest.approx(communicated(small), rel=1e-12)
    assert seconds(large)["communication"] < seconds(small)["communication"]


def test_zero_3_gathers_twice_what_it_cannot_keep_until_the_backward_pass() -> None:
    """Tensors are kept if they are used again within 1e9 numbers: in a model of half as many, all."""
    for layers, again in ((6, 0.0), (100, 1.0)):
        job = job_of("--gpus=8", f"--encoder-layers={layers}", shipped("zero3_bf16"))
        whole = MODEL_GIVEN * job.parameters * 7 / 8
        extra = again * MODEL_GIVEN * (job.parameters - 5e8) * 7 / 8
        assert communicated(job) == pytest.approx((whole, whole + extra), rel=1e-9)


@pytest.mark.parametrize(
    "flags", [(), ("--gpu=l4",), ("--gpu=b200", "--max-tokens=65536", "--bandwidth=400")]
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_efficiency_is_a_share(stage: int, flags: tuple[str, ...]) -> None:
    config = parse(PlanConfig, [*RECIPE, *flags])
    base = plan.at_stage(job_of("--max-tokens=16384", *flags), stage)
    assert base.stage == stage
    optimization = dataclasses.replace(
        config.optimization, max_tokens=base.geometry.rows * base.tokens
    )
    for gpus in (1, *plan.SCALE):
        job = plan.with_same_share(base, gpus)
        found = plan.reached(job, optimization)
        assert 0 < found.efficiency < 1
        assert (found.communication == 0) == (gpus == 1)
        same = plan.with_same_batch(base, optimization, gpus)
        assert (same is None) == (gpus > base.geometry.batch)
        if same is not None:
            assert same.update_tokens == base.update_tokens
            assert 0 < plan.reached(same, optimization).efficiency < 1


def test_speed_is_what_the_estimate_for_an_h200_was() -> None:
    """0.87 million tokens/s at 64 x 256, 0.96 at 256 x 256, compiled; ours here has DeepSpeed's passes too."""
    for rows, expected in ((64, 0.87e6), (256, 0.96e6)):
        job = job_of("--gpu=h200", f"--max-tokens={256 * rows}")
        assert job.update_tokens / sum(seconds(job).values()) == pytest.approx(expected, rel=0.08)


def test_a_gpu_is_known_by_the_name_that_torch_gives_it() -> None:
    for name, known in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-32GB", "v100"),
    ):
        device = this_gpu(name, 5 * GIB)
        assert (device.name, device.memory) == (known, 5 * GIB)
    for name in (
        "Some Other",
        "NVIDIA T400",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ):
        assert this_gpu(name, GIB).speed is None


# ------------------------------------------------------------------------------------ what is said


def test_the_recipes_update_is_said_to_be_slow(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--gpu=h200", "--max-update=100000")
    assert "slow: optimizer takes" in out
    assert "update of 2,048 tokens a rank; --max-tokens 8192 makes it" in out
    assert "not measured" in out
    assert re.search(r"100000: 205,000,000 tokens in 7\.\d+ minutes", out)


def test_an_update_large_enough_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert "slow" not in printed(capsys, "--gpu=h200", "--max-tokens=65536")


@pytest.mark.parametrize(
    ("flags", "mend"),
    [
        (("--update-freq=8", "--gpu=h200"), "--max-tokens 16384 --update-freq 1 is the same update"),
        (("--gpu=h200", "--max-tokens=16384", shipped("zero1_fp32")), "zero1_bf16.json is"),
        (("--gpu=h200", "--gpus=16", "--max-tokens=8192"), "communication takes"),
        (("--gpu=h200", "--gpus=16", "--bandwidth=5"), "no larger update that fits mends it; a faster network"),
        (("--gpu=h200", "--global-batch-tokens=2048"), "--global-batch-tokens 8192 with --max-tokens 8192"),
        (("--gpu=h200", "--encoder-embed-dim=64", "--encoder-ffn-embed-dim=128", "--vocab-size=1000"), "launches"),
    ],
)  # fmt: skip
def test_slowness_names_its_flag(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], mend: str
) -> None:
    slow = [line for line in printed(capsys, *flags).splitlines() if line.startswith("slow: ")]
    assert any(mend in line for line in slow), slow


def test_scale_has_a_table_of_each_law(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--max-tokens=16384", "--global-batch-tokens=2097152", "--gpus=64", "--bandwidth=50")
    assert "GPUs  " not in printed(capsys, *flags)
    out = printed(capsys, *flags, "--scale")
    strong, weak = out.split("updates of 2,097,152 tokens")[1].split("32,768 tokens a GPU")
    for table in (strong, weak):
        rows = [line.split() for line in table.splitlines() if " GPUs " in line]
        assert [row[0] for row in rows] == ["8", "16", "32", "64", "128", "256", "512", "1024"]
        assert all(len(row) == 11 for row in rows)
    assert "nothing of it is hidden" in out
    # The row of as many GPUs as the plan is of has its figures.
    rate = re.search(r"([\d,]+) tokens/s, ", out)
    assert rate is not None
    assert all(f"64 GPUs {rate[1]}" in " ".join(table.split()) for table in (strong, weak))


def test_scale_says_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    """8 samples cannot be divided among 16 GPUs; and at stage 1 there is no room for the model."""
    out = printed(capsys, "--gpu=h200", "--scale")
    assert re.search(r"\n16 GPUs( +-){9}\n", out)
    flags = ("--gpu=l40s", "--gpus=64", "--max-tokens=512", shipped("zero3_bf16"))
    out = printed(capsys, *BIG, *flags, "--scale")
    assert re.search(r"\n8 GPUs +- +[\d,]+ +[\d,]+ +- ", out)


BIG = ("--encoder-layers=48", "--encoder-embed-dim=4096", "--encoder-ffn-embed-dim=16384")
TOO_BIG = ("--gpu=l40s", "--gpus=8", *BIG)


@pytest.mark.parametrize(
    ("flags", "mend"),
    [
        (("--gpu=rtx4090", "--max-tokens=262144"), "--max-tokens 65536 fits, with --update-freq 4"),
        (TOO_BIG, "zero2_bf16.json with --max-tokens"),
        (("--gpu=h100", *BIG), "4 GPUs with --deepspeed-config"),
        (("--gpu=t4", shipped("zero1_fp16"), *BIG), "lower --tokens-per-sample"),
        (("--gpu=t4",), "zero1_fp16.json"),
        (("--gpu=cpu", *BIG, "--encoder-layers=4800"), "; lower --tokens-per-sample"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_mends_it(flags: tuple[str, ...], mend: str) -> None:
    with pytest.raises(InputError) as error:
        plan.main([*RECIPE, *flags])
    assert mend in str(error.value)


@pytest.mark.parametrize("flags", [("--gpu=rtx4090", "--max-tokens=262144"), TOO_BIG])
def test_what_mends_it_does(flags: tuple[str, ...]) -> None:
    """The flags that the refusal names, given in addition."""
    with pytest.raises(InputError) as error:
        plan.main([*RECIPE, *flags])
    named = re.findall(r"(--[a-z-]+) ([^ ,]+)", str(error.value))
    assert named
    mended = job_of(*flags, *(f"{flag}={value}" for flag, value in named))
    assert fits(mended)
    assert mended.update_tokens == job_of(*flags).update_tokens or "--deepspeed-config" in dict(
        named
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "--vocab-size"),
        (("nowhere",), "no such folder"),
        (("--vocab-size=3",), r"must be in \[6, inf\)"),
        (("--vocab-size=95000", "--gpu=h1000"), "did you mean h100"),
        (("--vocab-size=95000", "--max-tokens=100"), "one sample must fit"),
        (
            ("--vocab-size=95000", "--scale", "--bandwidth=0"),
            r"--bandwidth 0.0: must be in \(0, inf\)",
        ),
        (("--vocab-size=95000", "--scale=64"), "--scale: takes no value"),
        (("--vocab-size=95000", "--gpus=8", "--global-batch-tokens=5000"), "cannot be divided"),
    ],
)
def test_bad_input(flags: tuple[str, ...], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        plan.main([*flags])


def test_a_vocabulary_stands_for_data_that_are_not_there_yet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As in a TOML that names where they will be."""
    assert plan.main(["nowhere", *RECIPE]) == 0
    given = capsys.readouterr().out
    assert plan.main([*RECIPE]) == 0
    assert capsys.readouterr().out == given


def test_data_give_vocabulary_languages_and_epochs(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(tiny_data), "--tokens-per-sample=32", "--max-tokens=128", "--max-epoch=2"]
    assert plan.main(flags) == 0
    out = capsys.readouterr().out
    assert f"{600 * 1024:,}" in out
    assert "An epoch is" in out
    assert "--max-epoch 2: " in out


def test_it_answers_without_torch() -> None:
    code = (
        "import sys; from xlm_ds import plan; plan.main(['--vocab-size=95000']); "
        "assert not {'torch', 'deepspeed'} & set(sys.modules), 'torch or deepspeed imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


# --------------------------------------------------------------------------------- train --dry-run


def dry_run(data: Path, save_dir: Path, *flags: str) -> int:
    return train.main([
        str(data), f"--save-dir={save_dir}", "--dry-run", "--tokens-per-sample=32", "--max-tokens=128",
        "--encoder-layers=2", "--encoder-embed-dim=32", "--encoder-ffn-embed-dim=64", "--encoder-attention-heads=4",
        *flags,
    ])  # fmt: skip


def test_dry_run_says_it_and_writes_nothing(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tiny_data.iterdir())
    assert dry_run(tiny_data, tmp_path / "run", "--max-update=10") == 0
    out = capsys.readouterr().out
    assert "GiB of a process, fp32" in out
    assert "--max-update 10: " in out
    assert sorted(tiny_data.iterdir()) == before
    assert not list(tmp_path.iterdir())


def test_dry_run_refuses_what_cannot_fit(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"needs .* GiB, and the cpu has .*; --max-tokens \d+ fits"
    ):
        dry_run(tiny_data, tmp_path / "run", "--max-tokens=100000000")


def test_dry_run_speaks_once_of_all_ranks(
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, said in (("0", "among 4 ranks"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert dry_run(tiny_data, tmp_path / "run") == 0
        out = capsys.readouterr().out
        assert (said in out) if said else not out


def test_a_plan_is_of_the_configuration_that_a_run_has_written(tmp_path: Path) -> None:
    """config.toml of a run's folder is a file for --config."""
    from xlm_ds.flags import to_toml

    config = parse(PlanConfig, [*RECIPE, "--max-tokens=16384"])
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    again = parse(PlanConfig, [f"--config={tmp_path / 'config.toml'}"])
    assert dataclasses.asdict(again) == dataclasses.asdict(config)
