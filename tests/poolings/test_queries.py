"""Queries folded into the key map against keys and values of all positions."""

import pytest
import torch

from poolings.queries import fold, project, scaled_heads, weigh
from tests.reference import tensor


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_equals_attention_with_all_keys_and_values(heads):
    """In float64 the result is torch's own attention from the query to every position; 1e-12 is rounding."""
    query, x = tensor(1, (8,)).double(), tensor(2, (3, 5, 6)).double()
    key, value = tensor(3, (8, 6)).double(), tensor(4, (12, 6)).double()
    attention = weigh(fold(scaled_heads(query, heads), key), x)
    split = lambda t: t.unflatten(-1, (heads, -1)).transpose(-3, -2)  # noqa: E731  (..., h, positions, d)
    expected = torch.nn.functional.scaled_dot_product_attention(
        split(query[None]).expand(3, -1, -1, -1), split(x @ key.T), split(x @ value.T)
    )
    torch.testing.assert_close(project(attention @ x, value), expected.flatten(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention.sum(2), torch.ones(3, heads).double())
