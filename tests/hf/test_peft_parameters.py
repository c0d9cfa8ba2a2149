"""LoRA on parameters instead of modules (`target_parameters`): PEFT puts them aside, and back, in every pass."""

import pytest
import torch
from graphed import Both
from pair import REUSED, ROWS, Pair
from peft import LoraConfig, get_peft_model

NAMES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def with_parameters(model, seed: int = 1):
    """`model` with adapters of its experts that are loud enough to be heard."""
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=NAMES, lora_alpha=32))
    generator = torch.Generator().manual_seed(seed)
    for path, weight in model.named_parameters():
        if ".default." in path:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def experts(model):
    return model.get_base_model().model.layers[1].mlp.experts.base_layer.base_layer


def test_prefixes_are_reused():
    pair = Pair("mixtral", wrap=with_parameters)
    unadapted = Pair("mixtral")
    answer = pair.ask(ROWS)
    assert not torch.equal(answer, unadapted.ask(ROWS))
    for _ in range(2):
        pair.ask(ROWS)
        assert pair.reused == REUSED
        assert pair.paged.stats().fallbacks == {}
    pair.ask(ROWS, num_beams=2)
    assert pair.reused == 2 * REUSED


@torch.no_grad()
def in_place(model):
    experts(model).down_proj[0, 0, 0] += 3


def through_data(model):
    experts(model).down_proj.data.mul_(-1)


def another(model):
    base = experts(model)
    base.down_proj = torch.nn.Parameter(base.down_proj.detach() * 2)


def of_the_adapter(model):
    for path, weight in model.named_parameters():
        if "experts.lora_B" in path:
            with torch.no_grad():
                weight.neg_()


def of_all_others(model):
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.v_proj.weight.mul_(-1)


@pytest.mark.parametrize("change", [in_place, through_data, another, of_the_adapter, of_all_others])
def test_changes_are_seen(change):
    pair = Pair("mixtral", wrap=with_parameters)
    before = pair.ask(ROWS)
    pair.both(change)
    after = pair.ask(ROWS)
    assert pair.reused == 0
    assert change is in_place or not torch.equal(before, after), "the change must matter"
    pair.ask(ROWS)
    assert pair.reused == REUSED


def test_a_change_in_the_midst_of_a_call_is_seen():
    """As `in_place`, of one element, which no sample tells of."""

    class AfterPrompt:
        def __init__(self, model):
            self.model, self.puts = model, 0

        def put(self, value):
            self.puts += 1
            if self.puts == 2:
                in_place(self.model)

        def end(self):
            pass

    pair = Pair("mixtral", wrap=with_parameters)
    row = ROWS[:1]
    pair.ask(row)
    pair.ask(row, streamer=AfterPrompt)
    assert [reason.partition(":")[0] for reason in pair.paged.stats().fallbacks] == ["prefixes not kept"]
    pair.ask(row)
    assert pair.reused == 0


def test_a_pass_that_is_not_of_hf_paged_counts_as_a_change():
    """Nobody can tell from how often they were written to that it was for the pass alone."""
    pair = Pair("mixtral", wrap=with_parameters)
    pair.ask(ROWS)
    pair.both(lambda model: model(torch.tensor([[5, 6, 7]])))
    pair.ask(ROWS)
    assert pair.reused == 0


def test_graphs_of_decode_steps_are_kept(quick):
    both = Both(family="mixtral")
    for model in (both.stock, both.model):
        with_parameters(model)
    both.ask()
    both.ask()
    captures = quick.captures
    assert both.ask() == 4, "every step but the prompt's"
    assert quick.captures == captures
