"""The methods of `generate` that a patched model overrides."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from copy import copy, deepcopy
from functools import partial, wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode, StoppingCriteriaList

from hf_paged import compat
from hf_paged.attention import take_names
from hf_paged.cache import PagedCache
from hf_paged.compat import CACHE_NAME
from hf_paged.draws import way_back
from hf_paged.encdec import paged_part
from hf_paged.encoded_later import EncodedLater, copied, encoded_later
from hf_paged.errors import ForeignKVError, PoolInUseError
from hf_paged.forward import by_name
from hf_paged.identity import Sampling
from hf_paged.media import Alone
from hf_paged.probe import CACHE_UNUSED
from hf_paged.step import UnsupportedAttentionError
from hf_paged.training import make_way

if TYPE_CHECKING:
    from hf_paged.runtime import PagedRuntime

RUNTIME_ATTRIBUTE = "_hf_paged_runtime"
# Room behind a sequence of which nobody says how long it will get; more than this is not kept free for one row.
MAX_ROOM_TOKENS = 4096

# What `generate` takes for stop strings, and then hands on to the model, which has no use for it.
_TOKENIZERS = frozenset(("tokenizer", "assistant_tokenizer"))

# What an encoder has made, as it is given to a decoder.
_ENCODED = ("encoder_outputs", "encoder_hidden_states")

# The salt of the `generate` that runs: that of a draft model, inside it, has the same.
_SALT: ContextVar[str | None] = ContextVar("cache_salt", default=None)
# The look at the weights that the `generate` that runs has begun.
_BEGUN: ContextVar[Sampling | None] = ContextVar("begun", default=None)
# What comes with the prompts of the `generate` that runs, beside their tokens, before they are repeated for samples.
_ALONE: ContextVar[Alone | None] = ContextVar("alone", default=None)
# Filled by the `generate` that runs, where it asks the patched model itself.
_ASKED: ContextVar[list[Any] | None] = ContextVar("asked", default=None)


class FinishedRows(StoppingCriteriaList):
    """The call's own criteria; tells the cache each step which rows have ended."""

    def __init__(self, criteria: StoppingCriteriaList, cache: PagedCache):
        super().__init__(criteria)
        self._cache = cache

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self._cache.finish_rows(done.tolist())
        return done


