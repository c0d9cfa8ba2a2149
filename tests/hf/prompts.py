"""Prompts as data: the input shapes that generation modes start from, and what they should cost."""

import torch
from families import FIRST_TOKEN, PAD, VOCAB

LENGTHS = (21, 8, 16, 1)  # of the ragged batch: two blocks and a bit, one block, two blocks, one token (block_size=8)


def tokens(length: int, seed: int = 0) -> list[int]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, VOCAB, (length,), generator=generator).tolist()


def batch(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """Rows of any length as padded `input_ids` and `attention_mask`, both `[rows, longest]`."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        padding = longest - len(row)
        ids.append([PAD] * padding + row if side == "left" else row + [PAD] * padding)
        mask.append([0] * padding + [1] * len(row) if side == "left" else [1] * len(row) + [0] * padding)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def single() -> dict:
    return batch([tokens(21)])


def single_without_mask() -> dict:
    return {"input_ids": torch.tensor([tokens(16, seed=5)])}


def ragged() -> dict:
    return batch([tokens(length, seed) for seed, length in enumerate(LENGTHS)])


def ragged_int32() -> dict:
    return {name: each.int() for name, each in ragged().items()}


def right_padded() -> dict:
    return batch([tokens(length, seed) for seed, length in enumerate((21, 8, 16))], side="right")


def diverse() -> dict:
    """Rows of one length without a mask; they share no first token."""
    return {"input_ids": torch.tensor([tokens(13, seed) for seed in (3, 4, 6)])}


def identical() -> dict:
    return batch([tokens(19)] * 3)


def shared_prefix() -> dict:
    """Rows that branch off one prefix at different places, one that is a strict prefix of another, and a stranger."""
    system = tokens(18)
    rows = [system + tokens(length, seed=50 + length) for length in (1, 5, 9)]
    return batch([*rows, rows[2][:22], system[:7] + tokens(4, seed=60), tokens(12, seed=61)])


def holes() -> dict:
    """Masks with zeros in the middle, and a left-padded row with one."""
    inputs = batch([tokens(21), tokens(17, seed=1), tokens(21, seed=2)])
    inputs["attention_mask"][0, 5:9] = 0
    inputs["attention_mask"][1, 8] = 0
    return inputs


def num_real_tokens(inputs: dict) -> int:
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else inputs["input_ids"].numel()


def num_distinct_tokens(inputs: dict) -> int:
    """Nodes of the trie of the rows: what a packed prefill has to compute."""
    masks = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    rows = [tuple(row[mask].tolist()) for row, mask in zip(inputs["input_ids"], masks, strict=True)]
    return len({row[: end + 1] for row in rows for end in range(len(row))})
