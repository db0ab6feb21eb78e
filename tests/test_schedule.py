"""Learning rates: fairseq's where it is right, and the places where ours differ on purpose."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlm_ds.config import OptimizationConfig
from xlm_ds.log import InputError
from xlm_ds.schedule import (
    DECAYS,
    PlateauState,
    check_schedule,
    describe_schedule,
    lr_at,
    lr_exhausted,
    plateau_after,
)

FRESH = PlateauState()
SCHEDULERS = ("reduce_lr_on_plateau", "inverse_sqrt", *DECAYS)


def optimization(**changes: Any) -> OptimizationConfig:
    return OptimizationConfig(**{"lr": 1e-4, "lr_shrink": 0.5, **changes})


def plateau_lrs(losses: list[float], config: OptimizationConfig) -> list[float]:
    """The rate after each of the validation losses."""
    state, lrs = FRESH, []
    for update, loss in enumerate(losses, start=1):
        state = plateau_after(state, loss, config, update=update)
        lrs.append(lr_at(update, config, state))
    return lrs


def torch_lrs(losses: list[float], config: OptimizationConfig, *, eps: float) -> list[float]:
    """The same from torch's scheduler, which is what fairseq's is made of."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=config.lr_shrink,
        patience=config.lr_patience,
        threshold=config.lr_threshold,
        eps=eps,
    )
    lrs = []
    for loss in losses:
        scheduler.step(loss)
        lrs.append(optimizer.param_groups[0]["lr"])
    return lrs


@settings(deadline=None)  # the first call loads torch's optimizers
@given(
    losses=st.lists(st.floats(0.5, 20) | st.sampled_from([3.0, 2.9999, 2.9997, math.nan])),
    patience=st.integers(0, 3),
)
def test_plateau_is_torchs_with_eps_zero(losses: list[float], patience: int) -> None:
    config = optimization(lr_patience=patience)
    assert plateau_lrs(losses, config) == torch_lrs(losses, config, eps=0)


def test_stop_min_lr_is_reached_where_fairseq_is_stuck_after_13_halvings() -> None:
    config = optimization(stop_min_lr=1e-9)
    losses = [5.0] * 40
    assert torch_lrs(losses, config, eps=1e-8)[-1] == 1e-4 / 2**13 == 1.220703125e-08
    lrs = plateau_lrs(losses, config)
    assert lrs[17] == 1e-4 / 2**17 <= 1e-9 < lrs[16]
    assert lr_exhausted(18, config, PlateauState(shrinks=17))
    assert not lr_exhausted(18, config, PlateauState(shrinks=16))


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_rate_shrinks_at_the_validation_after_the_forgiven_ones(patience: int) -> None:
    """Prevents the off-by-one that makes patience 0 forgive one validation."""
    config = optimization(lr_patience=patience)
    lrs = plateau_lrs([5.0] * (patience + 2), config)
    assert lrs == [1e-4] * (patience + 1) + [5e-5]


def test_gain_below_the_threshold_is_none_and_gain_above_it_restarts_the_count() -> None:
    config = optimization(lr_patience=1)
    state = plateau_after(FRESH, 4.0, config, update=1)
    assert plateau_after(state, 4.0 * (1 - 0.9e-4), config, update=2).bad_count == 1
    better = plateau_after(PlateauState(bad_count=1, best=4.0), 3.9, config, update=2)
    assert better == PlateauState(best=3.9)


def test_nan_is_never_the_best_loss() -> None:
    """A best loss of NaN would make every later loss a bad one."""
    assert plateau_after(FRESH, math.nan, optimization(), update=1).best is None


def test_plateau_waits_for_the_warm_up_to_end() -> None:
    config = optimization(warmup_updates=10)
    assert plateau_after(FRESH, 5.0, config, update=10) is FRESH
    assert plateau_after(FRESH, 5.0, config, update=11).best == 5.0


def test_other_schedulers_ignore_validation_losses() -> None:
    assert plateau_after(FRESH, 5.0, optimization(lr_scheduler="inverse_sqrt"), update=9) is FRESH


@given(
    state=st.builds(
        PlateauState,
        shrinks=st.integers(0, 99),
        bad_count=st.integers(0, 9),
        best=st.none() | st.floats(0, 99),
    )
)
def test_plateau_state_survives_json(state: PlateauState) -> None:
    assert PlateauState(**json.loads(json.dumps(dataclasses.asdict(state)))) == state


