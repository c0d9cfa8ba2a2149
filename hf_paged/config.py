"""What a user may set, checked on entry."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hf_paged_kernels.formats import FORMATS, KVFormat

ATTENTION_BACKENDS = ("auto", "triton", "cpu", "reference")
KV_CACHE_DTYPES = ("auto", *FORMATS)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Fixed(dict[int | str, int | str]):
    """A dict that stays as it is and may be a part of what is hashed."""

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("max_memory of a PagedConfig does not change; make another config")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


@dataclass(frozen=True, kw_only=True)
class PagedConfig:
    """Settings of a patched model.

    Attributes:
        block_size: tokens per block, a power of two from 8 to 256.
        max_memory: budget for KV blocks per device as accelerate writes it, `{0: "8GiB", "cpu": "16GiB", "disk":
            "50GiB"}`, ints in bytes. `None`: most of what is free on the model's devices when blocks are needed, and no
            tiers below. Those are for cached prefixes that are evicted: `"cpu"`, pinned memory, for a model on a GPU,
            and `"disk"` below it, or right below a model on the CPU. Of a model on several devices each one's budget
            counts for the layers there. Whatever it is, a pool has at most 262,144 blocks.
        offload_folder: where the disk tier makes a folder for its files; among the temporary files where `None`.
        prefix_caching: keep finished blocks for later calls until their memory is needed.
        kv_cache_dtype: `"auto"` stores KV in the model's dtype, `"int8"` and `"fp8"` (e4m3) in a byte a number and a
            scale for each token and KV head, `"int4"` in four bits a number, and step and minimum of each group of
            channels; for head dims that are multiples of 16. Attention reads what is stored, also where a token was
            just computed.
        attention_backend: `"auto"`, `"triton"` (CUDA), `"cpu"` (models there) or `"reference"` (plain torch operations
            on any device).
        cuda_graphs: replay decode steps from CUDA graphs where the device can and attention runs in Triton's kernels.
        verify: on first use ask a few questions of the patched model and of stock, and raise `ValueError` where the
            answers differ; `hf-paged doctor` asks the same ones. Where KV is stored quantized, a short prompt is held
            against full precision as well, unless this is `False`: `None` does only that.

    Raises:
        ValueError: naming the field that is unknown, out of range or not available in this version.
    """

    block_size: int = 16
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: str | os.PathLike[str] | None = None
    prefix_caching: bool = True
    kv_cache_dtype: str = "auto"
    attention_backend: str = "auto"
    cuda_graphs: bool = True
    verify: bool | None = None

    def __post_init__(self) -> None:
        size = self.block_size
        if not isinstance(size, int) or isinstance(size, bool) or not 8 <= size <= 256 or size & (size - 1):
            raise ValueError(f"block_size must be a power of two from 8 to 256, got {size!r}")
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        for name in ("prefix_caching", "cuda_graphs", "verify"):
            if not isinstance(getattr(self, name), bool) and not (name == "verify" and self.verify is None):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.max_memory is not None:
            _check_max_memory(self.max_memory)
            object.__setattr__(self, "max_memory", _Fixed(self.max_memory))
        if self.offload_folder is not None:
            _check_folder(self.offload_folder)
            if self.budget_bytes("disk") is None:
                raise ValueError("offload_folder: nothing may be kept there; set max_memory={'disk': '10GiB'}, too")

    @classmethod
    def build(cls, config: PagedConfig | None, overrides: Mapping[str, Any]) -> PagedConfig:
        """`config` (or the defaults) with `overrides`; `ValueError` for a field that does not exist."""
        if config is not None and not isinstance(config, cls):
            raise ValueError(f"config must be a PagedConfig, got {type(config).__name__}")
        known = [field.name for field in fields(cls)]
        for name in overrides:
            if name not in known:
                raise ValueError(f"PagedConfig has no field {name!r}; the fields are {', '.join(known)}")
        return replace(config or cls(), **overrides)

    @property
    def kv_format(self) -> KVFormat | None:
        """How KV is stored; `None`: as the model gives it."""
        return FORMATS.get(self.kv_cache_dtype)

    def budget_bytes(self, device: str | int) -> int | None:
        """Bytes allowed on a device (`"cpu"`, `"disk"` or a GPU index), `None` where no budget was set for it."""
        if self.max_memory is None or device not in self.max_memory:
            return None
        return parse_bytes(self.max_memory[device])


def parse_bytes(value: int | str) -> int:
    """Bytes from an int or from text such as `"8GiB"`, `"500MB"`; a `b` as in `"8Gb"` is bits, as in accelerate."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", value, re.IGNORECASE) if isinstance(value, str) else None
    )
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"max_memory: {value!r} is no size; write bytes as an int or text such as '8GiB' or '500MB'")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    return size // 8 if match[2][1:] == "b" else size


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_max_memory(max_memory: object) -> None:
    if not isinstance(max_memory, Mapping):
        raise ValueError(f"max_memory must be a dict such as {{0: '8GiB', 'cpu': '16GiB'}}, got {max_memory!r}")
    for device, size in max_memory.items():
        if device not in ("cpu", "disk") and (not isinstance(device, int) or isinstance(device, bool) or device < 0):
            raise ValueError(f"max_memory: {device!r} is no device; use a GPU index, 'cpu' or 'disk'")
        parse_bytes(size)


def _check_folder(folder: object) -> None:
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"offload_folder must be a path, got {folder!r}")
    path = Path(folder)
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"offload_folder: {existing} is no folder that can be written to")
