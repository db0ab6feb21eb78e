"""Step functions: what is written is what is read, the last start that has come decides."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlm_ds.steps import Steps


@st.composite
def step_functions(draw: st.DrawFn) -> Steps:
    lengths = draw(st.lists(st.integers(1, 10**6), max_size=5))
    starts = tuple(itertools.accumulate(lengths, initial=0))
    values = draw(st.tuples(*[st.floats(0, 1)] * len(starts)))
    return Steps(values, starts, draw(st.booleans()) if lengths else False)


@given(step_functions())
def test_text_and_value_are_inverse(steps: Steps) -> None:
    assert Steps.parse(str(steps)) == steps


@given(step_functions(), st.integers(1, 1000), st.lists(st.integers(0, 10**9), max_size=20))
def test_the_last_start_that_has_come_decides(steps: Steps, batch: int, samples: list[int]) -> None:
    resolved = steps.in_samples(batch)
    size = 1 if steps.counts_samples else batch
    assert resolved.in_samples(7) == resolved, "a second time changes nothing"
    for sample in [*samples, *(start * size for start in steps.starts)]:
        value = steps.values[0]
        for later, start in zip(steps.values, steps.starts, strict=True):
            if start * size <= sample:
                value = later
        assert resolved.at(sample) == value


def test_it_reads_as_documented() -> None:
    assert Steps.parse("0.7") == Steps((0.7,)) == Steps.parse("0.7@0")
    steps = Steps.parse("0.7@0, 0.5@100000")
    assert steps == Steps((0.7, 0.5), (0, 100_000))
    assert str(steps.in_samples(512)) == "0.7@0,0.5@51200000samples"
    assert Steps.parse("0.7@0samples,0.5@8samples") == Steps((0.7, 0.5), (0, 8), True)


def test_updates_are_no_sample_numbers() -> None:
    with pytest.raises(RuntimeError, match="counts updates; call in_samples first"):
        Steps.parse("0.7@0,0.5@100").at(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.7@1", "must start at update 0"),
        ("0.7@5,0.5@9", "must start at update 0"),
        ("0.7@0,0.5@9,0.3@9", "must ascend"),
        ("0.7@0,0.5@9,0.3@8", "must ascend"),
        ("0.7@0,0.5@0", "must ascend"),
        ("x@0", "'x' is not a number"),
        ("0.7@0,@5", "'' is not a number"),
        ("0.7@0,0.5@1.5", "@1.5 is not where a value can start; give a whole number"),
        ("0.7@0,0.5@1e5", "@1e5 is not where"),
        ("0.7@0,0.5@-5", "@-5 is not where"),
        ("0.7@0,0.5@", "@ is not where"),
        ("0.7@0,0.5@5@6", "@5@6 is not where"),
        ("0.7@0,0.5", "'0.5' does not say from where on"),
        ("0.7,0.5", "'0.7' does not say from where on"),
        ("0.7@0,0.5@5,0.3@60samples", "counts updates and samples"),
        (f"0.7@0,0.5@{2**62}", "sample numbers end at 2^62"),
        ("", "'' is not a number"),
    ],
)
def test_what_is_no_step_function_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        Steps.parse(text)
    assert message in str(caught.value)


def test_samples_beyond_the_end_are_refused() -> None:
    with pytest.raises(ValueError, match=r"update 1152921504606846976 is never reached"):
        Steps.parse(f"0.7@0,0.5@{2**60}").in_samples(4)
