"""One owner per number, and DeepSpeed's step equal to plain AdamW at every stage."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed import comm

from xlm_ds.architectures import shape_from_config
from xlm_ds.batches import MaskedBatch
from xlm_ds.config import ModelConfig, OptimizationConfig
from xlm_ds.deepspeed_config import (
    CONFIG_DIRECTORY,
    read_deepspeed_config,
    resolve_deepspeed_config,
)
from xlm_ds.engine import Engine, Ranks, collectives_timed, start_ranks, takes_flat_gradients
from xlm_ds.log import Fault, InputError
from xlm_ds.model import XlmEncoder, build_model

SHIPPED = sorted(CONFIG_DIRECTORY.glob("*.json"))
OPTIMIZATION = OptimizationConfig(lr=1e-2, adam_betas=(0.9, 0.98), weight_decay=0.01, clip_norm=0.5)
VOCABULARY, TOKENS, ROWS = 101, 16, 4


def small_model(arch: str = "xlm_base") -> XlmEncoder:
    config = ModelConfig(
        arch=arch,
        encoder_layers=2,
        encoder_embed_dim=32,
        encoder_ffn_embed_dim=64,
        encoder_attention_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
    )
    shape = shape_from_config(config, vocab_size=VOCABULARY, languages=3, tokens_per_sample=TOKENS)
    return build_model(shape, seed=1)


def random_batch(seed: int) -> MaskedBatch:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=generator)
    input_ids[:, 0] = 2
    positions = [
        torch.randperm(TOKENS - 1, generator=generator)[:3].sort().values + 1 + row * TOKENS
        for row in range(ROWS)
    ]
    return MaskedBatch(
        input_ids=input_ids,
        languages=torch.randint(0, 3, (ROWS,), generator=generator),
        masked_positions=torch.cat(positions),
        targets=torch.randint(5, VOCABULARY, (3 * ROWS,), generator=generator),
        has_padding=False,
    )


def settings_of(
    name: str, stage: int, accumulation: int = 1, device: str = "cpu", *, fused: bool = True
) -> dict[str, object]:
    template = read_deepspeed_config(CONFIG_DIRECTORY / f"{name}.json", device)
    template["optimizer"]["params"]["fused"] = fused
    template["zero_optimization"]["stage"] = stage
    return resolve_deepspeed_config(template, OPTIMIZATION, rows=ROWS, accumulation=accumulation)


def engine_losses(engine: Engine, updates: range) -> list[float]:
    losses = []
    for seed in updates:
        loss = engine(random_batch(seed)).sum() / (3 * ROWS)
        engine.backward(loss)
        engine.step(OPTIMIZATION.lr)
        losses.append(loss.item())
    return losses


def by_kind(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    """A copy of its state as load_state takes it."""
    state = {name: {k: v.clone() for k, v in kinds.items()} for name, kinds in engine.state()}
    kinds = next(iter(state.values()))
    return {kind: {name: state[name][kind] for name in state} for kind in kinds}


def plain_adamw(
    updates: int, arch: str = "xlm_base"
) -> tuple[XlmEncoder, list[float], list[float]]:
    """(the model after them, losses, norms of the gradients before they are clipped)."""
    model = small_model(arch)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZATION.lr,
        betas=OPTIMIZATION.adam_betas,
        weight_decay=OPTIMIZATION.weight_decay,
    )
    losses, norms = [], []
    for seed in range(updates):
        loss = model(random_batch(seed)).sum() / (3 * ROWS)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZATION.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(float(norm))
    return model, losses, norms


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("arch", ["xlm_base", "xlm", "xlm_100"])
def test_five_updates_equal_plain_adamw(arch: str, stage: int, ranks: Ranks) -> None:
    """DeepSpeed has trained silently wrong more than once (its issues 8224, 7839, 7985)."""
    model, expected, _ = plain_adamw(5, arch)
    engine = Engine(small_model(arch), settings_of("zero1_fp32", stage), ranks)
    assert engine_losses(engine, range(5)) == pytest.approx(expected, abs=1e-5)
    weights = {name: state["weight"] for name, state in engine.state()}
    for name, parameter in model.named_parameters():
        difference = (weights[name] - parameter.detach()).abs()
        if name.endswith("qkv_proj.bias"):
            # The gradient of the keys' is rounding noise (test_model.py), which Adam makes steps of.
            difference[32:64] = 0
        assert difference.max() < 1e-5, name


@pytest.mark.parametrize(
    ("name", "stage"), [("zero1_bf16", 1), ("zero2_bf16", 2), ("zero3_bf16", 3)]
)
def test_bf16_follows_fp32(name: str, stage: int, ranks: Ranks) -> None:
    _, expected, _ = plain_adamw(5)
    engine = Engine(small_model(), settings_of(name, stage), ranks)
    assert engine_losses(engine, range(5)) == pytest.approx(expected, abs=0.01)


def assert_parity(names: list[str], *, ranks: int, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    here = Path(__file__).parent
    # Also where another checkout is installed.
    environment = environment | {"PYTHONPATH": str(here.parent)}
    done = subprocess.run(
        [*command, "parity_of_ranks.py", *names],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line.split()[0] for line in done.stdout.splitlines()]
    assert [word for word in said if not word.startswith("[")] == names  # DeepSpeed's begin so


def test_updates_of_two_ranks_are_plain_adamws() -> None:
    names = ["zero1_fp32", "zero1_bf16", "zero2_bf16", "zero3_bf16"]
    assert_parity(names, ranks=2, environment=dict(os.environ))


@pytest.mark.gpu
def test_updates_on_a_gpu_are_plain_adamws_on_a_cpu() -> None:
    """The only place where fp16 trains: DeepSpeed refuses it on a CPU without its instructions."""
    names = ["zero1_fp32", "zero1_fp16", "zero1_bf16", "zero2_bf16", "zero3_bf16"]
    environment = {name: os.environ[name] for name in os.environ.keys() - {"DS_ACCELERATOR"}}
    assert_parity(names, ranks=1, environment=environment)


# What compiles an operator of DeepSpeed's at its first start (a minute or two) is run by the slow suite.
COMPILED = {"zero1_bf16_fused_adam", "zero2_bf16_offload"}
ON_CPU = [
    pytest.param(path.stem, marks=pytest.mark.slow if path.stem in COMPILED else ())
    for path in SHIPPED
    if "fp16" not in path.stem
]


def norm_tolerance(name: str) -> float:
    return 1e-4 if "fp32" in name else 0.02


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("name", ON_CPU)
def test_an_update_of_each_configuration_is_plain_adamws(
    name: str, calls: int, ranks: Ranks
) -> None:
    """Also with the encoder called twice before one backward pass, where ZeRO 2 has lost gradients (issue 8224)."""
    template = read_deepspeed_config(CONFIG_DIRECTORY / f"{name}.json", "cpu")
    settings = resolve_deepspeed_config(template, OPTIMIZATION, rows=ROWS, accumulation=1)
    model = small_model()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    engine = Engine(small_model(), settings, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01)
    for update in range(2):
        batches = [random_batch(2 * update + call) for call in range(calls)]
        for step in (engine, model):
            loss = torch.stack([step(batch).sum() for batch in batches]).sum() / (3 * ROWS * calls)
            (engine.backward if step is engine else torch.autograd.backward)(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZATION.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        engine.step(OPTIMIZATION.lr)
        # Neither Adam nor clipping would tell a gradient that is twice as large.
        assert engine.gradient_norm() == pytest.approx(float(norm), rel=norm_tolerance(name))
    engine.check()
    moved = torch.cat([(e["weight"] - before[key]).flatten() for key, e in engine.state()])
    expected = torch.cat([(p.detach() - before[k]).flatten() for k, p in model.named_parameters()])
    # A weight moves by about lr an update whatever its gradient's size, so in bf16 some of the smallest gradients point
    # elsewhere. An update that is missing, scaled by 0.74 or made of half the batch is far off.
    difference = float((moved - expected).norm() / expected.norm())
    assert difference < (1e-4 if "fp32" in name else 0.1)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulated_micro_batches_equal_one_batch(stage: int, ranks: Ranks) -> None:
    """Two micro-batches scaled by accumulation / targets give the gradient of both at once."""
    halves = [random_batch(seed) for seed in (1, 2)]
    engine = Engine(small_model(), settings_of("zero1_fp32", stage, accumulation=2), ranks)
    for batch in halves:
        engine.backward(engine(batch).sum() * (2 / (6 * ROWS)))
        engine.step(OPTIMIZATION.lr)
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01)
    (sum(model(batch).sum() for batch in halves) / (6 * ROWS)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZATION.clip_norm)
    optimizer.step()
    weights = {name: state["weight"] for name, state in engine.state()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [*ON_CPU, "zero2_fp32", "zero1_bf16_not_fused"])
def test_an_update_whose_gradient_is_not_finite_is_left_out(
    name: str, bad: float, ranks: Ranks
) -> None:
    """And counted; what comes after it is as if it had never been."""
    stage = int(name[4])
    file = {"zero2_fp32": "zero1_fp32", "zero1_bf16_not_fused": "zero1_bf16"}.get(name, name)
    settings = settings_of(file, stage, fused=not name.endswith("not_fused"))
    engines = [Engine(small_model(), settings, ranks) for _ in range(2)]
    for update in range(6):
        for engine, poisoned in zip(engines, (True, False), strict=True):
            if update in (0, 2, 3):
                if not poisoned:
                    continue
                before = (
                    {name: state["weight"].clone() for name, state in engine.state()}
                    if update
                    else {}
                )
                engine.backward(engine(random_batch(update))[1:].sum() * bad)
                engine.step(OPTIMIZATION.lr)
                after = dict(engine.state()) if update else {}
                assert all(torch.equal(after[n]["weight"], before[n]) for n in before)
            else:
                engine_losses(engine, range(update, update + 1))
        assert engines[0].gradient_norm() == engines[1].gradient_norm()
    for engine in engines:
        engine.check()
    assert [engine.skipped_updates() for engine in engines] == [3, 0]
    assert engines[0].skipped_in_a_row() == (2, 2)
    for (name, left), (_, right) in zip(*(engine.state() for engine in engines), strict=True):
        assert all(torch.equal(left[kind], right[kind]) for kind in left), name


@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_bf16", "zero3_bf16"])
def test_masters_begin_with_the_weights_given(name: str, ranks: Ranks) -> None:
    """Not with what is left of them in bf16."""
    engine = Engine(small_model(), settings_of(name, int(name[4])), ranks)
    engine.backward(engine(random_batch(1)).sum())
    engine.step(0.0)  # before it there are no moments
    given = dict(small_model().named_parameters())
    for key, state in engine.state():
        assert torch.equal(state["weight"], given[key])


@pytest.mark.parametrize("saved", ["zero1_bf16", "zero3_bf16", "zero1_fp32"])
def test_state_continues_bit_equal_where_nothing_changes(saved: str, ranks: Ranks) -> None:
    stage = int(saved[4])
    engine = Engine(small_model(), settings_of(saved, stage), ranks)
    engine_losses(engine, range(3))
    state = by_kind(engine)
    model = small_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state["weight"][name])
    resumed = Engine(model, settings_of(saved, stage), ranks)
    resumed.load_state(state, update=3, samples=3 * ROWS, warm_up_batch=random_batch(99))
    assert engine_losses(resumed, range(3, 6)) == engine_losses(engine, range(3, 6))


def lose_an_update(engine: Engine) -> None:
    engine._engine.optimizer.optimizer.step = lambda: None


def make_an_update_twice(engine: Engine) -> None:
    adam = engine._engine.optimizer.optimizer
    once = type(adam).step
    adam.step = lambda: [once(adam) for _ in range(2)]


def forget_the_copies(engine: Engine) -> None:
    after_update = engine._invariants.after_update

    def forgetting(lr: float, skipped: torch.Tensor) -> None:
        engine._invariants._copies[0].zero_()
        after_update(lr, skipped)

    engine._invariants.after_update = forgetting  # type: ignore[method-assign]


def keep_a_gradient(engine: Engine) -> None:
    def zero_grad(**_: object) -> None:
        parameter = next(engine._engine.module.parameters())
        parameter.grad = torch.zeros_like(parameter)

    engine._engine.optimizer.zero_grad = zero_grad


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (lose_an_update, "1 of 1 updates have not moved the weights"),
        (make_an_update_twice, r"there were 1 updates, but the optimizer has counted \[2\]"),
        (
            forget_the_copies,
            "after 1 of 1 updates the weights to compute with were not the masters'",
        ),
        (keep_a_gradient, "the gradients of 1 parameters are still there"),
    ],
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_broken_invariant_is_a_sentence(
    stage: int, fault: Callable[[Engine], None], sentence: str, ranks: Ranks
) -> None:
    engine = Engine(small_model(), settings_of("zero1_bf16", stage), ranks)
    fault(engine)
    with pytest.raises(Fault, match=rf"^[^\n]*{sentence}[^\n]*$"):  # noqa: PT012
        engine_losses(engine, range(1))
        engine.check()


@pytest.mark.parametrize("lr", [0.0, 1e-14])
def test_a_learning_rate_too_small_to_move_the_weights_is_no_fault(lr: float, ranks: Ranks) -> None:
    engine = Engine(small_model(), settings_of("zero1_bf16", 1), ranks)
    engine.backward(engine(random_batch(1)).sum())
    engine.step(lr)
    engine.check()


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_validation_has_as_many_shapes_as_it_likes(
    monkeypatch: pytest.MonkeyPatch, ranks: Ranks
) -> None:
    """torch compiles a layer for eight, and with fullgraph the ninth is an error."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)  # ZeRO 3 leaves its own
    compile_layers = XlmEncoder.compile_layers
    monkeypatch.setattr(XlmEncoder, "compile_layers", lambda self: compile_layers(self, "eager"))
    engine = Engine(small_model(), settings_of("zero1_fp32", 1), ranks, compiles=True)
    engine.train()
    engine_losses(engine, range(1))
    engine.train(False)
    whole = random_batch(0)
    for tokens in range(2, 13):
        positions = torch.arange(1, ROWS) * tokens
        batch = whole._replace(
            input_ids=whole.input_ids[:, :tokens],
            masked_positions=positions,
            targets=torch.full_like(positions, 7),
        )
        with torch.no_grad():
            assert engine(batch).isfinite().all()


