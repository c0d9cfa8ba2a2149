"""Ways in which something foreign could have come into the prefix index, or gone wrong beside it."""

import copy
import json

import numpy as np
import pytest
import torch
from compare import copy_of
from families import FAMILIES
from pair import Pair, piece
from peft import LoraConfig, get_peft_model
from prompts import batch
from transformers import LogitsProcessor

from hf_paged import PagedCache, patch_model


def with_lora(model):
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)).eval()


@pytest.mark.parametrize("number", [float, np.float64, torch.tensor])
def test_a_scaling_of_any_type_is_seen(number):
    pair = Pair(wrap=with_lora)
    row = [piece(21, 1)]

    def scale(model, value):
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", number(value))

    for value in (0.5, 1.5, 3.0):
        for model in (pair.stock, pair.model):
            scale(model, value)
        pair.ask(row)
        assert pair.reused == 0, value


def test_one_token_at_a_position_of_its_own_is_no_ordinary_beginning():
    pair = Pair()
    inputs = {"input_ids": torch.tensor([[42]]), "position_ids": torch.tensor([[70]])}
    answer = pair.ask(inputs, max_new_tokens=30)
    pair.ask([answer[0, :28].tolist()])
    assert pair.reused == 0


def test_clear_reaches_caches_that_are_held():
    pair = Pair()
    row = piece(30, 1)
    held = pair.model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=4, return_dict_in_generate=True)

    def edit(model):
        weight = model.model.layers[0].self_attn.k_proj.weight
        weight.data.view(-1)[5] += 30.0  # an element that is not in the sample

    pair.both(edit)
    pair.paged.clear()
    longer = [*held.sequences[0].tolist(), 5, 6, 7]
    pair.model.generate(
        torch.tensor([longer]), past_key_values=held.past_key_values, do_sample=False, max_new_tokens=20
    )
    del held
    pair.ask([longer])
    assert pair.reused == 0


def test_what_a_user_does_to_a_returned_tensor_stays_with_the_user():
    pair = Pair()
    row = piece(30, 1)
    held = pair.model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    for layer in held.past_key_values.layers:
        layer.keys.zero_()
        layer.values.zero_()
    del held
    pair.ask([row])
    assert pair.reused == 29


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.float32])
def test_positions_of_any_type_keep_rows_and_calls_apart(dtype):
    pair = Pair()
    ids = torch.tensor([piece(19, 1)] * 3)
    for steps, offsets in (((1, 2, 1), (0, 0, 3)), ((3, 1, 1), (0, 0, 1))):
        rows = [torch.arange(19) * step + offset for step, offset in zip(steps, offsets, strict=True)]
        pair.ask({"input_ids": ids, "position_ids": torch.stack(rows).to(dtype)})
    if dtype.is_floating_point:
        halves = torch.arange(19).to(dtype) / torch.tensor([[2.0], [3.0], [1.0]])
        pair.ask({"input_ids": ids, "position_ids": halves})
    pair.ask({"input_ids": ids})
    assert pair.reused == (0 if dtype.is_floating_point else 3 * 16), "the first row of one call was as usual"


