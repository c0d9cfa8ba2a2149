"""Models whose linear layers the native kernel or oneDNN multiplies: where they do, and where nobody must notice."""

import copy
import io
import pickle
import threading

import accelerate
import pytest
import torch
from compare import copy_of
from families import FAMILIES
from pair import Pair
from prompts import tokens
from taken import TOLERANCE, conv1d, faster_pass, layer
from torch import nn
from torch.nn.utils import parametrizations

from hf_paged import faster_layers, linear, onednn, patch_model, unpatch_model

ROWS = [tokens(40, seed=1), tokens(23, seed=2), tokens(31, seed=3)]


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2", "gpt2", "t5", "mixtral", "lfm2"])
def test_same_as_stock(name, products):
    pair = Pair(name)
    pair.ask(ROWS, max_new_tokens=12)
    assert 3 in products, "a step of three rows"
    assert any(rows > 64 for rows in products), "a prompt of three rows"
    assert all(rows <= onednn.PIECE_ROWS for rows in products)
    pair.ask(ROWS, num_beams=3)
    pair.ask(ROWS[:1], do_sample=True, num_return_sequences=4)


def test_logits(products):
    pair = Pair("llama")
    kwargs = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    inputs = torch.tensor([ROWS[0]])
    expected, actual = (model.generate(inputs, **kwargs).logits for model in (pair.stock, pair.model))
    assert products
    torch.testing.assert_close(torch.stack(actual), torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [65, 300, 700, 1200])
def test_prompts_of_many_rows(count, products):
    pair = Pair("llama")
    pair.ask([tokens(count)], max_new_tokens=3)
    pieces = [onednn.PIECE_ROWS] * (count // onednn.PIECE_ROWS)
    filled = {65: 72, 300: 320, 700: 192, 1200: 176}[count]
    assert products[: len(pieces) + 1] == [*pieces, filled]


def test_many_lengths_of_prompts_have_little_code(products):
    """Which is made for each number of rows."""
    one = layer(8, 8)
    with torch.no_grad(), faster_pass():
        for count in range(1, 3000, 7):
            one(torch.ones(count, 8))
    assert len({rows for rows in products if rows <= 64}) <= 8 + 7
    assert len({rows for rows in products if rows > 64}) <= 3 * 8


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2", "t5", "mixtral", "lfm2", "opt"])
def test_same_as_stock_natively(name, native_products):
    pair = Pair(name)
    pair.ask(ROWS, max_new_tokens=12)
    assert 3 in native_products, "a step of three rows"
    pair.ask(ROWS, num_beams=3)
    pair.ask(ROWS[:1], do_sample=True, num_return_sequences=4)


def test_what_is_not_paged_is_stocks(multiplied):
    pair = Pair("llama")
    with torch.no_grad():
        pair.model(torch.tensor([ROWS[0]]))
        pair.model.generate(torch.tensor([ROWS[0]]), max_new_tokens=3, cache_implementation="static")
    assert not multiplied
    unpatch_model(pair.model)
    pair.model.generate(torch.tensor([ROWS[0]]), max_new_tokens=3)
    assert not multiplied


def test_adapters(multiplied):
    peft = pytest.importorskip("peft")
    pair = Pair("llama")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, r=4)
    pair.stock, pair.model = (_with_adapter(peft, model, config) for model in (pair.stock, pair.model))
    pair.ask(ROWS)
    assert multiplied
    pair.both(lambda model: model.merge_adapter())
    pair.ask(ROWS)
    pair.both(lambda model: model.unmerge_adapter())
    pair.ask(ROWS)
    unpatch_model(pair.model)
    assert not any(type(each) is linear._TakenLinear for each in pair.model.modules())
    inputs = torch.tensor([ROWS[0]])
    assert torch.equal(*(model.generate(inputs, max_new_tokens=9) for model in (pair.stock, pair.model)))


def _with_adapter(peft, model, config):
    torch.manual_seed(5)
    return peft.get_peft_model(model, config)


def test_a_new_vocabulary_is_stocks_until_patched_again(multiplied):
    pair = Pair("llama")
    pair.ask(ROWS)
    pair.both(lambda model: model.resize_token_embeddings(model.config.vocab_size + 8))
    pair.ask(ROWS)
    assert type(pair.model.lm_head) is nn.Linear
    patch_model(pair.model, pair.paged.config)
    assert type(pair.model.lm_head) is linear._TakenLinear
    pair.ask(ROWS)


def test_layers_are_taken_as_soon_as_they_are_in_float32(multiplied):
    model = patch_model(copy_of(FAMILIES["llama"]).double())
    model.generate(torch.tensor([ROWS[0]]), max_new_tokens=3)
    assert type(model.lm_head) is nn.Linear
    model.float().generate(torch.tensor([ROWS[0]]), max_new_tokens=3)
    assert type(model.lm_head) is linear._TakenLinear
    assert multiplied


