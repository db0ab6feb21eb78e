"""DeepSpeed's JSON: which stage, precision and optimizer a run has. Knows the file, and neither DeepSpeed nor torch.

settings = resolve_deepspeed_config(read_deepspeed_config(path, "cuda"), optimization, rows=8, accumulation=1)
"""

import difflib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlm_ds.config import LearningConfig
from xlm_ds.log import InputError, logger

_INSTALLED_CONFIGS = Path(__file__).parent / "ds_configs"
CONFIG_DIRECTORY = (
    _INSTALLED_CONFIGS
    if _INSTALLED_CONFIGS.is_dir()
    else Path(__file__).parent.parent / "ds_configs"
)
# How gradients are sent, or scaled: what asks for it gets DeepSpeed's own path.
RANKS_SUMMED_IN_BF16 = 256  # of a simulated sum 2 to 5 % are lost there (docs/decisions/0011)
ONLY_DEEPSPEEDS = {
    "communication_data_type",
    "gradient_predivide_factor",
    "prescale_gradients",
    "torch_autocast",
}
# The keys of DeepSpeed 0.19.8's configuration that mean something to a run.
KEYS = ONLY_DEEPSPEEDS | {
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping",
    "optimizer", "scheduler", "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "bf16", "fp16", "data_types", "aio", "tensorboard", "wandb", "comet", "csv_monitor", "timers", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "flops_profiler", "comms_logger", "dump_state", "disable_python_gc",
}  # fmt: skip
WRITING_MONITORS = ("tensorboard", "csv_monitor")
MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def default_deepspeed_config(device: str) -> Path:
    """`device` is what torch calls its type: cpu or cuda."""
    return CONFIG_DIRECTORY / ("zero1_bf16.json" if device == "cuda" else "zero1_fp32.json")


def read_deepspeed_config(path: Path, device: str) -> dict[str, Any]:
    """A DeepSpeed JSON, whose stage is 1 where it says 0 or nothing.

    Raises InputError if it is not one, or needs what this device has not.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a DeepSpeed configuration is a JSON object")
    for key in content:
        if key not in KEYS:  # DeepSpeed would not say a word
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(KEYS))}"
            raise InputError(f"{path}: a run takes no {key} from a DeepSpeed configuration; {hint}")
    if "scheduler" in content:
        raise InputError(
            f"{path}: a scheduler block is not supported; --lr-scheduler owns the schedule"
        )
    for section in (
        "zero_optimization",
        "optimizer",
        "bf16",
        "fp16",
        "timers",
        "csv_monitor",
        *MONITOR_PACKAGES,
    ):
        if not isinstance(content.get(section, {}), dict):
            raise InputError(f"{path}: {section} must be a JSON object")
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)  # as DeepSpeed takes a JSON that does not say
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise InputError(
            f'{path}: expected "zero_optimization": {{"stage": 0, 1, 2 or 3}}, not {stage}'
        )
    if stage == 0:
        # Its first update in bf16 is 0.74 of what it should be (0.19.8, on a CPU, 2026-11-22).
        logger.info(
            f"{path}: ZeRO stage 0 runs as stage 1, which on one rank divides nothing: DeepSpeed's stage 0 begins "
            "Adam's bias correction one step late in bf16, and holds no state that checkpoints could be made of"
        )
        content["zero_optimization"] = {**zero, "stage": 1}
    if "data_types" in content:
        # With grad_accum_dtype DeepSpeed takes another optimizer, whose state has another form.
        raise InputError(
            f"{path}: data_types is not supported; at stage 1 micro-batches are added up in fp32 without it"
        )
    if content.get("fp16", {}).get("enabled") and device == "cpu":
        raise InputError(
            f"{path}: fp16 needs a GPU; on a CPU take zero1_fp32.json or zero1_bf16.json"
        )
    return content


def resolve_deepspeed_config(
    template: Mapping[str, Any],
    optimization: LearningConfig,
    *,
    rows: int,
    accumulation: int,
    where: str = "the DeepSpeed configuration",
) -> dict[str, Any]:
    """`template` with the run's own numbers filled in where it says "auto" or nothing.

    `rows`: samples per rank and micro-batch. Raises InputError if the template sets a number that a flag owns.
    """
    owned = {
        "train_micro_batch_size_per_gpu": (rows, "--max-tokens"),
        "gradient_accumulation_steps": (accumulation, "--update-freq"),
        "train_batch_size": (None, "--max-tokens and --update-freq"),
        "gradient_clipping": (optimization.clip_norm, "--clip-norm"),
    }
    adam = {
        "lr": (optimization.lr, "--lr"),
        "betas": (list(optimization.adam_betas), "--adam-betas"),
        "eps": (optimization.adam_eps, "--adam-eps"),
        "weight_decay": (optimization.weight_decay, "--weight-decay"),
    }
    optimizer = dict(
        template.get("optimizer", {"type": "AdamW", "params": {"torch_adam": True, "fused": True}})
    )
    optimizer["params"] = _filled(optimizer.get("params", {}), adam, where, "optimizer.params.")
    settings = {**_filled(template, owned, where, ""), "optimizer": optimizer}
    if precision_of(settings) == "bf16":
        settings["bf16"] = _with_grad_check(settings, where)
    return settings


def _with_grad_check(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The bf16 block, which says whether DeepSpeed itself looks for gradients that are not finite.

    That reads every gradient once more. Fused Adam skips by the norm, which is there already, and stage 3 does as well
    (0.19.8); anything else would step with NaN.
    """
    block = {**settings["bf16"], "check_grad_overflow": looks_for_nan(settings)}
    if needs_look_for_nan(settings) and not block["check_grad_overflow"]:
        raise InputError(
            f'{where}: "check_grad_overflow": false makes NaN weights of a NaN gradient where Adam is not torch\'s '
            'fused one; leave it out, or add "torch_adam": true and "fused": true to the optimizer\'s params'
        )
    return block


