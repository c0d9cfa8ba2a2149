"""`max_memory` where layers lie: what each device's limit allows all of them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

import torch
from transformers import PreTrainedModel

from hf_paged import compat
from hf_paged.config import PagedConfig


class DeviceLimits:
    """The limits of the devices that blocks lie on: a block has a part on each that some of its layers are on.

    Args:
        settings: with the limits.
        device: of the first layer, and taken for that of all others until `place` is called.

    Attributes:
        key: what `max_memory` calls that device.
    """

    def __init__(self, settings: PagedConfig, device: torch.device):
        self._settings = settings
        self.key = budget_key(device)
        self._shares: dict[str | int, Fraction] = {self.key: Fraction(1)}

    def place(self, layers: Iterable[tuple[int, int, torch.device]]) -> None:
        """Where all layers lie, each with the number of its group, and bytes of a token there."""
        all_bytes, bytes_here = Counter(), Counter()
        for group, num_bytes, device in layers:
            all_bytes[group] += num_bytes
            bytes_here[group, budget_key(device)] += num_bytes
        self._shares = {}
        for (group, key), num_bytes in bytes_here.items():
            self._shares[key] = max(self._shares.get(key, 0), Fraction(num_bytes, max(1, all_bytes[group])))

    @property
    def is_set(self) -> bool:
        """Whether the first layer's device has a limit."""
        return self.key in self._allowed()

    @property
    def allowed_bytes(self) -> int | None:
        """Bytes of whole blocks with which every limit is kept to; `None`: there is none."""
        return min(self._allowed().values(), default=None)

    @property
    def tightest(self) -> str | int:
        """The device whose limit is reached first."""
        allowed = self._allowed()
        return min(allowed, key=allowed.__getitem__, default=self.key)

    def _allowed(self) -> dict[str | int, int]:
        limits = ((key, self._settings.budget_bytes(key), share) for key, share in self._shares.items())
        return {key: int(limit / share) for key, limit, share in limits if limit is not None and share}


def budget_key(device: torch.device) -> str | int:
    """What `max_memory` calls a device."""
    return "cpu" if device.type == "cpu" else (device.index or 0)


def misplaced_limit(settings: PagedConfig, devices: Sequence[torch.device], has_tiers: bool = True) -> str | None:
    """What is wrong where `max_memory` limits other devices than those that K and V are on; or `None`.

    `has_tiers`: `"cpu"` and `"disk"` are for those, wherever K and V are.
    """
    given, keys = settings.max_memory or {}, [budget_key(device) for device in devices]
    limits = [key for key in given if isinstance(key, int) or not has_tiers]
    if not limits or not given.keys().isdisjoint(keys):
        return None
    return (
        f"max_memory[{limits[0]!r}] limits nothing: K and V are on {', '.join(map(str, devices))}; "
        f"set max_memory[{keys[0]!r}], leave {limits[0]!r} out, or move the model there first"
    )


def compute_devices(model: PreTrainedModel) -> list[torch.device]:
    """Where parts of a model compute, its first layer first."""
    here = (each.device for each in model.parameters() if not each.is_meta)
    return list(dict.fromkeys([compat.compute_device(model), *here, *compat.execution_devices(model)]))
