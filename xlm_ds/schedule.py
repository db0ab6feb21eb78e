"""Learning rates as pure functions of the number of updates made.

The training loop asks for the rate before every update; validation losses move the plateau state and
nothing else. That state is all there is to save: three JSON values.

    check_schedule(config.optimization)
    plateau = PlateauState()                                  # resuming: PlateauState(**saved)
    lr = lr_at(update, config.optimization, plateau)          # before every update
    plateau = plateau_after(plateau, valid_loss, config.optimization, update=update)
    if lr_exhausted(update, config.optimization, plateau): ...  # the run has ended

`update` counts the updates already made, as fairseq's num_updates does: 0 before the first one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from xlm_ds.config import LearningConfig
from xlm_ds.log import InputError

# What is left of the way from --lr down to --min-lr, by the share of the decay's updates that are left.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
    # Hägele et al. 2024 (arXiv 2405.18392) found it consistently better than a line.
    "wsd": lambda left: 1 - math.sqrt(1 - left),
}
WAYS = {"linear": "in a line", "cosine": "in half a cosine", "wsd": "as 1 - sqrt(share done)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlateauState:
    """What reduce_lr_on_plateau remembers; `dataclasses.asdict` of it is JSON."""

    shrinks: int = 0  # the rate is lr * lr_shrink**shrinks
    bad_count: int = 0  # validations in a row without gain since the last gain or shrink
    best: float | None = None  # lowest validation loss so far


def check_schedule(config: LearningConfig) -> None:
    """Raises InputError if no learning rate can be computed from these numbers, or none above --stop-min-lr."""
    _check_decay(config)
    if lr_exhausted(0, config, PlateauState()):
        raise InputError(
            f"--stop-min-lr {config.stop_min_lr:g} ends the run before its first update, whose learning rate is "
            f"{lr_at(0, config, PlateauState()):g}"
        )


def _check_decay(config: LearningConfig) -> None:
    if config.lr_scheduler not in DECAYS:
        if config.min_lr:
            raise InputError(
                f"--min-lr {config.min_lr:g} is where the schedules {', '.join(DECAYS)} end, and not "
                f"{config.lr_scheduler}; fairseq's old --min-lr, at which a run ends, is --stop-min-lr"
            )
        return
    if config.min_lr > config.lr:
        raise InputError(
            f"--min-lr {config.min_lr:g}, where the learning rate ends, is more than --lr {config.lr:g}"
        )
    if config.lr_scheduler == "wsd" and config.decay_updates is None:
        raise InputError(
            "--lr-scheduler wsd needs --decay-updates: how many updates before --max-update the decay begins"
        )
    room = config.max_update - config.warmup_updates
    if room <= 0:
        raise InputError(
            f"--lr-scheduler {config.lr_scheduler} with --max-update {config.max_update} and --warmup-updates "
            f"{config.warmup_updates} has no updates to decay in; --max-update must be the larger"
        )
    if config.decay_updates is not None and config.decay_updates > room:
        raise InputError(
            f"--decay-updates {config.decay_updates} is more than the {room} updates between the "
            f"end of the warm-up and --max-update; give at most {room}"
        )


def describe_schedule(config: LearningConfig) -> str:
    """Returns one sentence that says what the learning rate will do."""
    parts = [f"learning rate {config.lr:g}"]
    if config.warmup_updates:
        parts.append(f"from {config.warmup_init_lr:g} over {config.warmup_updates} updates")
    match config.lr_scheduler:
        case "reduce_lr_on_plateau":
            times = f"times {config.lr_shrink:g} at every validation without progress"
            parts.append(times + (f" after {config.lr_patience}" if config.lr_patience else ""))
        case "inverse_sqrt":
            parts.append("then in proportion to 1/sqrt(update)")
        case name:
            parts.append(
                f"to {config.min_lr:g} over the last {_decay_updates(config)} updates {WAYS[name]}"
            )
    if config.stop_min_lr >= 0:
        parts.append(f"the run ends at {config.stop_min_lr:g}")
    return ", ".join(parts)


def lr_at(update: int, config: LearningConfig, plateau: PlateauState) -> float:
    """Returns the learning rate of the next update, `update` of them having been made."""
    if is_warming_up(update, config):
        return _warmup_lr(update, config)
    match config.lr_scheduler:
        case "reduce_lr_on_plateau":
            return config.lr * config.lr_shrink**plateau.shrinks
        case "inverse_sqrt":
            return _inverse_sqrt_lr(update, config)
        case name:
            left = max(config.max_update - update, 0)
            decay = _decay_updates(config)
            if left >= decay:
                return config.lr
            return config.min_lr + (config.lr - config.min_lr) * DECAYS[name](left / decay)


def plateau_after(
    state: PlateauState, valid_loss: float, config: LearningConfig, *, update: int
) -> PlateauState:
    """Returns the state after a validation; the same while warming up or with another scheduler.

    A loss is better if it is below the best by more than the relative threshold. The rate shrinks
    at the (lr_patience + 1)-th validation in a row that is not better. NaN is never better.
    """
    if config.lr_scheduler != "reduce_lr_on_plateau" or is_warming_up(update, config):
        return state
    bar = math.inf if state.best is None else state.best * (1 - config.lr_threshold)
    if valid_loss < bar:
        return PlateauState(shrinks=state.shrinks, bad_count=0, best=valid_loss)
    if state.bad_count < config.lr_patience:
        return PlateauState(shrinks=state.shrinks, bad_count=state.bad_count + 1, best=state.best)
    # Every shrink counts, however small. fairseq, through torch, skips those of less than 1e-8:
    # halving 1e-4 it is stuck at 1.2e-8 for ever, and --stop-min-lr 1e-9 is never reached.
    return PlateauState(shrinks=state.shrinks + 1, bad_count=0, best=state.best)


def without_best(state: PlateauState) -> PlateauState:
    """For validations that do not compare with those before: the rate stays, and the next is the first."""
    return PlateauState(shrinks=state.shrinks, bad_count=0, best=None)


def lr_exhausted(update: int, config: LearningConfig, plateau: PlateauState) -> bool:
    """Whether the rate has come down to stop_min_lr; a rate that is still warming up never has."""
    return not is_warming_up(update, config) and (
        lr_at(update, config, plateau) <= config.stop_min_lr
    )


def is_warming_up(update: int, config: LearningConfig) -> bool:
    """Whether no update has been made at the peak rate yet."""
    return config.warmup_updates > 0 and update <= config.warmup_updates


def _warmup_lr(update: int, config: LearningConfig) -> float:
    done = update / config.warmup_updates
    return config.warmup_init_lr + done * (config.lr - config.warmup_init_lr)


def _decay_updates(config: LearningConfig) -> int:
    """How many updates a schedule of DECAYS takes from --lr to --min-lr."""
    if config.decay_updates is not None:
        return config.decay_updates
    return config.max_update - config.warmup_updates


def _inverse_sqrt_lr(update: int, config: LearningConfig) -> float:
    """The peak at the end of the warm-up, from there on in proportion to 1/sqrt(update)."""
    peak_update = max(config.warmup_updates, 1)
    return config.lr * math.sqrt(peak_update / max(update, peak_update))
