"""Attention functions of tests that pass for transformers' own."""

from collections.abc import Callable

from transformers.models.llama import modeling_llama


def as_llamas_own(function: Callable) -> Callable:
    """`function`, as if its code were that of llama's modeling file; what is somebody else's is never left out."""
    function.__code__ = function.__code__.replace(co_filename=modeling_llama.__file__)
    return function
