"""Everything that depends on transformers' private names or on its version."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from transformers.generation import GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.generation.candidate_generator import _MapInputEmbedding
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils.deprecation import deprecate_kwarg

# What models and their outputs call the cache: the second until transformers 5.24, which takes it with a warning.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
OLD_CACHE_NAMES = CACHE_NAMES[CACHE_NAMES.index(CACHE_NAME) + 1 :]  # that are taken with a warning
_ATTENTION_REGISTERED = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
# The function that asks for torch's attention, and its arguments that it refuses, or takes for a mask.
SDPA_ATTENTION, BEYOND_SDPA = sdpa_attention_forward, ("position_bias", "softcap", "output_attentions")
# The argument of gemma4's forward that asks for K and V, on which its draft models work.
KV_WANTED = "return_shared_kv_states"
# What configs say about the K and V of a layer.
KV_FIELDS = ("num_hidden_layers", "num_key_value_heads", "num_attention_heads", "head_dim", "hidden_size")
# Layers of transformers' own cache that have no K and V: a state, or nothing at all. The last kinds are newer.
_STATE_LAYERS = (LinearAttentionLayer,)
_NO_KV = tuple(filter(None, [getattr(cache_utils, "DummyLayer", None)]))
_STATE_AND_KV_LAYERS = (
    LinearAttentionAndFullAttentionLayer,
    *filter(None, [getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", None)]),
)


def given_cache(kwargs: dict[str, Any]) -> object:
    """The cache among a call's arguments; by the name of today where it has two, as stock takes it."""
    return next((kwargs[name] for name in (CACHE_NAME, *OLD_CACHE_NAMES) if name in kwargs), None)