def test_resuming_continues_the_bad_count() -> None:
    """fairseq forgets the count in its checkpoints, so that a resumed run shrinks later."""
    config = optimization(lr_patience=3)
    losses = [5.0] * 9
    uninterrupted, resumed = FRESH, FRESH
    for update, loss in enumerate(losses, start=1):
        uninterrupted = plateau_after(uninterrupted, loss, config, update=update)
        saved = json.dumps(dataclasses.asdict(resumed))
        resumed = plateau_after(PlateauState(**json.loads(saved)), loss, config, update=update)
    assert resumed == uninterrupted
    assert uninterrupted.shrinks == 2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_warm_up_is_a_line_from_its_first_rate_to_the_peak(scheduler: str) -> None:
    config = optimization(
        lr_scheduler=scheduler,
        warmup_updates=4,
        warmup_init_lr=2e-5,
        max_update=100,
        decay_updates=50,
    )
    lrs = [lr_at(update, config, FRESH) for update in range(5)]
    assert lrs == pytest.approx([2e-5, 4e-5, 6e-5, 8e-5, 1e-4])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_zero_rate_of_the_warm_up_does_not_end_the_run(scheduler: str) -> None:
    config = optimization(
        lr_scheduler=scheduler, warmup_updates=4, max_update=100, decay_updates=50, stop_min_lr=1e-9
    )
    assert lr_at(0, config, FRESH) == 0
    assert not any(lr_exhausted(update, config, FRESH) for update in range(50))


def test_without_warm_up_the_first_update_has_the_full_rate() -> None:
    for scheduler in SCHEDULERS:
        config = optimization(lr_scheduler=scheduler, max_update=100, decay_updates=50)
        assert lr_at(0, config, FRESH) == 1e-4


def test_inverse_sqrt_is_fairseqs() -> None:
    config = optimization(lr_scheduler="inverse_sqrt", warmup_updates=4000)
    for update in (4000, 4001, 16_000, 1_000_000):
        fairseq_lr = 1e-4 * 4000**0.5 * update**-0.5
        assert lr_at(update, config, FRESH) == pytest.approx(fairseq_lr, rel=1e-12)
    assert lr_at(16_000, config, FRESH) == pytest.approx(5e-5)


def test_linear_is_constant_and_then_falls_to_zero() -> None:
    config = optimization(
        lr_scheduler="linear", warmup_updates=10, max_update=100, decay_updates=40
    )
    assert [lr_at(update, config, FRESH) for update in (10, 59, 60)] == [1e-4] * 3
    falling = [lr_at(update, config, FRESH) for update in (70, 80, 99, 100, 101)]
    assert falling == pytest.approx([7.5e-5, 5e-5, 2.5e-6, 0, 0])


def test_linear_decays_right_after_the_warm_up_unless_told_otherwise() -> None:
    config = optimization(lr_scheduler="linear", warmup_updates=20, max_update=100)
    assert [lr_at(update, config, FRESH) for update in (20, 60, 100)] == [1e-4, 5e-5, 0]
    never = dataclasses.replace(config, decay_updates=0)
    assert lr_at(100, never, FRESH) == 1e-4


@given(
    peak=st.floats(1e-6, 1),
    share=st.floats(0, 1),
    warmup=st.integers(0, 50),
    decay=st.integers(1, 100),
    stable=st.integers(0, 50),
    data=st.data(),
)
def test_decays_are_their_closed_forms(
    peak: float, share: float, warmup: int, decay: int, stable: int, data: st.DataObject
) -> None:
    """Flat after the warm-up, then a line, half a cosine or 1 - sqrt down to --min-lr, which is kept."""
    end = share * peak
    numbers = {"lr": peak, "min_lr": end, "warmup_updates": warmup, "decay_updates": decay}
    total = warmup + stable + decay
    update = data.draw(st.integers(0, decay)) + warmup + stable
    done = (update - warmup - stable) / decay
    expected = {
        "linear": peak - (peak - end) * done,
        "cosine": end + (peak - end) / 2 * (1 + math.cos(math.pi * done)),
        "wsd": peak - (peak - end) * math.sqrt(done),
    }
    for scheduler, lr in expected.items():
        config = optimization(lr_scheduler=scheduler, max_update=total, **numbers)
        check_schedule(config)
        assert lr_at(update, config, FRESH) == pytest.approx(lr, rel=1e-9, abs=1e-15)
        assert warmup or lr_at(stable, config, FRESH) == peak, (
            "to the last bit, as in the rest of it"
        )
        assert {lr_at(total + more, config, FRESH) for more in (0, 1, 99)} == {end}
        if stable > 1:
            assert lr_at(warmup + 1, config, FRESH) == peak