def test_flat_gradients_are_deepspeeds_own(monkeypatch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    """In fp32 to the last digits of a sum that is made in another order; a version that is not known falls back."""
    flat = Engine(small_model(), settings_of("zero1_fp32", 1, accumulation=2), ranks)
    monkeypatch.setattr(deepspeed, "__version__", "0.0.0")
    stock = Engine(small_model(), settings_of("zero1_fp32", 1, accumulation=2), ranks)
    assert flat._flat is not None
    assert stock._flat is None
    losses = [engine_losses(engine, range(8)) for engine in (flat, stock)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert flat.gradient_norm() == pytest.approx(stock.gradient_norm(), rel=1e-4)


@pytest.mark.parametrize("key", ["communication_data_type", "prescale_gradients"])
def test_how_gradients_are_sent_is_deepspeeds(key: str) -> None:
    settings = settings_of("zero1_bf16", 1)
    assert takes_flat_gradients(settings)
    assert not takes_flat_gradients({**settings, key: "fp32"})


def test_a_parameter_without_a_gradient_gets_0(ranks: Ranks) -> None:
    """Not the gradient of the update before."""
    engine = Engine(small_model(), settings_of("zero1_fp32", 1), ranks)
    engine_losses(engine, range(1))
    assert engine._flat is not None
    bias = engine._engine.module.head.output_bias
    engine.backward(bias.sum())
    engine._flat.hand_over()
    for parameter, gradient in engine._flat._views.items():
        assert gradient.any() == (parameter is bias)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configurations_leave_the_flags_their_numbers(path: Path) -> None:
    template = json.loads(path.read_text(encoding="utf-8"))
    resolved = resolve_deepspeed_config(template, OPTIMIZATION, rows=8, accumulation=2)
    assert "auto" not in json.dumps(resolved)
    assert resolved["train_micro_batch_size_per_gpu"] == 8
    assert resolved["optimizer"]["params"]["lr"] == OPTIMIZATION.lr
    assert resolved["zero_optimization"]["stage"] >= 1, "stage 0 in bf16 loses its first update"
    assert resolved["timers"]["throughput"]["enabled"] is False


def test_a_key_deepspeed_does_not_know_is_one_sentence(ranks: Ranks) -> None:
    settings = settings_of("zero1_fp32", 1)
    settings["zero_optimization"] = {"stage": 1, "no_such_key": 1}
    with pytest.raises(InputError, match=r"^[^\n]*no_such_key[^\n]*$"):
        Engine(small_model(), settings, ranks)


@pytest.mark.parametrize(("block", "package"), [("wandb", "wandb"), ("comet", "comet_ml")])
def test_a_monitor_without_its_package_is_one_sentence(
    ranks: Ranks, block: str, package: str
) -> None:
    settings = {**settings_of("zero1_fp32", 1), block: {"enabled": True}}
    with pytest.raises(InputError, match=f'^[^\n]*"{block}"[^\n]*pip install {package}[^\n]*$'):
        Engine(small_model(), settings, ranks)


@pytest.mark.usefixtures("ranks")
def test_collectives_are_told_apart() -> None:
    entered = ["optimizer"]

    def enter(part: str) -> str:
        entered.append(part)
        return entered[-2]

    plain = torch.distributed.all_reduce
    with collectives_timed(enter):
        torch.distributed.all_reduce(torch.ones(1))
        comm.all_gather_into_tensor(torch.ones(1), torch.ones(1))
    assert entered == ["optimizer", *["communication", "optimizer"] * 2]
    assert torch.distributed.all_reduce is plain


def test_tasks_without_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun -n 2 python -m xlm_ds.train would be two runs writing into one folder."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(InputError, match="started as 2 tasks"):
        start_ranks()


def test_something_is_shipped() -> None:
    assert len(SHIPPED) >= 5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, "--lr"),
        ({"gradient_clipping": 1.0}, "--clip-norm"),
        ({"train_batch_size": 64}, "--max-tokens"),
        ({"gradient_accumulation_steps": 4}, "--update-freq"),
        (
            {
                "bf16": {"enabled": True, "check_grad_overflow": False},
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            },
            "makes NaN weights",
        ),
    ],
)
def test_a_number_owned_by_a_flag_is_refused(change: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        resolve_deepspeed_config(change, OPTIMIZATION, rows=8, accumulation=1, where="my.json")
    assert "my.json" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"scheduler": {"type": "WarmupLR"}}', "--lr-scheduler"),
        ('{"zero_optimization": {"stage": 1}, "fp16": {"enabled": true}}', "needs a GPU"),
        ('{"zero_optimization": {"stage": 1}, "data_types": {}}', "data_types is not supported"),
        (
            '{"zero_optimizaton": {"stage": 1}}',
            "no zero_optimizaton .*did you mean zero_optimization",
        ),
        ("{", "not a JSON file"),
        ("[]", "is a JSON object"),
        ('{"zero_optimization": {"stage": 4}}', '"stage": 0, 1, 2 or 3}, not 4'),
        ('{"zero_optimization": {"stage": "auto"}}', '"stage": 0, 1, 2 or 3}, not auto'),
        ('{"zero_optimization": {"stage": true}}', '"stage": 0, 1, 2 or 3}, not True'),
        ('{"zero_optimization": {"stage": 1}, "fp16": true}', "fp16 must be a JSON object"),
    ],
)
def test_an_unusable_json_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "ds.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=expected):
        read_deepspeed_config(tmp_path / "ds.json", "cpu")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"zero_optimization": {}}',
        '{"zero_optimization": {"stage": 0, "reduce_bucket_size": 7}, "bf16": {"enabled": true}}',
    ],
)
def test_stage_0_runs_as_stage_1(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing else of the JSON is another; and one line says so."""
    path = tmp_path / "ds.json"
    path.write_text(content, encoding="utf-8")
    with caplog.at_level("INFO", logger="xlm_ds"):
        found = read_deepspeed_config(path, "cpu")
    written = json.loads(content)
    assert found == {
        **written,
        "zero_optimization": {**written.get("zero_optimization", {}), "stage": 1},
    }
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(
        f"{path}: ZeRO stage 0 runs as stage 1, which on one rank divides nothing"
    )


def test_a_json_without_zero_trains(tmp_path: Path, ranks: Ranks) -> None:
    """In bf16, where DeepSpeed's stage 0 would make another first update."""
    (tmp_path / "ds.json").write_text('{"bf16": {"enabled": true}}', encoding="utf-8")
    template = read_deepspeed_config(tmp_path / "ds.json", "cpu")
    settings = resolve_deepspeed_config(template, OPTIMIZATION, rows=ROWS, accumulation=1)
    _, expected, _ = plain_adamw(5)
    engine = Engine(small_model(), settings, ranks)
    assert engine_losses(engine, range(5)) == pytest.approx(expected, abs=0.01)
    engine.check()
