"""Linear layers by torch's oneDNN, for few enough numbers of rows that the code that it keeps does not pile up."""

from __future__ import annotations

import torch
from torch.nn import functional

from hf_paged.torch_compat import multiply

# More rows than this are multiplied in pieces.
PIECE_ROWS = 512
# oneDNN keeps code for each number of rows and shape of weights, made in some 0.5 ms and of 0.6 MB, however many rows
# they are. So up to the next power of two there are no more numbers of rows than this.
_STEPS = 8


def product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`functional.linear` by oneDNN."""
    rows = input.numel() // weight.shape[1]
    if rows <= PIECE_ROWS and rows == _filled_up(rows):
        return multiply(input, weight, bias)
    flat = input.reshape(rows, -1)
    if rows <= PIECE_ROWS:
        answer = _piece(flat, weight, bias)
    else:
        answer = input.new_empty(rows, len(weight))
        for piece, into in zip(flat.split(PIECE_ROWS), answer.split(PIECE_ROWS), strict=True):
            into.copy_(_piece(piece, weight, bias))
    return answer.view(*input.shape[:-1], -1)


def _piece(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Of `[rows, in_features]`, with zeros below as far as code is kept for more rows only."""
    rows = len(input)
    if missing := _filled_up(rows) - rows:
        input = functional.pad(input, (0, 0, 0, missing))
    return multiply(input, weight, bias)[:rows]


def _filled_up(rows: int) -> int:
    """The number of rows for which code is kept, an eighth more at most above 64."""
    if rows <= _STEPS:
        return rows
    step = max(_STEPS, 2 ** rows.bit_length() // 2 // _STEPS)
    return -(-rows // step) * step