def test_threads_that_do_not_generate_are_left_alone(multiplied):
    one, answers = layer(), []
    with torch.no_grad(), faster_pass():
        inside = threading.Thread(target=lambda: answers.append(one(torch.ones(2, 24))))
        inside.start()
        inside.join()
        assert not multiplied
        assert torch.allclose(one(torch.ones(2, 24)), answers[0], atol=TOLERANCE)
    assert multiplied == [2]


# -- classes ---------------------------------------------------------------------------------------------------------


def test_classes_are_given_back(multiplied):
    model = copy_of(FAMILIES["llama"])
    before, shown = {name: type(each) for name, each in model.named_modules()}, str(model)
    patch_model(model)
    assert type(model.lm_head) is linear._TakenLinear
    assert isinstance(model.lm_head, nn.Linear)
    assert str(model) == shown
    unpatch_model(model)
    assert {name: type(each) for name, each in model.named_modules()} == before


@pytest.mark.parametrize("how", ["hook", "removed hook", "wrapped", "compiled"])
def test_a_forward_that_was_kept_outlives_the_patch(how, multiplied):
    pair, add = Pair("llama"), accelerate.hooks.add_hook_to_module
    head = pair.model.lm_head
    forward = head.forward
    if "hook" in how:
        add(head, accelerate.hooks.ModelHook())
    if how == "removed hook":
        accelerate.hooks.remove_hook_from_module(head)
    if how == "wrapped":
        head.forward = lambda input: forward(input)
    if how == "compiled":
        head.forward = torch.compile(forward, backend="eager")
    pair.ask(ROWS)
    unpatch_model(pair.model)
    assert type(head) is nn.Linear
    inputs = torch.tensor([ROWS[0]])
    assert torch.equal(*(model.generate(inputs, max_new_tokens=9) for model in (pair.stock, pair.model)))


@pytest.mark.parametrize(("name", "layer"), [("llama", "mlp.up_proj"), ("mixtral", "mlp.experts")])
def test_layers_of_two_models(name, layer, multiplied):
    """Who gives them back first takes them from nobody."""
    one, other = (copy_of(FAMILIES[name]) for _ in range(2))
    shared = other.model.layers[0].get_submodule(layer)
    original = type(shared)
    one.model = other.model
    patch_model(one)
    patch_model(other)
    unpatch_model(one)
    assert faster_layers.is_taken(shared)
    assert type(one.lm_head) is nn.Linear
    unpatch_model(other)
    assert type(shared) is original


def test_layers_that_have_left_the_model_are_given_back(multiplied):
    model = patch_model(copy_of(FAMILIES["llama"]))
    head, model.lm_head = model.lm_head, nn.Linear(64, 8)
    unpatch_model(model)
    assert type(head) is nn.Linear


def test_a_parametrization_that_outlives_the_patch(multiplied):
    model = patch_model(copy_of(FAMILIES["llama"]))
    parametrizations.weight_norm(model.lm_head)
    unpatch_model(model)
    nn.utils.parametrize.remove_parametrizations(model.lm_head, "weight")
    model.generate(torch.tensor([ROWS[0]]), max_new_tokens=3)
    assert isinstance(model.lm_head, nn.Linear)
    assert not multiplied


def test_a_layer_without_weights(multiplied):
    model = copy_of(FAMILIES["llama"])
    model.unused = nn.Linear(4, 4)
    model.unused.weight = None
    patch_model(model).generate(torch.tensor([ROWS[0]]), max_new_tokens=3)
    assert multiplied


def test_layers_with_a_forward_of_their_own_are_left_alone(multiplied):
    model = copy_of(FAMILIES["llama"])
    model.lm_head.forward = nn.Linear.forward.__get__(model.lm_head)  # as accelerate's hooks put one there
    patch_model(model)
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", [layer, conv1d])
def test_copies_and_files_have_the_original_class(kind, how, multiplied):
    one = kind()
    if how == "deepcopy":
        twin = copy.deepcopy(one)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(one, protocol=2))
    else:
        file = io.BytesIO()
        torch.save(one, file)
        assert b"hf_paged" not in file.getvalue()
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(one).__base__
    assert torch.equal(twin.weight, one.weight)
    assert str(twin) == str(one)


def test_copies_draw_no_numbers(multiplied):
    one = layer()
    torch.manual_seed(1)
    copy.deepcopy(one)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))


def test_files_load_without_trust(multiplied):
    file = io.BytesIO()
    torch.save(layer(), file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Linear]):
        assert type(torch.load(file, weights_only=True)) is nn.Linear


def test_compiles_in_one_graph(multiplied):
    one = layer()
    compiled = torch.compile(one, backend="eager", fullgraph=True)
    with torch.no_grad(), faster_pass():
        compiled(torch.ones(2, 24))
    assert not multiplied
