"""Nothing stale is ever reused: inputs that token ids do not describe leave nothing behind, and find nothing."""

import pytest
import torch
from pair import ROWS, Pair, eager, piece


def embedded(model):
    torch.manual_seed(3)
    return torch.randn(1, 27, 64)


def four_dimensions(_):
    mask = torch.full((27, 27), torch.finfo(torch.float32).min).triu(1)
    mask[20:, 3:9] = torch.finfo(torch.float32).min
    return mask[None, None]


def with_holes(_):
    mask = torch.ones(1, 27, dtype=torch.long)
    mask[0, 5:9] = 0
    return mask


IDS = {"input_ids": torch.tensor([ROWS[0]])}
ODD = {
    "inputs_embeds": ({**IDS}, {"inputs_embeds": embedded}),
    "position_ids": (IDS, {"position_ids": lambda model: torch.arange(27)[None] * 2 + 3}),
    "later_positions": (IDS, {"position_ids": lambda model: torch.arange(27)[None] + 5}),
    "hidden_states": (IDS, {"output_hidden_states": True, "return_dict_in_generate": True}),
    "attentions": (IDS, {"output_attentions": True, "return_dict_in_generate": True}),
    "holes": (IDS, {"attention_mask": with_holes}),
    "right_padded": (IDS, {"attention_mask": lambda model: (torch.arange(27) < 20).long()[None]}),
    "no_cache": (IDS, {"use_cache": False}),
    "static": (IDS, {"cache_implementation": "static"}),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_calls_that_ids_do_not_describe_leave_nothing_wrong(name, odd):
    pair = Pair(name, wrap=(eager) if odd == "attentions" else lambda model: model)
    inputs, how = ODD[odd]
    for _ in range(2):
        pair.ask(inputs, **how)
        if odd != "holes":  # without what is masked, those are plain tokens
            assert pair.reused == 0
    cold = pair.ask(IDS)
    if odd != "holes":
        assert pair.reused == 0, "what the odd calls computed is not what plain ids mean"
    pair.ask(inputs, **how)
    assert pair.reused == 0 or odd == "holes"
    assert torch.equal(pair.ask(IDS), cold)
    assert pair.reused == 26
    pair.ask([ROWS[0][:5] + ROWS[0][9:]])


def test_a_custom_mask_of_four_dimensions():
    """Through `model(...)` and one's own loop, which is where transformers takes such masks."""
    pair = Pair()
    results = []
    for model in (pair.stock, pair.model):
        output = model.generate(**IDS, do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
        cache = output.past_key_values
        cache.crop(-(cache.get_seq_length() - 1) if cache.get_seq_length() > 1 else 0)
        mask = four_dimensions(model)[:, :, 1:, :]
        with torch.no_grad():
            logits = model(IDS["input_ids"][:, 1:], attention_mask=mask, past_key_values=cache).logits
        results.append(logits)
        del output, cache
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-3)
    pair.ask(IDS)
    pair.ask(IDS, max_new_tokens=20)


def test_a_loop_of_ones_own_leaves_nothing():
    """A returned cache that plain `model(...)` calls go on with may be fed anything."""
    pair = Pair()
    output = pair.model.generate(**IDS, do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
    cache, told = output.past_key_values, output.sequences[0].tolist()
    with torch.no_grad():
        for token in piece(8, 5):
            pair.model(torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[3]]))
    following = pair.model.generate(
        torch.tensor([[*told[:-1], *piece(8, 5), 9]]), past_key_values=cache, do_sample=False, max_new_tokens=9
    )
    del output, cache
    pair.ask([told[:-1] + piece(8, 5) + [9]])
    assert pair.reused <= 28
    pair.ask([following[0].tolist()])


def test_a_prompt_of_embeddings_hides_its_ids():
    """Where ids and embeddings are both given, the embeddings count."""
    pair = Pair()
    pair.ask(IDS)
    pair.ask({**IDS, "inputs_embeds": embedded(None)})
    assert pair.reused == 0
    pair.ask(IDS)
    assert pair.reused == 26
