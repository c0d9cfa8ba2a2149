"""How far results may be from stock transformers, per dtype, in one place.

A bound is absolute for values up to 1 and relative to the largest value of the tensor above that: `bound(expected)`.
Measured: reordering the sums of attention moves logits of the tiny models by 1e-6 to 1e-5 of their size in float32.
"""

import torch

LOGITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
KV = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0}  # what was stored must come back bit for bit
# Of attention from float64, relative to the largest value. Sums of products of matrices go over one channel after the
# other: torch's own attention is 3e-6 off where scores are as large as in the tests.
ATTENTION = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ATTENTION_OF_MANY = {**ATTENTION, torch.float32: 6e-6}
TIE = 1e-4  # two logits this close are a tie: either token is right


def bound(expected: torch.Tensor, table: dict = LOGITS) -> float:
    finite = expected[expected.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 1.0
    return table[expected.dtype] * max(1.0, largest)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, table: dict = LOGITS) -> None:
    """Equal shapes and dtypes, infinities in the same places, everything else within the bound."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, stock {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, stock {expected.dtype}"
    if expected.numel() == 0:
        return
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{what}: {actual.tolist()}, stock {expected.tolist()}"
        return
    assert not actual.isnan().any(), f"{what}: NaN at {_first(actual.isnan())}"
    same = actual == expected  # infinities included
    error = torch.where(same, torch.zeros_like(actual), (actual - expected).abs())
    limit = bound(expected, table)
    wrong = ~(error <= limit)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} values off, first at {_first(wrong)}, "
        f"largest error {error.nan_to_num(float('inf')).max().item():.3g}, allowed {limit:.3g}"
    )


def _first(where: torch.Tensor) -> list[int]:
    return where.nonzero()[0].tolist()