def _filled(
    template: Mapping[str, Any],
    owned: Mapping[str, tuple[Any, str]],
    where: str,
    prefix: str,
) -> dict[str, Any]:
    result = dict(template)
    for key, (value, flag) in owned.items():
        found = result.pop(key, "auto")
        if found != "auto":
            raise InputError(
                f'{where}: {prefix}{key} = {found} is owned by {flag}; write "auto" there and use the flag'
            )
        if value is not None:
            result[key] = value
    return result


def precision_of(settings: Mapping[str, Any]) -> str:
    """What is computed with: bf16, fp16 or fp32."""
    enabled = (name for name in ("bf16", "fp16") if settings.get(name, {}).get("enabled"))
    return next(enabled, "fp32")


def check_monitors(settings: Mapping[str, Any]) -> None:
    """Raises InputError if a monitor is enabled whose package is not installed."""
    for block, package in MONITOR_PACKAGES.items():
        if settings.get(block, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise InputError(
                f'the DeepSpeed configuration enables "{block}", but {package} is not installed; pip install '
                f'{package}, or write "enabled": false there'
            )


def with_monitor_folder(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`settings` whose monitors that write files do it in `folder`, unless they say where."""
    changed = {
        name: {"output_path": str(folder), "job_name": name, **settings[name]}
        for name in WRITING_MONITORS
        if name in settings
    }
    return {**settings, **changed}


def has_fused_adam(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer is torch's fused Adam, which can skip an update without the host's knowledge."""
    params = settings["optimizer"]["params"]
    on_device = "offload_optimizer" not in settings["zero_optimization"]
    return bool(params.get("torch_adam") and params.get("fused") and on_device)


def needs_look_for_nan(settings: Mapping[str, Any]) -> bool:
    """Whether an update is skipped only if DeepSpeed itself has looked through all gradients for one not finite."""
    return settings["zero_optimization"]["stage"] < 3 and not has_fused_adam(settings)


def looks_for_nan(settings: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed looks through all gradients, if `settings` compute with half precision."""
    if precision_of(settings) == "fp16":
        return True
    asked: bool = settings["bf16"].get("check_grad_overflow", needs_look_for_nan(settings))
    return asked


def sums_in_fp32(accumulation: int, ranks: int) -> bool:
    """Whether engine.FlatGradients keeps and sends gradients as fp32, or else as what is computed with."""
    return accumulation > 1 or ranks == 1 or ranks > RANKS_SUMMED_IN_BF16


def suits_flat_gradients(settings: Mapping[str, Any]) -> bool:
    """Whether engine.FlatGradients can take the place of ZeRO's buckets."""
    zero = settings["zero_optimization"]
    return (
        zero["stage"] == 1
        # fp16 has a loss scale, and updates that are skipped
        and precision_of(settings) != "fp16"
        and has_fused_adam(settings)
        and not settings.keys() & ONLY_DEEPSPEEDS
    )