def named_as_today(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments with the cache by the name of today, with stock's own warning where that is another one.

    As they are where the model's forward does not rename it so itself: code from the hub may know an old name only.
    """
    known = forward_arguments(model)
    if CACHE_NAME not in known or not known.isdisjoint(OLD_CACHE_NAMES):
        return kwargs

    def forward(self: PreTrainedModel, **kwargs: Any) -> dict[str, Any]:  # the warning says so
        return kwargs

    for name in OLD_CACHE_NAMES:
        forward = deprecate_kwarg(name, "5.40.0", new_name=CACHE_NAME)(forward)
    return forward(model, **kwargs)


def can_generate(model: object) -> bool:
    """Whether `model` is a transformers model with a working `generate`."""
    return isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin) and model.can_generate()


@dataclass(frozen=True)
class CacheLayout:
    """What the layers of transformers' own cache of a model keep.

    Attributes:
        windows: of each layer that keeps K and V, the sliding window; `None` for full attention.
        places: for each layer of the cache its number among those, `None` where it keeps no K and V.
        has_states: whether some layer keeps a convolutional or recurrent state.
    """

    windows: list[int | None]
    places: list[int | None]
    has_states: bool


def cache_layout(config: PreTrainedConfig) -> CacheLayout:
    """The layout of the cache that stock `generate` makes for `config`.

    Raises `ValueError` naming the layer type where a layer keeps anything else than K and V of past tokens or a state,
    or where none keeps K and V.
    """
    layers = DynamicCache(config=config).layers
    windows: list[int | None] = []
    places: list[int | None] = []
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, *_STATE_LAYERS, *_STATE_AND_KV_LAYERS, *_NO_KV):
            raise ValueError(f"config: layer {index} keeps a {type(layer).__name__}, which is not made of KV blocks")
        keeps_kv = isinstance(layer, DynamicLayer)
        if getattr(layer, "sliding_window", None) == 1:
            raise ValueError(f"config: layer {index} has a window of 1 token, of which stock's own cache keeps all")
        places.append(len(windows) if keeps_kv else None)
        if keeps_kv:
            windows.append(getattr(layer, "sliding_window", None))
    if not windows:
        raise ValueError("config: no layer keeps K and V of past tokens")
    return CacheLayout(windows, places, any(keeps_state(layer) for layer in layers))


def stock_cache(config: PreTrainedConfig) -> DynamicCache:
    """A new cache as stock `generate` makes it for a decoder."""
    return DynamicCache(config=config.get_text_config(decoder=True))


def stock_pair(config: PreTrainedConfig) -> EncoderDecoderCache:
    """A new cache as stock `generate` makes it for an encoder-decoder model."""
    return EncoderDecoderCache(stock_cache(config), stock_cache(config))


def local_tokens(model: PreTrainedModel, text: str) -> list[int] | None:
    """`text` in the tokens of a model whose tokenizer lies beside its weights, or in the cache; else `None`."""
    source = model.config._name_or_path
    if not source:
        return None
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)(text)["input_ids"]
    except Exception:  # transformers and the hub raise many kinds
        return None


def kept_tokens(cache: DynamicCache) -> list[int]:
    """Number of tokens whose K and V each layer holds, of those that hold any."""
    return [layer.keys.shape[-2] for layer in cache.layers if getattr(layer, "keys", None) is not None]


def token_bytes(cache: DynamicCache) -> list[int]:
    """Bytes of one token's K and V, as attention takes them, in each layer that is made to hold some."""
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    ones = [[] if layer.keys is None else [layer.keys[:1, :, :1], layer.values[:1, :, :1]] for layer in layers]
    return [sum(tensor.nbytes for tensor in as_attended(*one)) if one else 0 for one in ones]


def added_layers(cache: DynamicCache, layout: CacheLayout) -> str | None:
    """What a pass has added to its cache, or `None`: dory puts copies of layers there, for each time it runs them."""
    count = len(cache.layers) - len(layout.places)
    return f"the model adds {count} layers to its cache" if count else None


def idle_layer(places: list[int | None], layer_bytes: Sequence[int]) -> str | None:
    """Which layer keeps no K and V although it is made to, or `None`. `places` are those of a `CacheLayout`."""
    return f"layer {places.index(layer_bytes.index(0))} keeps no K and V of text" if 0 in layer_bytes else None


def keeps_state(layer: object) -> bool:
    """Whether a cache layer keeps a convolutional or recurrent state."""
    return isinstance(layer, LinearAttentionLayer)


def init_state(layer: Any, like: Any) -> None:
    """Give a layer the attributes of an empty state, as many as the stock layer `like` has."""
    count = {"number_of_states": like.number_of_states} if hasattr(like, "number_of_states") else {}
    LinearAttentionLayer.__init__(layer, **count)


def fill_layer(layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
    """Put K and V `[batch, kv_heads, tokens, dim]` into a new layer, as what is left of `seen` tokens."""
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = seen


class LayoutMemo:
    """`cache_layout` of one model, found again only where the config's content has changed."""

    def __init__(self) -> None:
        self._config: dict[str, Any] | None = None
        self._layout: CacheLayout | None = None

    def of(self, config: PreTrainedConfig) -> CacheLayout:
        """The layout of `config`; raises as `cache_layout` does."""
        if self._layout is None or self._config != config.__dict__:
            self._layout = cache_layout(config)
            self._config = copy.deepcopy(config.__dict__)
        return self._layout


def uses_dynamic_cache(model: PreTrainedModel) -> bool:
    """Whether stock `generate` would give this model a `DynamicCache`."""
    return model._supports_default_dynamic_cache() and "mamba" not in type(model).__name__.lower()


def takes_ids_by_turns(model: PreTrainedModel) -> bool:
    """Whether the input embeddings look up all tokens in one pass, and in the next ones the last token alone.

    `generate` puts such into draft models with other tokenizers. Every pass counts, also one that tries something out.
    """
    return any(isinstance(module, _MapInputEmbedding) for module in model.modules())


def is_plain_pair(cache: object) -> bool:
    """Whether `cache` is what stock `generate` makes for an encoder-decoder model by default."""
    return type(cache) is EncoderDecoderCache and all(
        type(each) is DynamicCache for each in (cache.self_attention_cache, cache.cross_attention_cache)
    )


def estimated_kv_elements(config: PreTrainedConfig) -> int:
    """Estimate of the elements of K and V of one token in one layer, from the usual config fields."""
    named = {name: _in_layers(config, name) for name in KV_FIELDS}
    heads, kv_heads, dim, width = (
        max((value for value in named[name] if value), default=None)
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    )
    heads = heads or 1
    return 2 * (kv_heads or heads) * (dim or (width or heads * 64) // heads)


def _in_layers(config: PreTrainedConfig, name: str) -> tuple[Any, ...]:
    """The field's value, or that of each layer where a config says that layers differ in it."""
    try:
        return (getattr(config, name, None),)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError, which older versions do not have
        return tuple(getattr(layer, name, None) for layer in config.per_layer_config)


def load_config(source: str, **kwargs: Any) -> PreTrainedConfig:
    """The config that a hub id, a folder or a file names; code that comes with it is not run."""
    return AutoConfig.from_pretrained(source, trust_remote_code=False, **kwargs)


def load_weights(kind: type[PreTrainedModel], source: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of class `kind` with the weights of a folder or hub id; the hub is asked where they are not here."""
    try:
        return kind.from_pretrained(source, dtype=dtype, local_files_only=True)
    except OSError:
        return kind.from_pretrained(source, dtype=dtype)


def config_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype of the weights as far as the config, or that of its decoder, names it."""
    named = config.dtype or config.get_text_config(decoder=True).dtype
    return getattr(torch, named) if isinstance(named, str) else named


def generating_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that a config's weights are generated with, or `None`: encoders, classifiers."""
    kinds = [getattr(transformers, name) for name in config.architectures or () if hasattr(transformers, name)]
    fills_gaps = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
    if not kinds and not (fills_gaps and getattr(config, "is_decoder", True) is False):
        kinds = [MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)]
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, GenerationMixin) and kind.can_generate():
            return kind
    return None


def is_transformers_class(kind: type) -> bool:
    """Whether making an object of the class does what transformers' models do and nothing else."""
    return kind.__module__.startswith("transformers.models.")


def build_on_meta(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model in bfloat16 without weights or memory; attention that every model has, in a config of its own."""
    own = copy.deepcopy(config)
    own._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return kind(own).eval().to(torch.bfloat16)


def kv_shape(config: PreTrainedConfig) -> tuple[tuple[int | None, ...], ...]:
    """Layers, KV heads and dim, as far as the config names them; several where layers differ."""
    return tuple(_in_layers(config, name) for name in KV_FIELDS)


def compute_device(model: PreTrainedModel) -> torch.device:
    """Where the model's first layer computes: accelerate's hooks bring weights there that lie elsewhere until then."""
    return next(execution_devices(model), model.device) if model.device.type == "meta" else model.device


def execution_devices(model: PreTrainedModel) -> Iterator[torch.device]:
    """Where accelerate's hooks have modules computed."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            yield torch.device(device)


def attention_configs(model: PreTrainedModel) -> Iterator[PreTrainedConfig]:
    """The distinct configs of the submodels whose attention goes through the attention interface."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            if module._can_set_attn_implementation():
                yield module.config


def attention_name(config: PreTrainedConfig) -> str | None:
    """The attention implementation that a config names."""
    return config._attn_implementation


def set_attention_name(config: PreTrainedConfig, name: str) -> None:
    """Name an attention implementation in one config, leaving its sub-configs alone."""
    config._attn_implementation_internal = name


def register_attention(name: str, function: Callable[..., Any], original: str) -> None:
    """Register an attention function; its masks are those of the implementation `original`, if it has any."""
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, functools.partial(_masks_of, original))


def _masks_of(original: str, *args: Any, **kwargs: Any) -> Any:
    return ALL_MASK_ATTENTION_FUNCTIONS[original](*args, **kwargs)


def original_attention(name: str, module: Any) -> Callable[..., Any]:
    """The attention function `name`; eager attention is the one of the module's own modeling file."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    if function is None:
        raise RuntimeError(f"{type(module).__name__} has no eager attention function to hand over to")
    return function


def attention_functions(name: str, files: Iterable[Any]) -> Iterator[Callable[..., Any]]:
    """What attends and masks where a model whose modeling files are `files` names an implementation of attention."""
    yield from (registered[name] for registered in _ATTENTION_REGISTERED if name in registered)
    if name == "eager":
        yield from (vars(file)["eager_attention_forward"] for file in files if "eager_attention_forward" in vars(file))
    if name == "sdpa":
        yield torch.nn.functional.scaled_dot_product_attention


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on a device, `None` where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if _has_autocast(kind) and torch.is_autocast_enabled(kind) else None


@functools.cache
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def own_forward(model: PreTrainedModel) -> Any:
    """What was put in the place of the model's `forward`: accelerate's, for one, switches autocast on inside."""
    forward = vars(model).get("forward")
    return getattr(forward, "__func__", forward)


def as_attended(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V in the dtype that attention computes in: under autocast, models leave them in different ones."""
    dtype = autocast_dtype(key.device)
    return (key, value) if dtype is None else (key.to(dtype), value.to(dtype))


def checkpoints_gradients(attributes: list[dict[str, Any]]) -> bool:
    """Whether a module, of which the `vars` of each are given, computes its passes again for their gradients."""
    return any(each.get("gradient_checkpointing", False) for each in attributes)


def takes_logits_to_keep(model: PreTrainedModel) -> bool:
    """Whether the model's forward computes the logits of chosen positions only."""
    return "logits_to_keep" in forward_arguments(model)


def takes_position_ids(model: PreTrainedModel) -> bool:
    """Whether the model's forward can be told the positions of its tokens."""
    return "position_ids" in inspect.signature(model.forward).parameters


def forward_arguments(model: PreTrainedModel) -> set[str]:
    """Names of the arguments that the model's forward has a parameter for."""
    return set(inspect.signature(model.forward).parameters)


@functools.cache
def crop_zero_empties() -> bool:
    """Whether `crop(0)` keeps nothing (up to 5.13: the length to keep) or everything (the number to remove)."""
    layer, one = DynamicLayer(), torch.zeros(1, 1, 1, 1)
    layer.update(one, one)
    layer.crop(0)
    return layer.get_seq_length() == 0


# Arguments that are dropped once the tokens that stand for them are computed: what stock does after a prompt.
MEDIA_INPUTS = frozenset(getattr(generation_utils, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ()))

# Attributes that transformers notes on modules in their first pass, and that change nothing of it.
NOTED_ONCE = frozenset(("_output_capturing_hooks_installed",))


def vocabulary_size(config: PreTrainedConfig) -> int:
    """Number of token ids."""
    return config.get_text_config(decoder=True).vocab_size


# The handlers of `transformers serve` by the parameter of `build_server` that takes each; newer versions have more.
_SERVER_HANDLERS = {
    "chat_handler": ("chat_completion", "ChatCompletionHandler"),
    "completion_handler": ("completion", "CompletionHandler"),
    "response_handler": ("response", "ResponseHandler"),
    "transcription_handler": ("transcription", "TranscriptionHandler"),
    "systemone_handler": ("systemone", "SystemOneHandler"),
}
_SERVER_BASICS = {"model_manager", "generation_state", "enable_cors"}


def server_handlers() -> dict[str, type]:
    """The classes of the handlers that this transformers' server is built from, by parameter of `build_server`."""
    from transformers.cli.serving.server import build_server

    names = inspect.signature(build_server).parameters.keys() - _SERVER_BASICS
    if unknown := names - _SERVER_HANDLERS.keys():
        raise RuntimeError(f"the server of transformers {transformers.__version__} has parts not known: {unknown}")
    places = {name: _SERVER_HANDLERS[name] for name in _SERVER_HANDLERS if name in names}
    return {
        name: getattr(importlib.import_module(f"transformers.cli.serving.{module}"), kind)
        for name, (module, kind) in places.items()
    }


def build_server(manager: Any, state: Any, handlers: dict[str, Any], enable_cors: bool) -> Any:
    """The FastAPI application of `transformers serve`."""
    from transformers.cli.serving.server import build_server

    return build_server(model_manager=manager, generation_state=state, enable_cors=enable_cors, **handlers)


def accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that the function has a parameter for."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(function).parameters}
