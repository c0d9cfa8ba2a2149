"""The model that a command is about: found by hub id, folder or config file, and not loaded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from transformers import PreTrainedConfig, PreTrainedModel

from hf_paged import compat
from hf_paged.commands.arguments import UsageError
from hf_paged.core.capacity import GroupCost, group_costs
from hf_paged.footprint import Footprint, footprint
from hf_paged_kernels import KVFormat

ARGUMENT = "MODEL_OR_CONFIG"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """`--dtype`."""
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: what the config says)")


@dataclass(frozen=True)
class Subject:
    """A model that could be generated with.

    Attributes:
        source: what the user named.
        kind: its class.
        config: its config.
        dtype: of its weights.
        dtype_is_known: whether the user or the config has said so.
        cost: what one token takes in each layer.
        groups: the same by group of layers.
        stock_groups: the same on stock's cache, which stores KV as it is.
        has_states: whether some layers keep a state, which is not in these figures.
    """

    source: str
    kind: type[PreTrainedModel]
    config: PreTrainedConfig
    dtype: torch.dtype
    dtype_is_known: bool
    cost: Footprint
    groups: list[GroupCost]
    stock_groups: list[GroupCost]
    has_states: bool


def find_subject(source: str, dtype: torch.dtype | None, kv_format: KVFormat | None = None) -> Subject:
    """The model that `source` names; `UsageError` where there is none that keeps K and V of past tokens in blocks."""
    config = find_config(source, ARGUMENT)
    kind = compat.generating_class(config)
    if kind is None:
        named = ", ".join(config.architectures or [type(config).__name__])
        raise UsageError(
            ARGUMENT,
            f"{source} is {named}, which does not generate; name a model with a language-model head (...ForCausalLM)",
        )
    if config.is_encoder_decoder:
        raise UsageError(
            ARGUMENT,
            f"{source} is an encoder-decoder model: what a sequence takes depends on the encoder's input as well, "
            "which is not reckoned here",
        )
    try:
        layout = compat.cache_layout(config.get_text_config(decoder=True))
    except ValueError as error:
        raise _stays_on_stock(source, str(error).removeprefix("config: ")) from None
    known = dtype or compat.config_dtype(config)
    stock = footprint(kind, config, known or torch.float32)
    try:
        cost = footprint(kind, config, known or torch.float32, kv_format)
    except ValueError as error:
        raise UsageError("--kv-cache-dtype", str(error)) from None
    if cost.added_layers:
        raise _stays_on_stock(source, cost.added_layers)
    if not all(cost.layer_bytes):
        raise _stays_on_stock(source, "it has layers that keep no K and V of text in transformers' cache")
    groups, stock_groups = (group_costs(each.layer_bytes, layout.windows) for each in (cost, stock))
    return Subject(
        source,
        kind,
        config,
        known or torch.float32,
        known is not None,
        cost,
        groups,
        stock_groups,
        layout.has_states,
    )


def _stays_on_stock(source: str, reason: str) -> UsageError:
    return UsageError(ARGUMENT, f"hf_paged leaves {source} on stock's cache: {reason}; there is nothing to plan")


def find_config(source: str, argument: str) -> PreTrainedConfig:
    """The config that `source` names, as `argument`; `UsageError` where there is none."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # else each attempt to reach the hub is a line on stderr
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(argument, f"the folder {source} has no config.json; name one that save_pretrained has written")
    if not path.exists() and (path.suffix == ".json" or source.startswith((".", "/", "~"))):
        raise UsageError(argument, f"there is no file or folder {source}; check the path, or name a hub id")
    found = str(path) if path.exists() else source
    try:
        try:
            return compat.load_config(found, local_files_only=True)
        except OSError:
            if path.exists():
                raise
            return compat.load_config(found)
    except Exception as error:  # transformers and the hub raise many kinds
        raise UsageError(argument, _explain(source, path.exists(), error)) from None


def _explain(source: str, is_local: bool, error: Exception) -> str:
    """What went wrong and what to do, in one line."""
    if "trust_remote_code" in str(error):
        return f"{source} brings code of its own, which is not run here; name a model of a class of transformers"
    said = f"({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
    if is_local:
        return f"{source} is no config of a model that transformers {transformers.__version__} knows {said}"
    return (
        f"{source} is neither a local path nor in the cache, and the hub does not give it; check the name, the network "
        f"(HF_HUB_OFFLINE), and HF_TOKEN for private models {said}"
    )
