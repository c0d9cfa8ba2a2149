"""`patch_model`, `unpatch_model` and `paged`: in place, and undone to the last attribute."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from transformers import Pipeline, PreTrainedModel

from hf_paged import compat
from hf_paged.attention import give_names_back, take_names
from hf_paged.config import PagedConfig
from hf_paged.core.forks import new_rlock
from hf_paged.faster_layers import give_layers_back, take_layers
from hf_paged.generation import RUNTIME_ATTRIBUTE, PagedGenerationMixin
from hf_paged.runtime import PagedRuntime

T = TypeVar("T")
# Held while a model is patched, or while that is undone.
_patching = new_rlock()


def patch_model(model: T, config: PagedConfig | None = None, **overrides: Any) -> T:
    """Make `model.generate` run on paged KV. Patches in place and returns the same object.

    Args:
        model: a `PreTrainedModel` that can generate, a `PeftModel` around one, a model that accelerate dispatched or
            wrapped, or a transformers `Pipeline`.
        config: settings; the defaults where `None`.
        **overrides: fields of `PagedConfig`.

    A second call with other settings reconfigures.

    Raises:
        TypeError: where nothing in `model` can generate.
        ValueError: naming the field, for a bad config.
    """
    target = find_generating_model(model)
    settings = PagedConfig.build(config, overrides)
    with _patching:
        if not _reconfigure(target, settings):
            _swap_class(target, PagedRuntime(target, settings))
        take_layers(target)
    return model


def _reconfigure(target: PreTrainedModel, settings: PagedConfig) -> bool:
    """Whether `target` has the class of patched models, and so has `settings` now."""
    before = vars(target).get(RUNTIME_ATTRIBUTE)
    if before is None:
        return False
    with before.calls.lock:
        if RUNTIME_ATTRIBUTE not in vars(target):  # the last call has ended that it was left for
            return False
        if before.config == settings and not before.is_leaving:
            return True
        runtime = PagedRuntime(target, settings, before.calls)
        before.calls.when_idle(None)
        target.__dict__[RUNTIME_ATTRIBUTE] = runtime
        before.is_leaving = True
    before.release()
    take_names(runtime.attention_configs, runtime, of_others=True)
    return True


def _swap_class(target: PreTrainedModel, runtime: PagedRuntime) -> None:
    original = type(target)
    target.__dict__[RUNTIME_ATTRIBUTE] = runtime  # no other thread finds the class without it
    target.__class__ = type(
        original.__name__,
        (PagedGenerationMixin, original),
        {"__module__": original.__module__, "__qualname__": original.__qualname__, "_hf_paged_original": original},
    )
    take_names(runtime.attention_configs, runtime)


def unpatch_model(model: T) -> T:
    """Undo `patch_model` and free every block; a no-op on a model that is not patched. Returns the same object.

    Calls of `generate` that run meanwhile, in whatever thread, go on to their ends: until then the model keeps the
    class of patched models and the names of its attention, and other calls are stock's.
    """
    target = find_generating_model(model)
    with _patching:
        if is_patched(target):
            runtime = target.paged
            runtime.is_leaving = True
            runtime.release()
            runtime.calls.when_idle(partial(_undo, target))
    return model


def _undo(target: PreTrainedModel) -> None:
    runtime = target.__dict__[RUNTIME_ATTRIBUTE]
    runtime.release()
    give_names_back([*compat.attention_configs(target), *runtime.attention_configs], runtime)
    give_layers_back(target)
    target.__class__ = target._hf_paged_original
    del target.__dict__[RUNTIME_ATTRIBUTE]


@dataclass(eq=False)
class _Scope:
    """A `with paged(...)` block; `settings` are those within, `None` where the model is not patched."""

    settings: PagedConfig | None


# Of each model: what it was before the blocks that are open, and these, in the order in which they were entered.
_scopes: weakref.WeakKeyDictionary[PreTrainedModel, list[_Scope]] = weakref.WeakKeyDictionary()


@contextmanager
def paged(model: T, config: PagedConfig | None = None, **overrides: Any) -> Iterator[T]:
    """`patch_model` for the length of a `with` block; a model that was patched before gets its old settings back.

    Not where it was unpatched inside of the block: that is final, whether it was patched before or not.
    Blocks of several threads may overlap: the settings are those of the last one that was entered and is not left yet.

    Raises:
        TypeError: as `patch_model`, when the block is entered.
        ValueError: as `patch_model`.
    """
    target = find_generating_model(model)
    with _patching:
        before = _Scope(target.paged.config if is_patched(target) else None)
        patch_model(model, config, **overrides)
        scope = _Scope(target.paged.config)
        scopes = _scopes.setdefault(target, [before])
        if before.settings is None:
            for outer in scopes:
                outer.settings = None  # the model was unpatched inside of them
        scopes.append(scope)
    try:
        yield model
    finally:
        with _patching:
            was_last = scopes[-1] is scope
            scopes.remove(scope)
            if len(scopes) == 1:
                del _scopes[target]
            if was_last and scopes[-1].settings is None:
                unpatch_model(model)
            elif was_last and is_patched(target):
                patch_model(model, scopes[-1].settings)


def is_patched(model: object) -> bool:
    """Whether this very object is patched, and not waiting for the end of calls to be so no more."""
    return isinstance(model, PagedGenerationMixin) and hasattr(model, "paged")


def find_generating_model(model: Any) -> PreTrainedModel:
    """The transformers model inside pipelines and wrappers whose `generate` will run. Raises `TypeError`."""
    inner, seen = model, []
    while not compat.can_generate(inner):
        seen.append(type(inner).__name__)
        if isinstance(inner, Pipeline):
            inner = inner.model
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif hasattr(inner, "peft_config") and not isinstance(inner, PreTrainedModel):  # PEFT's mixed models
            inner = inner._modules.get("base_model", inner._modules.get("model"))
        elif hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif hasattr(inner, "module"):  # DataParallel, DistributedDataParallel
            inner = inner.module
        else:
            raise TypeError(
                f"model: {' > '.join(seen)} cannot generate; pass a transformers model with a language-model head "
                "(AutoModelForCausalLM), a PeftModel around one, or a text-generation pipeline"
            )
    return inner
