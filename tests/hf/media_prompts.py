"""Prompts with images, and pairs of models that have seen some; what older versions lack is skipped."""

import functools

import more_models
import torch
from more_models import VISION_LANGUAGE, image_prompt
from pair import Pair
from versions import skip_if_older

from hf_paged import compat
from hf_paged.forward import TOKEN_TYPES

NEW = 10
NAMES = [name for name in VISION_LANGUAGE if name != "mllama"]  # which stays on stock


def skip_where_inputs_have_no_names() -> None:
    """Older versions do not say which inputs are dropped behind a prompt: nothing is found again there."""
    if not compat.MEDIA_INPUTS:
        skip_if_older("this version does not name the inputs that are dropped behind a prompt")


def followed_by(inputs: dict, ids: torch.Tensor, last: list[int]) -> dict:
    """`inputs` with `ids [1, tokens]` in place of theirs, and some tokens of text behind these."""
    ids = torch.cat([ids, torch.tensor([last])], dim=1)
    longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in set(TOKEN_TYPES) & inputs.keys():
        longer[name] = torch.cat([inputs[name], inputs[name].new_zeros(1, ids.shape[1] - inputs[name].shape[1])], dim=1)
    return longer


def both(name: str, first: dict, second: dict) -> dict:
    """Two prompts with an image each as one with two."""
    joined = {key: torch.cat([first[key], second[key]], dim=1) for key in first if first[key].shape[:1] == (1,)}
    for key in {"pixel_values", "image_grid_thw"} & first.keys():
        joined[key] = torch.cat([first[key], second[key]], dim=1 if name == "idefics3" else 0)
    return joined


def then(name: str, inputs: dict, ids: torch.Tensor, image: int) -> dict:
    """The next turn of a chat: `ids [1, tokens]` in place of those of `inputs`, and behind them text and an image."""
    return both(name, followed_by(inputs, ids, [5]), image_prompt(name, [(9, 7, image + 30)], images=[image]))


def prompt(name: str, image: int = 0, seed: int = 1) -> dict:
    skip_where_inputs_have_no_names()
    return image_prompt(name, [(20, 12, seed)], images=[image])


def text_of(name: str) -> int:
    """Tokens of `prompt` before all that stand for its image; with some models marks do."""
    return 21 if name == "qwen2_5_vl" else 20


def images_of(arguments: dict) -> int:
    """How many images the arguments of an encoder are."""
    grid, pixels = arguments.get("image_grid_thw"), arguments.get("pixel_values")
    if grid is not None:
        return len(grid)
    return pixels.shape[1] if pixels.dim() == 5 else len(pixels)


def mix_images(monkeypatch, pair: Pair) -> None:
    """Have the encoder add something of all of a call's images to the features of each."""
    kind = type(pair.model.base_model)
    encode = kind.get_image_features

    @functools.wraps(encode)
    def mixing(self, *args, **kwargs):
        output = encode(self, *args, **kwargs)
        total = sum(each.mean(dim=0) for each in output.pooler_output)
        mixed = [each + total for each in output.pooler_output]
        output.pooler_output = torch.stack(mixed) if isinstance(output.pooler_output, torch.Tensor) else tuple(mixed)
        return output

    monkeypatch.setattr(kind, "get_image_features", mixing)


def tried(name: str, **settings) -> tuple[Pair, dict]:
    """A pair whose model was found to compute prompts with images in two pieces as in one; its pool has the prompt."""
    pair, inputs = Pair.of(more_models.build(name), **settings), prompt(name)
    pair.ask(inputs, max_new_tokens=NEW)
    pair.ask(followed_by(inputs, inputs["input_ids"], [5, 6]), max_new_tokens=NEW)
    assert pair.reused == 0, "computed both ways"
    return pair, inputs