def test_cosine_is_torchs() -> None:
    config = optimization(lr_scheduler="cosine", max_update=40, min_lr=1e-6)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=1e-6)
    for update in range(41):
        (lr,) = theirs.get_last_lr()
        assert lr_at(update, config, FRESH) == pytest.approx(lr, rel=1e-9)
        optimizer.step()
        theirs.step()


def test_cosine_decays_right_after_the_warm_up_unless_told_otherwise() -> None:
    config = optimization(lr_scheduler="cosine", warmup_updates=20, max_update=100)
    found = [lr_at(update, config, FRESH) for update in (20, 40, 60, 80, 100)]
    assert found == pytest.approx([1e-4, 0.853553e-4, 5e-5, 0.146447e-4, 0], abs=1e-10)
    late = dataclasses.replace(config, decay_updates=40)
    assert [lr_at(update, late, FRESH) for update in (20, 60, 80)] == pytest.approx(
        [1e-4, 1e-4, 5e-5]
    )


def test_a_run_ends_where_its_decay_comes_below_stop_min_lr() -> None:
    config = optimization(lr_scheduler="cosine", max_update=100, min_lr=1e-6, stop_min_lr=1e-6)
    assert lr_exhausted(100, config, FRESH)
    assert not lr_exhausted(99, config, FRESH)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lr_scheduler": "cosine"}, "--lr-scheduler cosine with --max-update 0"),
        ({"lr_scheduler": "wsd", "max_update": 50}, "wsd needs --decay-updates"),
        ({"lr_scheduler": "wsd", "max_update": 5, "decay_updates": 6}, "give at most 5"),
        ({"lr_scheduler": "cosine", "max_update": 5, "min_lr": 1.0}, "is more than --lr 0.0001"),
        ({"min_lr": 1e-9}, "--min-lr 1e-09 .* is --stop-min-lr"),
        ({"lr_scheduler": "inverse_sqrt", "min_lr": 1e-9}, "not inverse_sqrt"),
    ],
)
def test_decays_that_cannot_be_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_schedule(optimization(**changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_update": 0}, "--max-update 0"),
        ({"max_update": 50, "warmup_updates": 50}, "no updates to decay in"),
        ({"max_update": 50, "warmup_updates": 20, "decay_updates": 31}, "more than the 30 updates"),
    ],
)
def test_linear_without_room_to_decay_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_schedule(optimization(lr_scheduler="linear", **changes))


def test_recipes_schedule_is_accepted() -> None:
    check_schedule(optimization(max_update=2_400_000, stop_min_lr=1e-9))
    check_schedule(optimization(lr_scheduler="linear", max_update=50, decay_updates=50))


def test_the_schedule_is_described_in_one_sentence() -> None:
    recipe = optimization(lr_scheduler="reduce_lr_on_plateau", stop_min_lr=1e-9)
    assert describe_schedule(recipe) == (
        "learning rate 0.0001, times 0.5 at every validation without progress, the run ends at 1e-09"
    )
    linear = optimization(lr_scheduler="linear", warmup_updates=60, decay_updates=160)
    assert "from 0 over 60 updates, to 0 over the last 160 updates" in describe_schedule(linear)
    cosine = optimization(lr_scheduler="cosine", warmup_updates=60, max_update=200, min_lr=1e-6)
    assert describe_schedule(cosine) == (
        "learning rate 0.0001, from 0 over 60 updates, to 1e-06 over the last 140 updates in half a cosine"
    )
    wsd = optimization(lr_scheduler="wsd", max_update=200, decay_updates=40)
    assert describe_schedule(wsd) == (
        "learning rate 0.0001, to 0 over the last 40 updates as 1 - sqrt(share done)"
    )
