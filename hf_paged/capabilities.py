"""What is known of what the fast path does for a model, and when that is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from hf_paged.config import PagedConfig
from hf_paged.draws import draws_kept
from hf_paged.forward import ModelCall
from hf_paged.identity import rotary_depends_on_length
from hf_paged.latent import reads_latents
from hf_paged.probe import Capability, Later, circumstances, ignores_padding, probe, reads_views, zeros_matter


class Capabilities:
    """Of one model: each answer is found out by trying, once, when it is first needed."""

    def __init__(self, config: PagedConfig):
        self._config, self._exact = config, config
        if config.kv_format is not None:
            # Whether passes are put together right has nothing to do with how exactly K and V are stored.
            self._exact = replace(config, kv_cache_dtype="auto", verify=False, offload_folder=None)
        self._found: dict[tuple[Any, ...], Capability] = {}
        self._unpacked: dict[tuple[Any, ...], Capability] = {}

    def of(self, model: PreTrainedModel, call: Callable[..., Any]) -> tuple[Capability, bool]:
        """What the fast path does for the model as it is now, and whether that is news. `call`: stock's `__call__`."""
        key = (*others, hooks) = circumstances(model, self._config)
        found = self._found.get(key)
        if found is not None:
            return found, False
        found = self._found.get((*others, None))
        if found is None:
            with draws_kept(model):
                found = probe(model, call, self._exact)
        elif hooks is not None and found.later.may_have_gaps is None:
            # Hooks that have come since are shown the passes of calls, and none that only try something out.
            found = replace(found, later=Later(False, False))
        if hooks is not None:
            found = replace(found, obstacle=hooks, sees_shapes=True)
        self._found[key] = found
        return found, True

    def unpacked(self, model: PreTrainedModel, circumstances: tuple[Any, ...], obstacle: str) -> Capability:
        """The same, of a model in these circumstances whose prompts are never packed, for the reason `obstacle`."""
        if circumstances not in self._unpacked:
            hooks = circumstances[-1]
            later = Later(may_have_gaps=False) if hooks is None else Later(False, False)
            self._unpacked[circumstances] = Capability(
                hooks or obstacle,
                whole_batches=rotary_depends_on_length(model),
                later=later,
                sees_shapes=hooks is not None,
                has_latents=reads_latents(model.modules()),
            )
        return self._unpacked[circumstances]

    def seen(self, model: PreTrainedModel) -> Capability | None:
        """What the fast path does for the model as it is now, if that has been found out."""
        return self._found.get(circumstances(model, self._config))

    def may_have_gaps(self, model: PreTrainedModel, call: Callable[..., Any], known: Capability) -> bool:
        """Whether dense K and V of padded passes may have gaps. `known`: what the fast path does for the model now."""
        later = known.later
        if later.may_have_gaps is None:
            with draws_kept(model):
                later.may_have_gaps = reads_views(model, call, self._exact)
        return later.may_have_gaps

    def ignores_padding(self, model: PreTrainedModel, call: Callable[..., Any], known: Capability) -> bool:
        """Whether padding on the left changes nothing for the tokens behind it, in padded passes."""
        later = known.later
        if later.ignores_padding is None:
            with draws_kept(model):
                # Where attention is cut by columns, a few of them do not show it.
                later.ignores_padding = known.window_limit is None and ignores_padding(model, call, self._exact)
        return later.ignores_padding

    def unkept(self, model: PreTrainedModel, request: ModelCall, known: Capability) -> str | None:
        """Why nothing of a call is kept for later ones, nor taken from earlier ones; or `None`."""
        if known.sees_shapes:  # and code of others is not shown what only tries something out
            return known.obstacle
        if any(self._zeros_matter(model, request.call, known.later, name) for name in request.token_types):
            return "token types that the model adds to its tokens"
        return None

    @staticmethod
    def _zeros_matter(model: PreTrainedModel, call: Callable[..., Any], later: Later, name: str) -> bool:
        """Whether zeros in the argument `name`, which is for token types, say more than leaving it out."""
        if name not in later.zeros_matter:
            with draws_kept(model):
                later.zeros_matter[name] = zeros_matter(model, call, name)
        return later.zeros_matter[name]