class PagedGenerationMixin:
    """Comes before the model's own class; `patch_model` makes the subclass."""

    _hf_paged_original: type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """A new model made from the class of a patched one (`type(model).from_pretrained`) is a stock model."""
        object.__setattr__(self, "__class__", self._hf_paged_original)
        self.__init__(*args, **kwargs)

    @property
    def paged(self) -> PagedRuntime:
        """The runtime: settings, statistics, memory. `AttributeError` after `unpatch_model`, as on any model."""
        runtime = self.__dict__.get(RUNTIME_ATTRIBUTE)
        if runtime is None or runtime.is_leaving:
            raise AttributeError(f"{type(self).__name__} is not patched")
        return runtime

    @property
    def _hf_paged(self) -> PagedRuntime:
        return self.__dict__[RUNTIME_ATTRIBUTE]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime = self.__dict__.get(RUNTIME_ATTRIBUTE)
        if runtime is None or not isinstance(self, PagedGenerationMixin):  # unpatched; who calls has kept this method
            return type(self).__call__(self, *args, **kwargs)
        if args and any(paged_part(each) is not None for each in (*args, compat.given_cache(kwargs))):
            args, kwargs = by_name(self, args, kwargs)
        cache = paged_part(compat.given_cache(kwargs))
        if cache is not None and not args:
            named = kwargs if kwargs.keys().isdisjoint(compat.OLD_CACHE_NAMES) else compat.named_as_today(self, kwargs)
            if CACHE_NAME in named:  # else by a name that only the model knows, to which it is like any other cache
                take_names(runtime.attention_configs, runtime)
                return runtime.run(super().__call__, cache, named)
        make_way(self, runtime)
        return super().__call__(*args, **kwargs)

    # -- generate ------------------------------------------------------------------------------------------------

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        runtime = self.__dict__.get(RUNTIME_ATTRIBUTE)
        with nullcontext() if runtime is None else runtime.calls.one_more():
            if isinstance(self, PagedGenerationMixin):
                return self._paged_generate(*args, **kwargs)
        return type(self).generate(self, *args, **kwargs)  # unpatched, and asked by who has kept this method

    def _paged_generate(self, *args: Any, **kwargs: Any) -> Any:
        salt = kwargs.get("cache_salt")
        take_names(self._hf_paged.attention_configs, self._hf_paged)  # `set_attn_implementation` may have come since
        self._hf_paged.verify()
        outer = _SALT.set(_SALT.get() if salt is None else salt)
        outer_begun = _BEGUN.set(self._hf_paged.begin_look() if self._leaves_weights_alone(kwargs) else None)
        outer_alone = _ALONE.set(None)
        outer_asked = _ASKED.set(asked := [])
        try:
            result = super().generate(*args, **kwargs)
        finally:
            _ALONE.reset(outer_alone)
            _ASKED.reset(outer_asked)
            _BEGUN.reset(outer_begun)
            _SALT.reset(outer)
        if not asked:
            self._note_others()
        return result

    def _note_others(self) -> None:
        """Say which models inside this one a `generate` of its own has left everything to, where none is patched."""
        inside = {name: each for name, each in self.named_modules() if name and compat.can_generate(each)}
        is_own = self._hf_paged_original.generate is not GenerationMixin.generate
        if is_own and inside and not any(isinstance(each, PagedGenerationMixin) for each in inside.values()):
            self._hf_paged.hand_over(f"its own generate asks models inside it; patch model.{', model.'.join(inside)}")

    def _leaves_weights_alone(self, kwargs: dict[str, Any]) -> bool:
        """Whether stock's own code alone runs from here to `_prepare_cache_for_generation`, if it gets there."""
        is_stock = self._hf_paged_original.generate is GenerationMixin.generate
        is_given = any(kwargs.get(name) is not None for name in compat.CACHE_NAMES)
        return is_stock and not is_given and not kwargs.get("custom_generate")

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        salt = model_kwargs.pop("cache_salt", None)
        if salt is not None and not isinstance(salt, str):
            raise ValueError(f"cache_salt must be a string, got {type(salt).__name__}")
        super()._validate_model_kwargs(model_kwargs)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> Any:
        """Images are encoded when the model asks for their features: not where a prompt is found again."""
        prepare = super()._prepare_multimodal_encoder_kwargs_for_generation
        stock = GenerationMixin._prepare_multimodal_encoder_kwargs_for_generation
        if self.training or prepare.__func__ is not stock:
            return prepare(model_kwargs)
        return encoded_later(self, stock, model_kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> Any:
        expand = partial(super()._expand_inputs_for_generation, expand_size, is_encoder_decoder, input_ids)
        if expand_size == 1 or input_ids is None:
            return expand(**model_kwargs)
        _ALONE.set(Alone(*input_ids.shape, {name: copied(value) for name, value in model_kwargs.items()}))
        later = _ALONE.get().arguments.get("mm_encoder_outputs")
        if not isinstance(later, EncodedLater):
            return expand(**model_kwargs)
        embeds = model_kwargs.get("inputs_embeds")
        repeat = partial(self._expand_multimodal_outputs, input_ids, expand_size=expand_size, inputs_embeds=embeds)
        ids, expanded = expand(**{**model_kwargs, "mm_encoder_outputs": None})
        return ids, {**expanded, "mm_encoder_outputs": later.repeated(repeat)}

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        model_kwargs.pop("cache_salt", None)
        asked, salt = _ASKED.get(), _SALT.get()
        if asked is not None:
            asked.append(self)
        chosen = (
            model_kwargs.get(CACHE_NAME) is not None
            or generation_config.cache_implementation is not None
            or generation_config.use_cache is False
            or asked is None  # a call that has begun before the model was patched
            or self._hf_paged.is_leaving
        )
        arguments = (generation_config, model_kwargs, generation_mode, *args)
        if chosen:
            if isinstance(model_kwargs.get(CACHE_NAME), PagedCache):
                self._hf_paged.check_root(model_kwargs[CACHE_NAME], salt)
            return super()._prepare_cache_for_generation(*arguments, **kwargs)
        result, obstacle = None, self._paged_obstacle(model_kwargs)
        if obstacle is not None or self.config.is_encoder_decoder:
            result = super()._prepare_cache_for_generation(*arguments, **kwargs)
            if obstacle is None and not compat.is_plain_pair(model_kwargs.get(CACHE_NAME)):
                obstacle = "model keeps a cache of its own"
        if obstacle is not None:
            self._hf_paged.hand_over(obstacle)
            return result
        room_tokens = min(generation_config.max_new_tokens or MAX_ROOM_TOKENS, MAX_ROOM_TOKENS)
        try:
            model_kwargs[CACHE_NAME] = cache = self._hf_paged.new_cache(room_tokens, salt, _BEGUN.get())
        except PoolInUseError as error:
            self._hf_paged.hand_over(str(error))
        else:
            paged_part(cache).alone = _ALONE.get()
            if generation_config.is_assistant or generation_mode == GenerationMode.ASSISTED_GENERATION:
                paged_part(cache).activate_past_recording()  # guesses will be taken back
        if self.config.is_encoder_decoder:
            return result
        return super()._prepare_cache_for_generation(*arguments, **kwargs)

    def _paged_obstacle(self, model_kwargs: dict[str, Any]) -> str | None:
        """Why `generate` is left to stock, or `None`."""
        foreign = [name for name in _ENCODED if model_kwargs.get(name) is not None]
        if foreign and not self.config.is_encoder_decoder:  # trocr and others put its K and V where text has its own
            return f"argument {foreign[0]}, of an encoder that is not the model's"
        if not compat.uses_dynamic_cache(self):
            return "model keeps a cache of its own"
        own = self.__dict__.get("prepare_inputs_for_generation")
        # PEFT leaves the model's own there, when it takes back what a call with a learnt prompt has put there.
        if own is not None and own != MethodType(type(self).prepare_inputs_for_generation, self):
            return "prepare_inputs_for_generation was replaced on the instance"
        if compat.takes_ids_by_turns(self):
            return "input embeddings that take token ids by turns"
        return self._hf_paged.unfit(super().__call__)

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        cache = paged_part(model_kwargs.get(CACHE_NAME))
        if cache is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        try:
            return self._packed_prefill(cache, input_ids, generation_config, model_kwargs, *args, **kwargs)
        except UnsupportedAttentionError:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        except ForeignKVError:
            if not self._takes_stock_cache(cache, model_kwargs):
                raise
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            cache.prefilling = False

    def _takes_stock_cache(self, cache: PagedCache, model_kwargs: dict[str, Any]) -> bool:
        """Put stock's cache in the place of `cache` if its first pass was given K and V that it cannot hold.

        Git puts K and V of an image before those of text, dia has other heads for an encoder.
        """
        if cache.held_by_user or cache.dense_len > 0:
            return False
        self._hf_paged.hand_over("K and V that blocks for text cannot hold")
        renew = compat.stock_pair if self.config.is_encoder_decoder else compat.stock_cache
        model_kwargs[CACHE_NAME] = renew(self.config)
        return True

    def _packed_prefill(
        self,
        cache: PagedCache,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The prompt in one call; `prefill_chunk_size` then cuts the packed tokens instead of the columns.

        Stock's chunks of columns would tear apart what rows of unequal length share. As many tokens go through the
        model at a time. Raises `UnsupportedAttentionError` where the prompt must be cut as stock does.
        """
        chunk_size = generation_config.prefill_chunk_size
        if chunk_size is not None and self._may_cut_tokens(cache, chunk_size, input_ids, model_kwargs):
            cache.chunk_tokens = chunk_size * input_ids.shape[0]
            generation_config = copy(generation_config)
            generation_config.prefill_chunk_size = None
        try:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            cache.chunk_tokens = None

    def _may_cut_tokens(
        self, cache: PagedCache, chunk_size: int, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]
    ) -> bool:
        """Whether chunks of packed tokens come to the same as stock's chunks of columns.

        Those cut the token ids whatever the prompt is given as, the mask even where it is the encoder's, and position
        ids from the first column on.
        """
        columns = (input_ids.shape[1], input_ids.shape[1] + cache.dense_len)  # with or without what is cached
        given = [model_kwargs.get(name) for name in ("attention_mask", "position_ids")]
        return (
            chunk_size > 0
            and model_kwargs.get("inputs_embeds") is None
            and all(each is None or each.shape[-1] in columns for each in given)
        )

    @wraps(GenerationMixin._sample)
    def _sample(self, input_ids: torch.LongTensor, **kwargs: Any) -> Any:
        cache, config = paged_part(kwargs.get(CACHE_NAME)), kwargs["generation_config"]
        criteria = kwargs["stopping_criteria"]
        ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        if cache is not None and ends_rows and not config.return_dict_in_generate and not cache.held_by_user:
            kwargs["stopping_criteria"] = FinishedRows(criteria, cache)
        return self._paged_decoding(super()._sample, input_ids, kwargs)

    @wraps(GenerationMixin._beam_search)
    def _beam_search(self, input_ids: torch.LongTensor, **kwargs: Any) -> Any:
        return self._paged_decoding(super()._beam_search, input_ids, kwargs)

    @wraps(GenerationMixin._assisted_decoding)
    def _assisted_decoding(self, input_ids: torch.LongTensor, **kwargs: Any) -> Any:
        decode = super()._assisted_decoding

        def retrying(input_ids: torch.LongTensor, **kwargs: Any) -> Any:
            """As `_prefill`, of which this loop makes no use; the first guesses are drawn anew."""
            go_back = way_back(self)
            try:
                return decode(input_ids, **kwargs)
            except ForeignKVError:
                if not self._takes_stock_cache(paged_part(kwargs[CACHE_NAME]), kwargs):
                    raise
                go_back()
                return decode(input_ids, **kwargs)

        return self._paged_decoding(retrying, input_ids, kwargs, assisted=True)

    def _paged_decoding(
        self, decode: Callable[..., Any], input_ids: torch.LongTensor, kwargs: dict[str, Any], assisted: bool = False
    ) -> Any:
        """Run a decoding loop; whatever happens in it, no block stays behind unless the caller holds the cache."""
        given, config = kwargs.get(CACHE_NAME), kwargs["generation_config"]
        cache = paged_part(given)
        if cache is None:
            if (asked := _ASKED.get()) == []:
                asked.append(self)
                self._hf_paged.hand_over("its own generate makes no cache for it")
            return decode(input_ids, **kwargs)
        if not assisted:
            for name in _TOKENIZERS & kwargs.keys() - compat.forward_arguments(self):
                del kwargs[name]
        runtime = self._hf_paged  # the loop may have the model patched anew
        cache.generating, cache.prefilling, cache.assisted = True, True, assisted
        cache.fell_back = cache.reads_blocks = False
        cache.capability = cache.circumstances = cache.standing = None
        try:
            result = decode(input_ids, **kwargs)
            cache.held_by_user |= bool(config.return_dict_in_generate)
            cache.end_answers()
            if cache.owner is None:
                runtime.hand_over(CACHE_UNUSED)
        finally:
            cache.generating = cache.prefilling = cache.assisted = False
            try:
                if not cache.held_by_user:
                    given.release()
            finally:
                runtime.mend()
        runtime.counters.add(generated_tokens=_count_generated(result, input_ids.shape[1], config))
        return result

    # -- copies and files see the original class ------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the original class, loadable without hf_paged; the name of its attention does the same."""
        state = {name: value for name, value in self.__dict__.items() if name != RUNTIME_ATTRIBUTE}
        return object.__new__, (self._hf_paged_original,), state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A patched copy with a runtime of its own."""
        from hf_paged.patch import patch_model

        twin = self._hf_paged_original.__new__(self._hf_paged_original)
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            if name != RUNTIME_ATTRIBUTE:
                twin.__dict__[name] = deepcopy(value, memo)
        return patch_model(twin, self.paged.config) if hasattr(self, "paged") else twin


def _count_generated(result: Any, prompt_tokens: int, config: GenerationConfig) -> int:
    """New tokens in the result of a decoding loop, each row up to and including its end-of-sequence token."""
    sequences = result if isinstance(result, torch.Tensor) else result.sequences
    new = sequences[:, prompt_tokens:]
    end_ids = getattr(config, "_eos_token_tensor", None)
    if end_ids is None or new.numel() == 0:
        return new.numel()
    ends = torch.isin(new, end_ids.to(new.device))
    return int(((ends.cumsum(dim=1) - ends.long()) == 0).sum())
