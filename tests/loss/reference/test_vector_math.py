"""The CPU kernel's own exponential and logarithms, to the last digits of fp32, in every build that runs here."""

import numpy as np
import pytest

from pocl_fast import _C


@pytest.fixture(params=_C.supported_isas(), autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("POCL_FAST_ISA", request.param)


def error_in_ulp(name, function, x):
    x = x.astype(np.float32)
    got, want = _C.vector_math(name, x).astype(np.float64), function(x.astype(np.float64))
    return np.abs(got - want) / np.spacing(np.abs(want).astype(np.float32))


def numbers(low, high, count=200_000):
    """Evenly spread, and close to 0 in every magnitude of fp32 down to 1e-30."""
    rng = np.random.default_rng()
    sign = -1 if high <= 0 else 1
    small = sign * 10.0 ** rng.uniform(-30, np.log10(max(abs(low), abs(high))), count)
    return np.concatenate([rng.uniform(low, high, count), np.clip(small, low, high)])


@pytest.mark.parametrize(
    ("name", "function", "low", "high", "ulp"),
    [
        ("exp2", np.exp2, -125.9, 0, 2.1),
        ("exp2_minus_1", lambda x: np.expm1(x * np.log(2)), -100, 0, 2),
        ("log1p", np.log1p, -0.9999, 0, 2.5),
        ("log1p", np.log1p, 0, 0.4, 2),
        ("tanh", np.tanh, -20, 20, 4),
    ],
)
def test_a_function_is_exact_to_the_last_digits(name, function, low, high, ulp):
    assert error_in_ulp(name, function, numbers(low, high)).max() <= ulp


def test_exp_is_exact_to_the_last_digits_where_products_are_not_rounded():
    x = numbers(-87, 0)
    error = error_in_ulp("exp", lambda x: np.exp2(x * np.float64(np.float32(np.log2(np.e)))), x)
    rounding = np.abs(x) if _C.isa() == "plain" else 0  # of the exponent, which some processors round first
    assert (error <= 2 + rounding).all()


def test_log2_is_exact_to_1e_8_or_the_last_digits():
    rng = np.random.default_rng()
    magnitudes, ordinary = np.exp2(rng.uniform(-126, 3, 200_000)), np.exp2(rng.uniform(-1, 1, 200_000))
    x = np.concatenate([magnitudes, ordinary, 1 + rng.normal(0, 0.02, 200_000)]).astype(np.float32)
    got, want = _C.vector_math("log2", x).astype(np.float64), np.log2(x.astype(np.float64))
    assert (np.abs(got - want) <= np.maximum(1e-8, 2 * np.spacing(np.abs(want).astype(np.float32)))).all()


def test_log2_is_finite_at_0_and_at_subnormal_numbers():
    got = _C.vector_math("log2", np.array([0, 1e-45, 1e-40, 1.1e-38], dtype=np.float32))
    assert ((got >= -127) & (got <= -126)).all()


def test_exp2_is_exact_at_0_and_underflows_to_0():
    x = np.array([0, -1, -2, -126, -200, -1e30, -np.inf], dtype=np.float32)
    assert _C.vector_math("exp2", x).tolist() == [1, 0.5, 0.25, 2.0**-126, 0, 0, 0]


@pytest.mark.parametrize("name", ["exp2", "exp2_minus_1", "log1p", "tanh", "exp"])
def test_nan_stays(name):
    patterns = np.array([0x7FC00000, 0x7FC00001, 0xFFC12345], dtype=np.uint32).view(np.float32)
    assert np.isnan(_C.vector_math(name, patterns)).all()


def test_an_exponent_of_minus_infinity_shows_in_the_sweep_s_exp():
    assert np.isnan(_C.vector_math("exp", np.array([-np.inf, -3e38], dtype=np.float32))).tolist() == [True, True]
    assert _C.vector_math("exp", np.array([-1e37, -200], dtype=np.float32)).tolist() == [0, 0]


def test_an_unknown_function_is_refused():
    with pytest.raises(ValueError, match="no function named cosh"):
        _C.vector_math("cosh", np.zeros(1, dtype=np.float32))
