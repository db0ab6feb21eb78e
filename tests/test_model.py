"""The encoder: equal to fairseq's and XLM's outputs and to a slow twin, and lawful where none can see."""

import dataclasses
import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from reference import AdamMoments, fairseq_adam, xlm_logits
from xlm_ds.architectures import ModelShape, parameter_count, shape_from_config
from xlm_ds.batches import MaskedBatch
from xlm_ds.config import ModelConfig
from xlm_ds.dictionary import PAD
from xlm_ds.log import InputError
from xlm_ds.model import XlmEncoder, build_model, init_output_bias, unigram_log_probabilities

GOLDEN = sorted((Path(__file__).parent / "data" / "model").glob("*.npz"))
XLM_GOLDEN = sorted((Path(__file__).parent / "data" / "xlm").glob("*.npz"))
EOS = 2
LENGTH = 12  # of the small batches' rows
MASKED = 3  # positions of each
SMALL = ModelShape(
    vocab_size=50,
    max_positions=LENGTH,
    num_segment=3,
    layers=2,
    embed_dim=16,
    ffn_embed_dim=24,
    attention_heads=4,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    activation_fn="gelu",
    token_positions=True,
    normalize_embeddings=False,
)
VARIANTS = {
    "base": SMALL,
    "relu": dataclasses.replace(SMALL, activation_fn="relu"),
    "no_positions": dataclasses.replace(SMALL, token_positions=False),
    "normalized": dataclasses.replace(SMALL, normalize_embeddings=True),
    "one_of_each": dataclasses.replace(SMALL, attention_heads=1, layers=1, num_segment=1),
    "no_languages": dataclasses.replace(SMALL, num_segment=0),
    "xlm": dataclasses.replace(
        SMALL,
        first_position_row=0,
        normalize_embeddings=True,
        layer_norm_eps=1e-12,
        head_transform=False,
        initialisation="xlm",
    ),
}
XLM = VARIANTS["xlm"]


