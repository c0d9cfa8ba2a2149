"""What a request body must look like, said before the model sees it: transformers' server looks at field names only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Field -> what it counts in, its least and its greatest value.
_NUMBERS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, float("inf")),
    "top_p": (float, 0, 1),
    "frequency_penalty": (float, -0.99, 2),
    "max_tokens": (int, 1, float("inf")),
    "max_completion_tokens": (int, 1, float("inf")),
    "max_output_tokens": (int, 1, float("inf")),
    "seed": (int, 0, 2**63 - 1),
}
_TEXTS = ("cache_salt", "user", "generation_config", "instructions")
_PARTS_OF_TEXT = ("text", "input_text", "output_text")


def complaint(body: Mapping[str, Any]) -> str | None:
    """What is wrong with a request, naming the field; `None` where nothing is.

    A field that is null counts as left out, as everywhere in this API.
    """
    for name, (kind, least, most) in _NUMBERS.items():
        value = body.get(name)
        allowed = int if kind is int else (int, float)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, allowed) or not least <= value <= most:
            kinds = "an integer" if kind is int else "a number"
            return f"{name} must be {kinds} {_between(least, most)}, got {value!r}"
    for name in _TEXTS:
        if not isinstance(body.get(name), str | None):
            return f"{name} must be a string"
    stops = body.get("stop")
    if not isinstance(stops, str | None) and not _is_list_of(stops, str):
        return "stop must be a string or a list of strings"
    if not isinstance(_parsed(body.get("generation_config") or "{}"), dict):
        return "generation_config must be a JSON object in a string"
    if not _is_logit_bias(body.get("logit_bias") or {}):
        return "logit_bias must be an object of token ids and numbers"
    return None


def chat_complaint(body: Mapping[str, Any]) -> str | None:
    """The same for `/v1/chat/completions`."""
    messages = body.get("messages")
    if not messages or not _is_list_of(messages, dict):
        return "messages must be a list of at least one message"
    for place, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            return f"messages[{place}] has no role"
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str | None) and not (_is_list_of(content, dict) and all(map(_is_part, content))):
            return f"messages[{place}].content must be a string or a list of parts"
        if content is None and not calls:
            return f"messages[{place}] has no content"
        if "tool_calls" in message and not (_is_list_of(calls, dict) and all(map(_is_tool_call, calls))):
            return f"messages[{place}].tool_calls must be a list of calls with the name and arguments of a function"
    return complaint(body)


def completion_complaint(body: Mapping[str, Any]) -> str | None:
    """The same for `/v1/completions`."""
    if not isinstance(body.get("prompt"), str) or not body["prompt"]:
        return "prompt must be a string of at least one character"
    return complaint(body)


def response_complaint(body: Mapping[str, Any]) -> str | None:
    """The same for `/v1/responses`."""
    if not isinstance(body.get("input"), str) and not _is_list_of(body.get("input"), dict):
        return "input must be a string or a list of items"
    return complaint(body) if body["input"] else "input is empty"


def _is_part(part: Mapping[str, Any]) -> bool:
    kind = part.get("type")
    return isinstance(part.get("text"), str) if kind in _PARTS_OF_TEXT else isinstance(kind, str)


def _is_tool_call(call: Mapping[str, Any]) -> bool:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = function.get("arguments")
    return isinstance(_parsed(arguments) if isinstance(arguments, str) else arguments, dict)


def _is_logit_bias(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(str(token).isdecimal() and isinstance(bias, int | float) for token, bias in value.items())


def _parsed(text: str) -> Any:
    """The value of JSON; `None` where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _between(least: float, most: float) -> str:
    return f"of {least:g} or more" if most in (float("inf"), 2**63 - 1) else f"from {least:g} to {most:g}"