@torch.no_grad()
def test_rows_without_position_ids_have_those_that_stock_gives_them():
    pair = Pair()
    ids = torch.tensor([piece(12, 1), [*piece(12, 1)[:9], 5, 6, 7]])
    cache = PagedCache(pair.model.config, block_size=8)
    ours = pair.model(ids, past_key_values=cache, logits_to_keep=1)
    stock = pair.stock(ids, logits_to_keep=1)
    torch.testing.assert_close(ours.logits, stock.logits, atol=1e-4, rtol=0)
    more = torch.tensor([[9], [10]])
    ours = pair.model(more, past_key_values=cache)
    stock = pair.stock(more, past_key_values=stock.past_key_values)
    torch.testing.assert_close(ours.logits, stock.logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("columns", [[0], [0, 2], [-1]])
def test_logits_of_chosen_columns(columns):
    pair, rows, columns = Pair(), {}, torch.tensor(columns)
    for model in (pair.stock, pair.model):
        output = model.generate(torch.tensor([piece(12, 1)]), max_new_tokens=3, return_dict_in_generate=True)
        more = torch.tensor([[9, 10, 11]])
        rows[model] = model(more, past_key_values=output.past_key_values, logits_to_keep=columns).logits
    assert rows[pair.model].shape == rows[pair.stock].shape
    torch.testing.assert_close(*rows.values(), atol=1e-4, rtol=0)


class HookAtStep(LogitsProcessor):
    """Registers a hook that steers the model, in the middle of a call."""

    def __init__(self, model):
        self.model, self.handle, self.step = model, None, 0

    def __call__(self, input_ids, scores):
        self.step += 1
        if self.step == 4:
            layer = self.model.model.layers[0]
            self.handle = layer.register_forward_hook(lambda module, args, output: output * 1.5)
        return scores


def test_a_hook_that_comes_in_the_middle_of_a_call():
    pair = Pair()
    steering = HookAtStep(pair.model)
    answer = pair.model.generate(
        torch.tensor([piece(21, 1)]), do_sample=False, max_new_tokens=30, logits_processor=[steering]
    )
    steering.handle.remove()
    pair.ask([answer[0].tolist()])
    assert pair.reused <= 21


@torch.no_grad()
def test_a_pass_in_chunks_that_fails_before_a_tail_was_copied():
    """Of the first row no tail is shared, so that the copy of the second's is due in the second chunk."""
    pair = Pair()
    inputs = batch([piece(31, 1), piece(26, 2)])
    output = pair.model.generate(**inputs, do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
    cache = output.past_key_values
    twin = copy.deepcopy(cache)
    new = torch.tensor([piece(24, 3), piece(24, 4)])
    longer = {
        "input_ids": torch.cat([output.sequences, new], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(2, 26, dtype=torch.long)], dim=1),
    }
    layer, forward = pair.model.model.layers[-1], pair.model.model.layers[-1].forward

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    layer.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        pair.model.generate(**longer, past_key_values=cache, prefill_chunk_size=10, do_sample=False, max_new_tokens=2)
    layer.forward = forward
    expected = pair.stock.generate(**longer, do_sample=False, max_new_tokens=8)
    for each in (twin, cache):
        answer = pair.model.generate(**longer, past_key_values=each, do_sample=False, max_new_tokens=8)
        assert torch.equal(answer, expected)


def test_a_chat_goes_on_behind_the_prompt_of_samples():
    pair = Pair()
    prompt = piece(27, 1)
    pair.ask([prompt], do_sample=True, num_return_sequences=4, max_new_tokens=20)
    text = prompt
    for turn in range(4):
        text = [*text, *piece(19, 50 + turn)]
        pair.ask([text])
        assert pair.reused >= len(text) - 20, turn


def test_rows_that_come_back_after_they_ended_are_given_back_again():
    """A padded pass computes every row, also those that had ended."""
    model = patch_model(copy_of(FAMILIES["llama"]), block_size=8)
    ids = torch.tensor([piece(12, 1), piece(12, 2)])
    output = model.generate(ids, do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
    cache = output.past_key_values
    cache.finish_rows([True, False])
    mask = torch.ones(2, cache.dense_len + 1, dtype=torch.long)
    with torch.no_grad():
        model(output.sequences[:, -1:], past_key_values=cache, attention_mask=mask, output_attentions=True)
    model.paged._pool.manager.check_integrity()
    del cache, output
    assert model.paged.stats().blocks_in_use == 0


@pytest.mark.parametrize("cache", [lambda config: PagedCache(config, block_size=8), lambda config: None])
def test_a_draft_has_the_salt_of_the_call_whatever_cache_that_brings(cache):
    pair = Pair()
    draft = patch_model(copy_of(FAMILIES["llama"]), block_size=8)
    ids = torch.tensor([piece(21, 1)])
    pair.model.generate(
        ids,
        past_key_values=cache(pair.model.config),
        assistant_model=draft,
        cache_salt="b",
        do_sample=False,
        max_new_tokens=6,
    )
    draft.paged.reset_stats()
    draft.generate(ids, do_sample=False, max_new_tokens=2)
    assert draft.paged.stats().reused_tokens == 0


def test_saving_leaves_other_files_alone(tmp_path):
    mine = tmp_path / "layer-of-mine.safetensors"
    mine.write_bytes(b"mine")
    pair = Pair()
    for name in (1, 2):
        pair.ask([piece(21, name)])
        pair.paged.save(tmp_path)
    assert mine.read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 3 + pair.model.config.num_hidden_layers


def test_a_config_with_many_labels_can_be_saved_and_loaded(tmp_path):
    pair = Pair()
    pair.model.config.id2label = {i: f"label {i}" for i in range(12)}
    pair.ask([piece(21, 1)])
    written = pair.paged.save(tmp_path)
    pair.paged.clear()
    assert pair.paged.load(tmp_path) == written


def test_another_scaling_in_the_modules_is_other_weights(tmp_path):
    pair = Pair()
    pair.ask([piece(21, 1)])
    pair.paged.save(tmp_path)
    for layer in pair.model.model.layers:
        layer.self_attn.scaling = 0.9
    with pytest.raises(ValueError, match="other weights"):
        pair.paged.load(tmp_path)


def test_another_attention_is_named(tmp_path):
    pair = Pair()
    pair.ask([piece(21, 1)])
    pair.paged.save(tmp_path)
    other = copy_of(FAMILIES["llama"])
    other.set_attn_implementation("eager")
    other = patch_model(other, block_size=8)
    with pytest.raises(ValueError, match=r"circumstances.*eager"):
        other.paged.load(tmp_path)


def test_a_manifest_that_is_no_manifest(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps([1, 2]))
    pair = Pair()
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        pair.paged.load(tmp_path)
