import math

import numpy as np
import pytest

from moe_peft import errors
from moe_peft.training import schedules


def _values(schedule, steps):
    return [float(schedule(step)) for step in steps]


def test_constant():
    np.testing.assert_allclose(_values(schedules.constant(3e-4), [0, 1, 10**6]), 3e-4)


def test_linear_starts_at_zero_and_returns_to_zero():
    schedule = schedules.linear_warmup_linear_decay(2.0, total_steps=10, warmup_steps=4)
    want = [0.0, 0.5, 1.0, 1.5, 2.0, 10 / 6, 8 / 6, 1.0, 4 / 6, 2 / 6, 0.0, 0.0]
    np.testing.assert_allclose(_values(schedule, range(12)), want, rtol=1e-6, atol=1e-7)


def test_linear_shifted_by_one_makes_use_of_the_first_update():
    shifted = schedules.linear_warmup_linear_decay(
        2.0, total_steps=10, warmup_steps=4, first_update_is_zero=False
    )
    as_released = schedules.linear_warmup_linear_decay(2.0, total_steps=10, warmup_steps=4)
    np.testing.assert_allclose(_values(shifted, range(9)), _values(as_released, range(1, 10)))


def test_linear_warmup_is_a_truncated_fraction():
    # int(0.06 * 1,010) = 60: the peak is at step 60.
    schedule = schedules.linear_warmup_linear_decay(1.0, total_steps=1_010)
    np.testing.assert_allclose(_values(schedule, [30, 60]), [0.5, 1.0])
    assert float(schedule(61)) < 1.0


def test_rsqrt():
    schedule = schedules.rsqrt(1.0, warmup_steps=100)
    np.testing.assert_allclose(_values(schedule, [0, 100, 400]), [0.1, 0.1, 0.05], rtol=1e-6)


def test_cosine():
    schedule = schedules.linear_warmup_cosine(2.0, total_steps=12, warmup_steps=2, final=0.5)
    half = 0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 2))
    found = _values(schedule, [0, 1, 6, 11, 50])
    np.testing.assert_allclose(found, [1.0, 2.0, half, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize(("warmup", "total"), [(5, 4), (-1, 4), (0, 0)])
@pytest.mark.parametrize(
    "schedule", [schedules.linear_warmup_linear_decay, schedules.linear_warmup_cosine]
)
def test_impossible_steps_are_refused(schedule, warmup, total):
    with pytest.raises(errors.UserError, match=f"warmup_steps={warmup}, total_steps={total}"):
        schedule(1.0, total_steps=total, warmup_steps=warmup)
