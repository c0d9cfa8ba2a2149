"""PEFT around a patched model, and a patch around PEFT: adapters with prefixes of their own, merged, saved, loaded."""

import copy
import json

import prompts
import pytest
import torch
from families import FAMILIES
from pair import BLOCK_SIZE, Pair
from peft import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import LlamaForCausalLM

from hf_paged import patch_model, unpatch_model

ROW = prompts.single()
TOKENS = 21


def lora(model, seed: int = 0, name: str = "default"):
    """`model` with an adapter whose weights are large enough to be heard."""
    settings = LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=32)
    model = get_peft_model(model, settings, adapter_name=name)
    loud(model, name, seed)
    return model.eval()


def loud(model, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for path, weight in model.named_parameters():
        if f".{name}." in path:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)


def with_two_adapters(pair: Pair) -> list:
    """The pair's models with adapters "a" and "b"."""
    models = []
    for base in (pair.stock, pair.model):
        model = lora(base, 1, "a")
        model.add_adapter("b", LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=32))
        loud(model, "b", 2)
        models.append(model.eval())
    return models


@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_either_may_come_first(first):
    stock = lora(FAMILIES["llama"].build())
    if first == "patch":
        model = lora(patch_model(FAMILIES["llama"].build(), block_size=BLOCK_SIZE))
    else:
        model = lora(FAMILIES["llama"].build())
        assert patch_model(model, block_size=BLOCK_SIZE) is model
    for rows, kwargs in ((ROW, {}), (prompts.shared_prefix(), {"num_beams": 2}), (ROW, {})):
        expected = stock.generate(**rows, do_sample=False, max_new_tokens=6, **kwargs)
        assert torch.equal(model.generate(**rows, do_sample=False, max_new_tokens=6, **kwargs), expected)
    stats = model.get_base_model().paged.stats()
    assert stats.fallbacks == {}
    assert stats.reused_tokens >= TOKENS - 1


def test_each_adapter_has_prefixes_of_its_own_and_they_outlive_a_switch():
    pair = Pair()
    models = with_two_adapters(pair)
    answers, reused = {}, []
    for name in ("a", "b", "a", "b", None, "a"):
        if name is not None:
            for model in models:
                model.set_adapter(name)
            answers[name] = pair.ask(ROW)
        else:
            with models[0].disable_adapter(), models[1].disable_adapter():
                answers[name] = pair.ask(ROW)
        reused.append(pair.reused)
    assert reused == [0, 0, TOKENS - 1, TOKENS - 1, 0, TOKENS - 1]
    assert len({tuple(answer.flatten().tolist()) for answer in answers.values()}) == 3


def test_a_mixed_model_of_several_kinds_of_adapters():
    models = []
    for patched_first in (False, True):
        base = FAMILIES["llama"].build()
        base = patch_model(base, block_size=BLOCK_SIZE) if patched_first else base
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], lora_alpha=32), "a", mixed=True)
        loud(model, "a", 1)
        torch.manual_seed(2)
        model.add_adapter("b", LoHaConfig(target_modules=["v_proj"], alpha=256, init_weights=False))
        models.append(model.eval())
    stock, *others = models[0], models[1], copy.deepcopy(models[0])
    answers = set()
    for names in (["a", "b"], ["a"], ["b"], ["a", "b"]):
        stock.set_adapter(names)
        expected = stock.generate(**ROW, do_sample=False, max_new_tokens=6)
        answers.add(tuple(expected[0].tolist()))
        for model in others:
            assert patch_model(model, block_size=BLOCK_SIZE) is model
            model.set_adapter(names)
            assert torch.equal(model.generate(**ROW, do_sample=False, max_new_tokens=6), expected)
    assert len(answers) == 3
    for model in others:
        stats = model.base_model.model.paged.stats()
        assert (stats.fallbacks, stats.reused_tokens) == ({}, TOKENS - 1)
        assert not hasattr(unpatch_model(model).base_model.model, "paged")


def test_the_model_below_a_learnt_prompt_stays_fast():
    pair = Pair()
    learnt = []
    for base in (pair.stock, pair.model):
        model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
        loud(model, "default", 1)
        learnt.append(model.generate(**ROW, do_sample=False, max_new_tokens=6))
    assert torch.equal(*learnt)
    assert list(pair.paged.stats().fallbacks) == [
        "stock generate: prepare_inputs_for_generation was replaced on the instance"
    ]
    assert not torch.equal(pair.ask(ROW), learnt[0])
    assert pair.paged.stats().fallbacks == {}


def test_an_adapter_that_is_trained_does_not_find_what_it_had_left():
    pair = Pair()
    models = [lora(base) for base in (pair.stock, pair.model)]
    pair.ask(ROW)
    for model in models:
        model.train()
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
        model(**ROW, labels=ROW["input_ids"]).loss.backward()
        optimizer.step()
        model.eval()
    pair.ask(ROW)
    assert pair.reused == 0


def test_a_merged_and_unloaded_model_stays_patched():
    pair = Pair()
    wrapped = [lora(base) for base in (pair.stock, pair.model)]
    before = pair.ask(ROW)
    pair.stock, pair.model = (model.merge_and_unload() for model in wrapped)
    assert torch.equal(pair.ask(ROW), before)
    assert pair.reused == 0, "sums in another order: what is kept is not of these weights"
    pair.ask(ROW)
    assert pair.reused == TOKENS - 1


def test_files_of_adapter_and_model_are_stocks(tmp_path):
    pair = Pair()
    pair.ask(ROW)
    folders = [tmp_path / name for name in ("stock", "patched")]
    for base, folder in zip((pair.stock, pair.model), folders, strict=True):
        base.save_pretrained(folder / "model")
        lora(base).save_pretrained(folder / "adapter")
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in folders]
    assert files[0] == files[1]
    assert len(files[0]) >= 4
    for name in files[0]:
        contents = [(folder / name).read_bytes() for folder in folders]
        if name.suffix == ".json":
            contents = [json.loads(each) for each in contents]
        assert contents[0] == contents[1], name
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folders[1] / "model"), folders[1] / "adapter")
    expected = loaded.eval().generate(**ROW, do_sample=False, max_new_tokens=6)
    assert torch.equal(pair.ask(ROW), expected)
    again = patch_model(loaded, block_size=BLOCK_SIZE)
    assert torch.equal(again.generate(**ROW, do_sample=False, max_new_tokens=6), expected)


@pytest.mark.parametrize("first", ["mixed", "plain"])
def test_a_batch_of_several_adapters(first):
    """PEFT tells its layers by a hook which row is whose."""
    pair = Pair()
    models = with_two_adapters(pair)
    names = ["a", "b", "__base__"]

    def mixed(**kwargs):
        stock, patched = (
            model.generate(**prompts.identical(), adapter_names=names, do_sample=False, max_new_tokens=8, **kwargs)
            for model in models
        )
        assert torch.equal(patched, stock)
        assert not torch.equal(stock[0], stock[1])

    if first == "plain":
        pair.ask(ROW)
    mixed()
    mixed(num_beams=2)
    mixed(eos_token_id=list(range(4, 60)))
    for _ in range(2):
        pair.ask(ROW)
    assert pair.paged.stats().fallbacks == {}, "without a mix it is fast again"
    assert pair.reused == TOKENS - 1
