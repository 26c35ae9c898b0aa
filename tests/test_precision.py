"""The dtype that something was computed in, read off its bits."""

import numpy as np
import pytest
import torch

from trainer.audit.precision import ENOUGH, compute_dtypes, gradient_codes
from trainer.audit.records import DTYPES, code


def names(codes: np.ndarray) -> list[str]:
    return [DTYPES[each] for each in codes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_product_tells_the_dtype_it_was_computed_in(dtype: str) -> None:
    torch.manual_seed(0)
    one, other = (torch.randn(64, 64).to(getattr(torch, dtype)) for _ in range(2))
    assert names(compute_dtypes((one @ other).float().numpy())) == [dtype] * 64


def test_one_full_value_is_enough_to_tell_float32() -> None:
    row = np.zeros((1, 16), np.float32)
    row[0, 3], row[0, 4] = 1.5, 0.1
    assert names(compute_dtypes(row)) == ["float32"]


@pytest.mark.parametrize("value", [0.0, -0.0, np.inf, np.nan])
def test_what_is_as_short_in_any_dtype_tells_nothing(value: float) -> None:
    assert names(compute_dtypes(np.full((2, 4), value, np.float32))) == ["undetermined"] * 2


@pytest.mark.parametrize(("num_values", "told"), [(ENOUGH - 1, "float16"), (ENOUGH, "bfloat16")])
def test_few_values_that_are_short_in_both_are_what_was_asked_for(num_values: int, told: str) -> None:
    """Of two float16 logits one in 64 pairs is as short as bfloat16: that alone accuses nobody."""
    row = np.full((1, num_values), 1.5, np.float32)
    assert names(compute_dtypes(row, np.array([code("float16")]))) == [told]
    assert names(compute_dtypes(row, np.array([code("float32")]))) == ["bfloat16"]


@pytest.mark.parametrize(
    ("scale", "told"), [(0.0, "float16"), (1.0, "float16"), (2.0**15, "float16"), (3 * 2.0**15, "undetermined")]
)
def test_a_gradient_that_was_divided_by_a_scale_tells_its_dtype_if_that_is_a_power_of_two(
    scale: float, told: str
) -> None:
    torch.manual_seed(0)
    scaled = torch.randn(1, 64).half().float().numpy()
    gradients = scaled / np.float32(scale) if scale else scaled
    assert names(gradient_codes(gradients, np.array([scale], np.float32))) == [told]
