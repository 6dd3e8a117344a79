"""What encoding costs, beside llama.cpp's own quantizers: root mean square errors that ``ggml_quantize_chunk`` gave
(llama.cpp, ggml 0.26) for the same numbers, without and with column weights, over the numbers' standard deviation.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from puna.errors import CheckpointError
from puna.tensor import QUANT_TYPES

LLAMA_CPP = {
    ("normal", "Q4_0"): (0.086088, 0.045472),
    ("normal", "Q4_1"): (0.078118, 0.037820),
    ("normal", "Q5_0"): (0.042646, 0.022526),
    ("normal", "Q5_1"): (0.037797, 0.018285),
    ("normal", "Q8_0"): (0.005369, 0.003108),
    ("normal", "Q2_K"): (0.296138, 0.139531),
    ("normal", "Q3_K"): (0.150901, 0.078357),
    ("normal", "Q4_K"): (0.071355, 0.038399),
    ("normal", "Q5_K"): (0.036165, 0.019471),
    ("normal", "Q6_K"): (0.017761, 0.009496),
    ("normal", "IQ4_NL"): (0.075867, 0.041321),
    ("normal", "IQ4_XS"): (0.076497, 0.041766),
    ("t", "Q4_0"): (0.119810, 0.066544),
    ("t", "Q4_1"): (0.094311, 0.046665),
    ("t", "Q5_0"): (0.059887, 0.033245),
    ("t", "Q5_1"): (0.045516, 0.022858),
    ("t", "Q8_0"): (0.007590, 0.004466),
    ("t", "Q2_K"): (0.341070, 0.161807),
    ("t", "Q3_K"): (0.184405, 0.100250),
    ("t", "Q4_K"): (0.087077, 0.047958),
    ("t", "Q5_K"): (0.044128, 0.024823),
    ("t", "Q6_K"): (0.023364, 0.013057),
    ("t", "IQ4_NL"): (0.095626, 0.052870),
    ("t", "IQ4_XS"): (0.096598, 0.053712),
}
SEARCHED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


def numbers(spread: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers [64, 1024] and column weights that llama.cpp was given."""
    rng = np.random.default_rng(7 if spread == "normal" else 8)
    drawn = rng.standard_normal((64, 1024)) if spread == "normal" else rng.standard_t(4, (64, 1024))
    return (drawn * 0.02).astype(np.float32), (rng.random(1024) ** 2 + 0.01).astype(np.float32)


@pytest.mark.parametrize(("spread", "name"), LLAMA_CPP)
def test_loses_no_more_than_llama_cpp(spread: str, name: str) -> None:
    x, importance = numbers(spread)
    kind = QUANT_TYPES[name]

    def error(encoded: np.ndarray, weight: np.ndarray | float = 1.0) -> float:
        return float(np.sqrt(((kind.decode(encoded) - x) ** 2 * weight).mean()) / x.std())

    plain, weighted = LLAMA_CPP[spread, name]
    assert error(kind.encode(x)) <= plain * 1.0001
    assert error(kind.encode(x, importance), importance) <= weighted * 1.005


@pytest.mark.parametrize("name", [name for _, name in LLAMA_CPP if name != "Q8_0"])
def test_importance_lowers_the_error_where_it_says(name: str) -> None:
    x, importance = numbers("t")
    kind = QUANT_TYPES[name]
    errors = [((kind.decode(b) - x) ** 2 * importance).sum() for b in (kind.encode(x), kind.encode(x, importance))]
    assert errors[1] < errors[0]


# Numbers whose scale float16 can hold; float16's own steps are coarse below 2^-14.
moderate = st.floats(-1000, 1000, width=32).map(lambda v: 0.0 if abs(v) < 1e-2 else v)


@pytest.mark.parametrize("name", SEARCHED)
@given(values=arrays(np.float32, (1, 256), elements=moderate))
@settings(max_examples=40, deadline=None)
def test_never_worse_than_the_largest_number_allows(name: str, values: np.ndarray) -> None:
    kind = QUANT_TYPES[name]
    with np.errstate(all="raise", under="ignore"):
        decoded = kind.decode(kind.encode(values))
    assert np.isfinite(decoded).all()
    bits = int(name.removeprefix("I")[1])
    assert np.sqrt(((decoded - values) ** 2).mean()) <= np.abs(values).max() * 1.2 / 2 ** (bits - 1) + 1e-6


@pytest.mark.parametrize("name", SEARCHED)
def test_encoding_again_stays_near(name: str) -> None:
    kind = QUANT_TYPES[name]
    x, _ = numbers("normal")
    once = kind.decode(kind.encode(x))
    again = kind.decode(kind.encode(once))
    assert np.sqrt(((again - once) ** 2).mean()) <= 0.35 * np.sqrt(((once - x) ** 2).mean())


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_no_block_can_hold_is_refused(name: str, bad: float) -> None:
    values = np.ones((2, 256), np.float32)
    values[1, 5] = bad
    with pytest.raises(CheckpointError, match="float16"):
        QUANT_TYPES[name].encode(values)


@pytest.mark.parametrize("name", [*SEARCHED, "Q4_0", "Q5_1"])
def test_zeros_and_unimportant_columns(name: str) -> None:
    kind = QUANT_TYPES[name]
    np.testing.assert_array_equal(kind.decode(kind.encode(np.zeros((2, 256), np.float32))), 0)
    x, _ = numbers("normal")
    decoded = kind.decode(kind.encode(x[:, :256], np.zeros(256, np.float32)))
    assert np.isfinite(decoded).all()