@pytest.fixture(params=VARIANTS)
def shape(request: pytest.FixtureRequest) -> ModelShape:
    return VARIANTS[request.param]


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, as a share of the largest absolute value of theirs."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def perturbed_model(shape: ModelShape = SMALL) -> XlmEncoder:
    """A model so far from its initial values that every parameter matters."""
    model = build_model(shape, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def random_batch(shape: ModelShape = SMALL, *, lengths: tuple[int, ...] = (12, 12)) -> MaskedBatch:
    """Rows of eos and random words; the first positions are masked. Shorter rows are padded."""
    generator = torch.Generator().manual_seed(3)
    size = (len(lengths), LENGTH)
    ids = torch.randint(5, shape.vocab_size, size, generator=generator)
    ids[:, 0] = EOS
    targets = torch.randint(5, shape.vocab_size, size, generator=generator)
    column = torch.arange(LENGTH)
    is_padding = column >= torch.tensor(lengths)[:, None]
    positions = LENGTH * torch.arange(len(lengths))[:, None] + column
    return MaskedBatch(
        input_ids=ids.masked_fill(is_padding, PAD),
        languages=torch.arange(len(lengths)) % max(shape.num_segment, 1),
        masked_positions=positions[:, :MASKED].flatten(),
        targets=targets.masked_fill(is_padding, PAD)[:, :MASKED].flatten(),
        has_padding=min(lengths) < LENGTH,
    )


# ------------------------------------------------------------------------------ fairseq's outputs


class Golden:
    """One of fairseq's reduced xlm_base models, under our names."""

    def __init__(self, path: Path) -> None:
        self.arrays = dict(np.load(path))
        args = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.shape = ModelShape(
            vocab_size=args["vocab_size"],
            max_positions=args["tokens_per_sample"],
            num_segment=args["num_segment"],
            layers=args["encoder_layers"],
            embed_dim=args["encoder_embed_dim"],
            ffn_embed_dim=args["encoder_ffn_embed_dim"],
            attention_heads=args["encoder_attention_heads"],
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            activation_fn=args["activation_fn"],
            token_positions=not args["no_token_positional_embeddings"],
            normalize_embeddings=args["encoder_normalize_before"],
        )
        self.model = XlmEncoder(self.shape)
        self.model.load_state_dict(self.named("param"))
        ids = torch.from_numpy(self.arrays["src_tokens"])
        self.batch = MaskedBatch(  # every position is scored; what is no target is PAD
            input_ids=ids,
            languages=torch.from_numpy(self.arrays["segment_labels"][:, 0].copy()),
            masked_positions=torch.arange(ids.numel()),
            targets=torch.from_numpy(self.arrays["lm_target"]).flatten(),
            has_padding=bool((ids == PAD).any()),
        )

    def named(self, kind: str) -> dict[str, Tensor]:
        """Parameters ("param"), gradients ("grad") or the five updates' result ("after5")."""
        prefix = f"{kind}.encoder."
        theirs = {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}
        return {our_name(k): torch.from_numpy(v) for k, v in fuse_attention(theirs).items()}

    def mean_loss(self) -> Tensor:
        losses: Tensor = self.model(self.batch)
        return losses.sum() / int(self.arrays["ntokens_masked"])


OUR_PARTS = {  # in this order: later entries see what earlier ones have made
    "sentence_encoder.": "",
    "embed_tokens": "token_embedding",
    "segment_embeddings": "language_embedding",
    "embed_positions": "position_embedding",
    "emb_layer_norm": "embedding_norm",
    "self_attn_layer_norm": "attention_norm",
    "final_layer_norm": "ffn_norm",
    "layer_norm": "head.norm",
    "self_attn.q_proj": "attention.qkv_proj",
    "self_attn": "attention",
    "fc": "ffn.fc",
    "lm_head_transform_weight": "head.transform",
    "lm_output_learned_bias": "head.output_bias",
}


def our_name(name: str) -> str:
    for theirs, ours in OUR_PARTS.items():
        name = name.replace(theirs, ours)
    return name


def fuse_attention(theirs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Puts queries, keys and values into one array under the queries' name."""
    fused = {k: v for k, v in theirs.items() if "k_proj" not in k and "v_proj" not in k}
    for name in fused:
        if "q_proj" in name:
            parts = [theirs[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            fused[name] = np.concatenate(parts)
    return fused


def test_there_are_golden_models() -> None:
    """Guards the tests below against passing because they found nothing."""
    assert "base_pad" in [path.stem for path in GOLDEN]


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_loss_and_logits_are_fairseqs(golden: Golden) -> None:
    assert golden.mean_loss().item() == pytest.approx(float(golden.arrays["loss"]), abs=1e-5)
    theirs = torch.from_numpy(golden.arrays["logits"]).flatten(0, 1)
    assert relative_difference(golden.model.logits(golden.batch), theirs) < 1e-5


def test_gradients_are_fairseqs(golden: Golden) -> None:
    torch.autograd.backward(golden.mean_loss())
    theirs = golden.named("grad")
    for name, parameter in golden.model.named_parameters():
        assert parameter.grad is not None, name
        assert relative_difference(parameter.grad, theirs[name]) < 1e-5, name


# An element whose gradient is little more than rounding noise moves by some share of lr: 0.03 lr was
# the worst after five updates of fairseq's six models. torch's form of Adam is 0.7 lr away.
UPDATE_TOLERANCE_LRS = 0.05


def test_five_updates_are_fairseqs(golden: Golden) -> None:
    parameters = dict(golden.model.named_parameters())
    moments = {k: AdamMoments(*np.zeros((2, *p.shape), np.float32)) for k, p in parameters.items()}
    lr = float(golden.arrays["adam_lr"])
    losses = []
    for step in range(1, 6):
        golden.model.zero_grad()
        loss = golden.mean_loss()
        torch.autograd.backward(loss)
        losses.append(loss.item())
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            before, gradient = parameter.detach().numpy(), parameter.grad.numpy()
            after, moments[name] = fairseq_adam(before, gradient, moments[name], step=step, lr=lr)
            parameter.data = torch.from_numpy(after)
    assert losses == pytest.approx(golden.arrays["adam_losses"].tolist(), abs=1e-5)
    assert largest_miss_after_five_updates(golden) < UPDATE_TOLERANCE_LRS * lr


def test_torchs_form_of_adam_is_told_apart(golden: Golden) -> None:
    """Guards the test above against a tolerance that would accept any Adam."""
    lr = float(golden.arrays["adam_lr"])
    optimizer = torch.optim.Adam(golden.model.parameters(), lr=lr, eps=1e-8)
    for _ in range(5):
        optimizer.zero_grad()
        torch.autograd.backward(golden.mean_loss())
        optimizer.step()
    assert largest_miss_after_five_updates(golden) > 5 * UPDATE_TOLERANCE_LRS * lr


def largest_miss_after_five_updates(golden: Golden) -> float:
    """Largest absolute difference over all parameters but the keys' bias."""
    theirs = golden.named("after5")
    misses = []
    for name, parameter in golden.model.named_parameters():
        miss = (parameter.detach() - theirs[name]).abs()
        if name.endswith("qkv_proj.bias"):
            queries, _, values = miss.chunk(3)
            miss = torch.cat([queries, values])
        misses.append(float(miss.max()))
    return max(misses)


def test_gradient_of_the_keys_bias_is_rounding_noise(golden: Golden) -> None:
    """Why the updates leave it out: Adam turns noise of any size into steps of about lr."""
    torch.autograd.backward(golden.mean_loss())
    ours = {name: p.grad for name, p in golden.model.named_parameters() if p.grad is not None}
    for gradients in (ours, golden.named("grad")):
        for name in (k for k in gradients if k.endswith("qkv_proj.bias")):
            queries, keys, values = gradients[name].abs().chunk(3)
            assert keys.max() < 1e-6 * torch.maximum(queries, values).max(), name


# ---------------------------------------------------------------------------------- XLM's outputs


class XlmGolden:
    """One of XLM's own small models, under our names and with our id of padding."""

    def __init__(self, path: Path) -> None:
        self.arrays = dict(np.load(path))
        theirs = {
            k.removeprefix("param."): v for k, v in self.arrays.items() if k.startswith("param.")
        }
        named = xlm_names(theirs)
        vocab_size, dim = named["token_embedding.weight"].shape
        inner_dim = len(named["layers.0.ffn.fc1.bias"])
        self.shape = dataclasses.replace(
            XLM,
            vocab_size=vocab_size,
            max_positions=len(named["position_embedding.weight"]),
            num_segment=len(named.get("language_embedding.weight", ())),
            layers=sum("attention_norm.weight" in name for name in named),
            embed_dim=dim,
            ffn_embed_dim=inner_dim,
            activation_fn="relu" if "relu" in path.stem else "gelu",
        )
        self.model = XlmEncoder(self.shape).eval()
        self.model.load_state_dict({k: torch.from_numpy(v) for k, v in named.items()})
        self.ids = self.in_ours(self.arrays["x"].T)
        chosen = torch.from_numpy(self.arrays["pred_mask"])  # (T, B), as everything of theirs
        steps, rows = chosen.nonzero(as_tuple=True)
        self.batch = MaskedBatch(
            input_ids=self.ids,
            languages=torch.from_numpy(self.arrays["langs"][0].copy()),
            masked_positions=rows * self.ids.shape[1] + steps,
            targets=self.in_ours(self.arrays["y"]),
            has_padding=True,
        )

    @staticmethod
    def in_ours(theirs: NDArray[np.int64]) -> Tensor:
        """Ids: eos and padding are 1 and 2 there, 2 and 1 here; for the model, no other id means anything."""
        return torch.from_numpy(np.choose(np.minimum(theirs, 3), [theirs, 2, 1, theirs]))


XLM_PARTS = (
    (r"^position_embeddings", "position_embedding"),
    (r"^lang_embeddings", "language_embedding"),
    (r"^embeddings", "token_embedding"),
    (r"^layer_norm_emb", "embedding_norm"),
    (r"^attentions\.(\d+)\.out_lin", r"layers.\1.attention.out_proj"),
    (r"^attentions\.(\d+)\.q_lin", r"layers.\1.attention.qkv_proj"),
    (r"^layer_norm1\.(\d+)", r"layers.\1.attention_norm"),
    (r"^ffns\.(\d+)\.lin", r"layers.\1.ffn.fc"),
    (r"^layer_norm2\.(\d+)", r"layers.\1.ffn_norm"),
    (r"^pred_layer\.proj\.bias", "head.output_bias"),
)


def xlm_names(theirs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """XLM's parameters under our names, rows of the ids 1 and 2 exchanged."""
    ours = {}
    for name, value in theirs.items():
        if ".k_lin." in name or ".v_lin." in name:
            continue
        if ".q_lin." in name:
            value = np.concatenate([theirs[name.replace(".q_lin.", f".{p}_lin.")] for p in "qkv"])
        for pattern, part in XLM_PARTS:
            name = re.sub(pattern, part, name)
        ours[name] = value
    for name in ("token_embedding.weight", "head.output_bias"):
        ours[name] = ours[name][[0, 2, 1, *range(3, len(ours[name]))]]
    return ours


def test_there_are_golden_models_of_xlm() -> None:
    """Guards the test below against passing because it found nothing."""
    assert {"langs5", "one_relu"} <= {path.stem for path in XLM_GOLDEN}


@pytest.mark.parametrize("path", XLM_GOLDEN, ids=lambda path: path.stem)
def test_states_scores_and_loss_are_xlms(path: Path) -> None:
    golden = XlmGolden(path)
    states = golden.model.encode(golden.ids, golden.batch.languages).detach()
    theirs = torch.from_numpy(golden.arrays["hidden"]).transpose(0, 1)
    assert (states - theirs).abs().max() < 1e-5, "of padding, too"
    everywhere = golden.batch._replace(masked_positions=torch.arange(golden.ids.numel()))
    scores = golden.model.logits(everywhere).detach().view(*golden.ids.shape, -1)
    is_real = golden.ids.ne(PAD)  # of padding there are scores, which nobody asks for
    in_theirs = scores[..., [0, 2, 1, *range(3, golden.shape.vocab_size)]]
    difference = in_theirs - torch.from_numpy(golden.arrays["scores"]).transpose(0, 1)
    assert difference[is_real].abs().max() < 1e-5
    loss = golden.model(golden.batch).mean().item()
    assert loss == pytest.approx(float(golden.arrays["loss"]), abs=1e-5)


# --------------------------------------------------------------------------------- the slow twin


def test_model_equals_its_slow_twin(shape: ModelShape) -> None:
    """All variants, with padding: every score and every gradient, masked rows against dense."""
    model, batch = perturbed_model(shape), random_batch(shape, lengths=(12, 7, 2))
    params = {k: p.detach().double().requires_grad_() for k, p in model.named_parameters()}
    dense = xlm_logits(
        params,
        heads=shape.attention_heads,
        relu=shape.activation_fn == "relu",
        input_ids=batch.input_ids,
        languages=batch.languages,
        first_position_row=shape.first_position_row,
        eps=shape.layer_norm_eps,
    )
    scores = dense.flatten(0, 1)[batch.masked_positions]
    assert relative_difference(model.logits(batch), scores) < 1e-5

    is_target = batch.targets != PAD
    assert 0 < is_target.sum() < len(is_target)
    rows = torch.arange(len(is_target))
    losses = -scores.log_softmax(-1)[rows, batch.targets] * is_target
    torch.testing.assert_close(model(batch).double(), losses, rtol=1e-5, atol=1e-5)

    torch.autograd.backward(losses.sum())
    torch.autograd.backward(model(batch).sum())
    for name, parameter in model.named_parameters():
        twin = params[name].grad
        assert parameter.grad is not None, name
        assert twin is not None, name
        assert relative_difference(parameter.grad, twin) < 1e-5, name


# -------------------------------------------------------------------------------------------- laws


def test_a_constant_on_all_keys_changes_nothing() -> None:
    """The keys' bias adds the same to all scores of a query, which softmax takes away again."""
    model, batch = perturbed_model(), random_batch()
    before = model(batch)
    with torch.no_grad():
        model.get_parameter("layers.0.attention.qkv_proj.bias")[16:32] += 3.0
    torch.testing.assert_close(model(batch), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [SMALL, XLM], ids=["base", "xlm"])
def test_padding_changes_no_loss(shape: ModelShape) -> None:
    """Neither columns of padding nor other rows being padded, not even a row of nothing else."""
    model, batch = perturbed_model(shape), random_batch(shape, lengths=(12, 7, 7, 0))
    losses = model(batch).view(4, MASKED)
    assert losses[3].tolist() == [0.0] * MASKED
    for row, length in enumerate((12, 7, 7)):
        alone = MaskedBatch(
            input_ids=batch.input_ids[row : row + 1, :length],
            languages=batch.languages[row : row + 1],
            masked_positions=torch.arange(MASKED),
            targets=batch.targets.view(4, MASKED)[row],
            has_padding=False,
        )
        torch.testing.assert_close(model(alone), losses[row], rtol=1e-5, atol=1e-5)


def test_states_of_padding_are_zero(shape: ModelShape) -> None:
    """So that a mean over a row is a sum divided by its length."""
    batch = random_batch(shape, lengths=(12, 7, 2))
    states = perturbed_model(shape).encode(batch.input_ids, batch.languages)
    is_padding = batch.input_ids.eq(PAD)
    assert not states[is_padding].any()
    assert states[~is_padding].any(dim=-1).all()


@pytest.mark.parametrize("shape", [SMALL, XLM], ids=["base", "xlm"])
def test_gradients_are_finite_with_a_row_of_padding_only(shape: ModelShape) -> None:
    """Prevents the NaN of a softmax over no keys from spreading, through 0 * NaN, to all weights."""
    for dtype in (torch.float32, torch.bfloat16):
        model = perturbed_model(shape).to(dtype)
        torch.autograd.backward(model(random_batch(lengths=(12, 0))).sum())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_ignored_rows_have_no_loss_and_no_gradient() -> None:
    model, batch = perturbed_model(), random_batch()
    nothing = batch._replace(targets=torch.full_like(batch.targets, PAD))
    losses = model(nothing)
    assert losses.tolist() == [0.0] * len(batch.targets)
    torch.autograd.backward(losses.sum())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_unmasked_attention_is_the_same_where_nothing_is_padded() -> None:
    model, batch = perturbed_model(), random_batch()
    with_mask = model(batch._replace(has_padding=True))
    torch.testing.assert_close(model(batch), with_mask, rtol=1e-5, atol=1e-5)


def test_language_matters() -> None:
    model, batch = perturbed_model(), random_batch()
    other = batch._replace(languages=(batch.languages + 1) % SMALL.num_segment)
    assert (model(batch) - model(other)).abs().min() > 1e-3


def test_without_dropout_training_equals_evaluation() -> None:
    model, batch = perturbed_model(), random_batch(lengths=(12, 7))
    assert torch.equal(model.train()(batch), model.eval()(batch))


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_is_used_in_training_only(name: str) -> None:
    plain, batch = perturbed_model(), random_batch(lengths=(12, 7))
    changed: dict[str, Any] = {name: 0.5}
    model = XlmEncoder(dataclasses.replace(SMALL, **changed))
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.eval()(batch), plain(batch))
    torch.manual_seed(1)
    first = model.train()(batch)
    assert not torch.equal(first, plain(batch))
    torch.manual_seed(1)
    assert torch.equal(model(batch), first)


def test_forward_never_looks_at_contents_on_the_host() -> None:
    """On the meta device tensors have none: an `.item()` or `if tensor:` would raise here."""
    with torch.device("meta"):
        model = XlmEncoder(SMALL)
    batch = random_batch(lengths=(12, 7))
    losses = model(
        batch._replace(
            input_ids=batch.input_ids.to("meta"),
            languages=batch.languages.to("meta"),
            masked_positions=batch.masked_positions.to("meta"),
            targets=batch.targets.to("meta"),
        )
    )
    torch.autograd.backward(losses.sum())
    assert losses.shape == batch.targets.shape


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # by dynamo
def test_layers_are_compiled_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each of training and evaluation, with and without padding: a graph a layer would take six times as long."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    # ZeRO 3 of an earlier test leaves its own there, which dynamo warns of.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    torch._dynamo.reset()
    shape = dataclasses.replace(SMALL, layers=4, dropout=0.1, attention_dropout=0.1)
    plain, compiled = (build_model(shape, seed=1) for _ in range(2))
    compiled.compile_layers(backend)
    batches = [random_batch(shape), random_batch(shape, lengths=(12, 7))]
    for training in (True, False):
        for model in (plain, compiled):
            model.train(training)
        for batch in batches * 2:
            losses = []
            for model in (plain, compiled):
                torch.manual_seed(0)
                losses.append(model(batch))
            torch.testing.assert_close(*losses)
    assert len(graphs) == 4


def test_bf16_parameters_give_fp32_losses_near_the_fp32_ones() -> None:
    model, batch = perturbed_model(), random_batch(lengths=(12, 7))
    expected = model(batch)
    model.bfloat16()
    assert model.encode(batch.input_ids, batch.languages).dtype == torch.bfloat16
    assert model.logits(batch).dtype == torch.float32
    losses = model(batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0.05, atol=0.05)


# -------------------------------------------------------------------------- names, sizes, start


def test_parameter_names_are_those_on_disk() -> None:
    """Checkpoints store these names; to change one needs a page in docs/decisions."""
    expected = [
        "token_embedding.weight",
        "language_embedding.weight",
        "position_embedding.weight",
        "embedding_norm.weight",
        "embedding_norm.bias",
        "layers.0.attention.qkv_proj.weight",
        "layers.0.attention.qkv_proj.bias",
        "layers.0.attention.out_proj.weight",
        "layers.0.attention.out_proj.bias",
        "layers.0.attention_norm.weight",
        "layers.0.attention_norm.bias",
        "layers.0.ffn.fc1.weight",
        "layers.0.ffn.fc1.bias",
        "layers.0.ffn.fc2.weight",
        "layers.0.ffn.fc2.bias",
        "layers.0.ffn_norm.weight",
        "layers.0.ffn_norm.bias",
        "head.output_bias",
        "head.transform.weight",
        "head.transform.bias",
        "head.norm.weight",
        "head.norm.bias",
    ]
    model = XlmEncoder(dataclasses.replace(SMALL, layers=1, normalize_embeddings=True))
    assert list(model.state_dict()) == expected
    assert [name for name, _ in model.named_parameters()] == expected


def test_state_survives_a_round_trip(shape: ModelShape) -> None:
    model, batch = perturbed_model(shape), random_batch(shape)
    other = build_model(shape, seed=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch), model(batch))


def test_parameter_count_is_that_of_the_built_model(shape: ModelShape) -> None:
    assert parameter_count(shape) == sum(p.numel() for p in XlmEncoder(shape).parameters())


def test_parameter_count_of_xlm_base() -> None:
    """fairseq's has 175,328,029, of which 1,049,600 are the pooler that is never used."""
    shape = shape_from_config(ModelConfig(), vocab_size=95_005, languages=5, tokens_per_sample=256)
    with torch.device("meta"):
        model = XlmEncoder(shape)
    built = sum(p.numel() for p in model.parameters())
    assert built == parameter_count(shape) == 175_328_029 - 1_049_600 == 174_278_429


@pytest.mark.parametrize(
    ("arch", "vocab_size", "languages", "count"),
    [
        ("xlm", 95_000, 5, 173_483_800),
        ("xlm_xnli15", 95_000, 15, 249_071_384),
        ("xlm_100", 200_000, 100, 571_696_960),
    ],
)
def test_parameter_counts_of_xlms_models(
    arch: str, vocab_size: int, languages: int, count: int
) -> None:
    """V d + 512 d + n d + 2 d + L (12 d^2 + 13 d) + V."""
    shape = shape_from_config(
        ModelConfig(arch=arch), vocab_size=vocab_size, languages=languages, tokens_per_sample=256
    )
    with torch.device("meta"):
        model = XlmEncoder(shape)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(shape) == count


def test_start_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_model(SMALL, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = build_model(SMALL, seed=4).state_dict(), build_model(SMALL, seed=5).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


def test_start_is_berts() -> None:
    """Every parameter is written, none twice with different rules, the padding rows are zero."""
    wide = dataclasses.replace(SMALL, embed_dim=64, ffn_embed_dim=128, normalize_embeddings=True)
    for name, value in build_model(wide, seed=0).state_dict().items():
        if name.endswith("norm.weight"):
            assert value.eq(1).all(), name
        elif name.endswith("bias"):
            assert not value.any(), name
        else:
            samples = value.numel()
            assert value.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(samples)), name
            assert abs(value.mean().item()) < 4 * 0.02 / math.sqrt(samples), name
    for name in ("token_embedding", "position_embedding"):
        assert not build_model(wide, seed=0).get_parameter(f"{name}.weight")[PAD].any()


def test_start_of_xlm_is_xlms() -> None:
    """Tables of width d are N(0, 1/sqrt(d)); matrices and biases uniform within 1/sqrt(inputs), as torch's Linear."""
    wide = dataclasses.replace(XLM, embed_dim=64, ffn_embed_dim=128)
    model = build_model(wide, seed=0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            bound = module.in_features**-0.5
            both = torch.cat([module.weight.flatten(), module.bias])
            assert both.abs().max() <= bound, name
            assert both.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
            assert module.bias.std().item() == pytest.approx(bound / 3**0.5, rel=0.3), name
        elif isinstance(module, torch.nn.Embedding):
            samples = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(64**-0.5, rel=4 / samples**0.5), name
        elif isinstance(module, torch.nn.LayerNorm):
            assert module.weight.eq(1).all(), name
            assert not module.bias.any(), name
    assert not model.token_embedding.weight[PAD].any()
    assert not model.head.output_bias.any()
    assert model.get_parameter("position_embedding.weight")[PAD].any(), (
        "it is the second position's"
    )


def test_unigram_mixture_equals_exact_fractions() -> None:
    counts = np.array([[0, 0, 3, 5], [0, 2**40, 0, 1]], dtype=np.uint64)
    log_p = unigram_log_probabilities(counts, language_probabilities=np.array([0.25, 0.75]))
    assert log_p.dtype == np.float32
    for word in range(4):
        shares = [Fraction(int(c[word]) + 1, int(c.sum()) + 4) for c in counts]
        exact = Fraction(1, 4) * shares[0] + Fraction(3, 4) * shares[1]
        assert float(log_p[word]) == pytest.approx(math.log(exact), rel=1e-6)


def test_output_bias_alone_predicts_the_unigram_mixture() -> None:
    model, batch = build_model(SMALL, seed=0), random_batch()
    counts = np.arange(SMALL.vocab_size, dtype=np.uint64)[None, :]
    log_p = unigram_log_probabilities(counts, language_probabilities=np.ones(1))
    init_output_bias(model, log_p)
    with torch.no_grad():
        model.token_embedding.weight.zero_()
    expected = -torch.from_numpy(log_p)[batch.targets]
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------- configuration


def configured(languages: int = 5, tokens_per_sample: int = 256, **flags: Any) -> ModelShape:
    return shape_from_config(
        ModelConfig(**flags),
        vocab_size=95_005,
        languages=languages,
        tokens_per_sample=tokens_per_sample,
    )


def test_what_no_flag_says_is_xlm_base() -> None:
    assert configured() == ModelShape(
        vocab_size=95_005,
        max_positions=256,
        num_segment=5,
        layers=6,
        embed_dim=1024,
        ffn_embed_dim=4096,
        attention_heads=8,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.0,
        activation_fn="gelu",
        token_positions=True,
        normalize_embeddings=False,
    )


def test_what_no_flag_says_is_xlms() -> None:
    assert configured(arch="xlm") == dataclasses.replace(
        configured(),
        max_positions=512,
        first_position_row=0,
        normalize_embeddings=True,
        layer_norm_eps=1e-12,
        head_transform=False,
        initialisation="xlm",
    )
    assert configured(arch="xlm_xnli15") == dataclasses.replace(configured(arch="xlm"), layers=12)
    many = configured(arch="xlm_100", languages=100)
    assert (many.layers, many.embed_dim, many.attention_heads) == (16, 1280, 16)
    assert (many.ffn_embed_dim, many.num_segment) == (5120, 0)


def test_languages_have_a_table_unless_told_otherwise() -> None:
    assert configured(num_segment=0).num_segment == 0
    assert configured(arch="xlm", num_segment=0).num_segment == 0
    assert configured(arch="xlm_100", num_segment=7).num_segment == 7


def test_flags_win_over_the_architecture() -> None:
    shape = configured(
        encoder_layers=2,
        encoder_embed_dim=64,
        encoder_ffn_embed_dim=96,
        encoder_attention_heads=4,
        activation_fn="relu",
        activation_dropout=0.2,
        num_segment=7,
        max_positions=512,
        no_token_positional_embeddings=True,
        encoder_normalize_before=True,
    )
    assert (shape.layers, shape.embed_dim, shape.ffn_embed_dim) == (2, 64, 96)
    assert (shape.attention_heads, shape.activation_fn) == (4, "relu")
    assert (shape.num_segment, shape.max_positions) == (7, 512)
    assert (shape.token_positions, shape.normalize_embeddings) == (False, True)
    assert shape.activation_dropout == 0.2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"encoder_attention_heads": 7}, "1024 is not a multiple of --encoder-attention-heads 7"),
        ({"num_segment": 4}, "--num-segment 4 is smaller than the number of languages, 5"),
        ({"arch": "xlm", "tokens_per_sample": 513}, "513 is beyond the position table of 512"),
        ({"max_positions": 128}, "--tokens-per-sample 256 is beyond the position table of 128"),
        ({"attention_dropout": 1.0}, "--attention-dropout 1.0 is not a share"),
    ],
)
def test_impossible_shapes_are_refused(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        configured(**flags)
