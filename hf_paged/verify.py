"""What is looked at before a patched model's first `generate`: `verify` in `PagedConfig`."""

from __future__ import annotations

import warnings
from typing import Any

from hf_paged.check import NotAskableError, check, mismatches
from hf_paged.config import PagedConfig
from hf_paged.core.forks import new_rlock
from hf_paged.quality import NotMeasurableError, check_quality


class Verification:
    """Done once; other threads wait for what it says.

    Where `verify` is not set, KV that is stored quantized is held against full precision. `True` also asks whether the
    patched model answers as stock does, `False` leaves both out.
    """

    def __init__(self, config: PagedConfig):
        self._config = config
        self._lock, self._is_done = new_rlock(), False
        self._is_wanted = config.kv_format is not None if config.verify is None else config.verify

    def run(self, model: Any) -> None:
        """Raises `ValueError` where the model does not answer as it should, or cannot be asked although it is to be."""
        if not self._is_wanted:
            return
        with self._lock:
            if self._is_done:
                return
            self._is_done = True  # the check generates, too
            try:
                self._check_quality(model)
                if self._config.verify:
                    self._check_answers(model)
            except BaseException:
                self._is_done = False
                raise

    def _check_quality(self, model: Any) -> None:
        if self._config.kv_format is None:
            return
        try:
            check_quality(model, self._config.kv_format)
        except NotMeasurableError as error:
            if self._config.verify:
                raise ValueError(f"verify: this model cannot be checked, set verify=False: {error}") from error
            name = self._config.kv_cache_dtype
            warnings.warn(
                f"hf_paged: kv_cache_dtype={name!r} was not held against full precision: {error}", stacklevel=4
            )

    @staticmethod
    def _check_answers(model: Any) -> None:
        try:
            if found := mismatches(check(model)):
                raise ValueError(f"verify: the patched model does not answer as stock does: {found}")
        except NotAskableError as error:
            raise ValueError(f"verify: this model cannot be checked, leave verify out: {error}") from error
