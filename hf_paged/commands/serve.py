"""Serve a patched model: transformers' OpenAI-compatible server, with prefixes that are computed once, and /metrics."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from hf_paged.commands.arguments import UsageError, add_block_size, add_kv_cache_dtype, memory_budget, merged
from hf_paged.commands.subject import DTYPES, find_config
from hf_paged.config import ATTENTION_BACKENDS, PagedConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

ARGUMENT = "MODEL"
_NEEDED = ("fastapi", "openai", "prometheus_client", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-paged serve`."""
    parser.add_argument("model", metavar=ARGUMENT, help="hub id or folder; requests name it in the same way")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: %(default)s)")
    add_block_size(parser)
    parser.add_argument(
        "--max-memory",
        action="append",
        type=memory_budget,
        metavar="DEVICE=SIZE[,...]",
        help="for KV, as in accelerate: 0=8GiB,cpu=16GiB,disk=50GiB, or JSON; may be repeated (default: what is free)",
    )
    parser.add_argument("--offload-folder", metavar="FOLDER", help="where the disk tier keeps its files")
    parser.add_argument(
        "--attention-backend", choices=ATTENTION_BACKENDS, default="auto", help="as in patch_model (default: auto)"
    )
    add_kv_cache_dtype(parser)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of the weights (default: auto)")
    parser.add_argument("--device", default="auto", help="as in transformers serve: auto, cpu, cuda:0 (default: auto)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--chat-template-kwargs",
        type=_json_object,
        default={},
        metavar="JSON",
        help="for the chat template, such as '{\"enable_thinking\": false}'; from transformers 5.17 on",
    )
    parser.add_argument("--enable-cors", action="store_true", help="answer browsers of any origin")
    parser.add_argument(
        "--log-level", choices=("error", "warning", "info", "debug"), default="warning", help="(default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Load the model and serve it until Ctrl-C."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError("serve", f"needs {', '.join(missing)}; install them with: pip install 'hf-paged[serve]'")
    import uvicorn

    app = make_app(args)
    address = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{args.model} at http://{address}:{args.port}/v1, metrics at /metrics; Ctrl-C ends it", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level=args.log_level)
    return 0


def make_app(args: argparse.Namespace) -> FastAPI:
    """The application, with the model loaded and patched. `UsageError` where an argument cannot be used."""
    from hf_paged.serving.app import PagedModelManager, build_app

    if Path(args.model).expanduser().exists() and set("@:") & set(args.model):
        raise UsageError(ARGUMENT, f"{args.model}: transformers' server reads a revision after @ and a file after :")
    if not args.trust_remote_code:
        find_config(args.model.partition(":")[0].partition("@")[0], ARGUMENT)  # says what is wrong in one line
    transformers.logging.set_verbosity(transformers.logging.log_levels[args.log_level])
    transformers.logging.enable_progress_bar()
    try:
        models = PagedModelManager(
            args.model,
            PagedConfig(
                block_size=args.block_size,
                max_memory=args.max_memory and merged("--max-memory", args.max_memory),
                offload_folder=args.offload_folder,
                attention_backend=args.attention_backend,
                kv_cache_dtype=args.kv_cache_dtype,
            ),
            dtype=args.dtype,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
        )
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        said = next(iter(str(error).splitlines()), "")
        raise UsageError(ARGUMENT, f"{args.model} cannot be served ({type(error).__name__}: {said})") from None
    try:
        return build_app(models, args.chat_template_kwargs, args.enable_cors)
    except RuntimeError as error:
        raise UsageError("serve", str(error)) from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value
