"""Patching and its undo, and everything people do with models other than calling `generate`."""

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import textwrap
import weakref

import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of, every_family
from families import FAMILIES, PAD, VOCAB, stock_model
from snapshot import differences, snapshot
from tolerances import assert_close

from hf_paged import PagedCache, PagedConfig, PagedStats, paged, patch_model, unpatch_model

LLAMA = FAMILIES["llama"]
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def expected_tokens(family=LLAMA):
    return stock_model(family.name).generate(**prompts.shared_prefix(), **GREEDY)


def assert_generates_as_stock(model, family=LLAMA):
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected_tokens(family))


def patched(family=LLAMA, **overrides):
    return patch_model(copy_of(family), **{"block_size": BLOCK_SIZE, **overrides})


def is_patched(model) -> bool:
    return hasattr(model, "paged")


# Patching


def test_patch_returns_the_same_object():
    model = copy_of(LLAMA)
    assert patch_model(model) is model
    assert is_patched(model)


def test_patched_model_is_still_its_class():
    model, stock = patched(), stock_model("llama")
    assert isinstance(model, type(stock))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__qualname__ == type(stock).__qualname__
    assert type(model).__module__ == type(stock).__module__
    assert repr(model) == repr(stock)
    assert model.config.to_dict() == stock.config.to_dict()


def test_nothing_is_patched_by_the_import_or_in_other_models():
    other = copy_of(LLAMA)
    before = snapshot(other)
    patched().generate(**prompts.single(), **GREEDY)
    assert differences(before, snapshot(other)) == []
    assert not is_patched(other)


def test_the_generation_config_and_inputs_are_not_changed():
    model, inputs = patched(), prompts.shared_prefix()
    before = model.generation_config.to_dict(), {name: value.clone() for name, value in inputs.items()}
    model.generate(**inputs, **GREEDY)
    assert model.generation_config.to_dict() == before[0]
    assert all(torch.equal(inputs[name], value) for name, value in before[1].items())


def test_patching_twice_changes_nothing():
    model = patched()
    kind, runtime = type(model), model.paged
    assert patch_model(model, block_size=BLOCK_SIZE) is model
    assert type(model) is kind
    assert model.paged.config == runtime.config
    assert_generates_as_stock(model)
    unpatch_model(model)
    assert not is_patched(model), "patched twice, unpatching once must be enough"


def test_patching_again_reconfigures():
    model = patched()
    assert_generates_as_stock(model)
    patch_model(model, block_size=32)
    assert model.paged.config.block_size == 32
    assert_generates_as_stock(model)
    patch_model(model, PagedConfig(block_size=64), prefix_caching=False)
    assert (model.paged.config.block_size, model.paged.config.prefix_caching) == (64, False)
    assert_generates_as_stock(model)
    assert model.paged.stats().blocks_in_use == 0


def test_config_object_and_overrides():
    config = PagedConfig(block_size=32)
    model = patch_model(copy_of(LLAMA), config, attention_backend="reference")
    assert (model.paged.config.block_size, model.paged.config.attention_backend) == (32, "reference")
    assert config == PagedConfig(block_size=32), "the user's object is not changed"


# Undoing


@pytest.mark.parametrize("family", every_family())
def test_undo_restores_everything_reachable(family):
    model = copy_of(family)
    model.generate(**prompts.single(), **GREEDY)  # whatever stock itself creates on first use is not our doing
    before = snapshot(model)
    patch_model(model, block_size=BLOCK_SIZE)
    model.generate(**prompts.ragged(), **GREEDY)
    if "encoder_decoder" not in family.tags:
        model.generate(**prompts.ragged(), num_beams=2, **GREEDY)
    unpatch_model(model)
    assert differences(before, snapshot(model)) == []
    assert_generates_as_stock(model, family)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_undo_restores_the_attention_implementation(attention):
    model = copy_of(LLAMA)
    model.set_attn_implementation(attention)
    patch_model(model)
    model.generate(**prompts.single(), **GREEDY)
    unpatch_model(model)
    assert model.config._attn_implementation == attention
    assert model.model.layers[0].self_attn.config._attn_implementation == attention


def test_undo_keeps_the_users_own_attributes_and_hooks():
    model = copy_of(LLAMA)
    calls = []
    model.my_note = "kept"
    handle = model.model.register_forward_hook(lambda *args: calls.append(1))
    patch_model(model, block_size=BLOCK_SIZE)
    assert_generates_as_stock(model)
    assert calls, "a user's hook runs under the patch"
    unpatch_model(model)
    assert model.my_note == "kept"
    calls.clear()
    model.generate(**prompts.single(), **GREEDY)
    assert len(calls) == GREEDY["max_new_tokens"]
    handle.remove()


def test_users_instance_forward_survives():
    """Libraries replace `forward` on the instance; it must be called, and be there afterwards."""
    model, calls = copy_of(LLAMA), []
    original = model.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = forward
    patch_model(model, block_size=BLOCK_SIZE)
    assert_generates_as_stock(model)
    assert calls
    unpatch_model(model)
    assert model.forward is forward


def test_unpatch_without_patch_is_a_no_op():
    model = copy_of(LLAMA)
    before = snapshot(model)
    unpatch_model(model)
    unpatch_model(model)
    assert differences(before, snapshot(model)) == []


def test_unpatch_frees_the_memory():
    model = patched()
    model.generate(**prompts.shared_prefix(), **GREEDY)
    runtime = weakref.ref(model.paged)
    unpatch_model(model)
    gc.collect()
    assert runtime() is None, "the runtime and its pool live on after unpatching"


def test_a_patched_model_can_be_collected():
    model = patched()
    model.generate(**prompts.shared_prefix(), **GREEDY)
    alive = [weakref.ref(model), weakref.ref(model.paged)]
    del model
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_with_block_scopes_the_patch():
    model = copy_of(LLAMA)
    before = snapshot(model)
    with paged(model, block_size=BLOCK_SIZE) as inner:
        assert inner is model
        assert model.paged.config.block_size == BLOCK_SIZE
        assert_generates_as_stock(model)
    assert not is_patched(model)
    assert differences(before, snapshot(model)) == []


def test_with_block_undoes_after_an_exception():
    model = copy_of(LLAMA)
    with pytest.raises(KeyError), paged(model):
        raise KeyError("from the body")
    assert not is_patched(model)


def test_with_block_inside_a_patch_gives_the_outer_patch_back():
    model = patched()
    with paged(model, block_size=32):
        assert model.paged.config.block_size == 32
        assert_generates_as_stock(model)
    assert is_patched(model), "the outer patch was the user's own"
    assert model.paged.config.block_size == BLOCK_SIZE
    assert_generates_as_stock(model)


# Copies and files


def test_deepcopy_has_a_runtime_of_its_own():
    model = patched()
    twin = copy.deepcopy(model)
    assert twin.paged is not model.paged
    assert twin.paged.config == model.paged.config
    assert_generates_as_stock(twin)
    assert model.paged.stats().prompt_tokens == 0, "the copy's work is counted in the original"
    assert twin.paged.stats().prompt_tokens > 0
    unpatch_model(model)
    assert_generates_as_stock(twin)
    assert is_patched(twin)


def test_deepcopied_weights_do_not_share_cached_prefixes():
    """Reuse after a copy whose weights were changed would be wrong."""
    model = patched()
    assert_generates_as_stock(model)
    twin, changed = copy.deepcopy(model), copy_of(LLAMA)
    for one in (twin, changed):
        with torch.no_grad():
            one.model.layers[0].self_attn.v_proj.weight.mul_(-1.0)
    expected = changed.generate(**prompts.shared_prefix(), **GREEDY)
    assert torch.equal(twin.generate(**prompts.shared_prefix(), **GREEDY), expected)
    assert not torch.equal(expected, expected_tokens())


def test_pickle_is_the_unpatched_model():
    model = patched()
    model.generate(**prompts.single(), **GREEDY)
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is type(stock_model("llama"))
    assert not is_patched(loaded)
    assert_generates_as_stock(loaded)
    assert is_patched(model)
    assert_generates_as_stock(model)


BLOCK_IMPORT = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("hf_paged", "hf_paged_kernels"):
                raise ImportError(f"{name} is blocked by the test")

    sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_files_load_where_hf_paged_is_not_installed(how, tmp_path):
    model, path = patched(), tmp_path / "model"
    model.generate(**prompts.single(), **GREEDY)
    if how == "pickle":
        path.write_bytes(pickle.dumps(model))
        load = "import pickle, pathlib; model = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())"
    else:
        torch.save(model, path)
        load = "import torch; model = torch.load(sys.argv[1], weights_only=False)"
    check = """
    import torch
    ids = torch.tensor([eval(sys.argv[2])])
    print(type(model).__module__, type(model).__name__, model.config._attn_implementation)
    print(model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[0].tolist())
    """
    script = textwrap.dedent(BLOCK_IMPORT) + load + textwrap.dedent(check)
    ids = prompts.single()["input_ids"]
    arguments = [sys.executable, "-c", script, str(path), str(ids[0].tolist())]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kind, generated = done.stdout.strip().splitlines()[-2:]
    assert kind == "transformers.models.llama.modeling_llama LlamaForCausalLM sdpa"
    assert json.loads(generated) == stock_model("llama").generate(**prompts.single(), **GREEDY)[0].tolist()


def test_torch_save_keeps_tied_weights_tied():
    model = patch_model(FAMILIES["llama_tied"].build(), block_size=BLOCK_SIZE)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_state_dict_is_the_stock_one():
    stock, model = stock_model("llama"), patched()
    model.generate(**prompts.single(), **GREEDY)
    assert list(model.state_dict()) == list(stock.state_dict())


def test_save_pretrained_writes_the_same_files(tmp_path):
    copy_of(LLAMA).save_pretrained(tmp_path / "stock")
    model = patched()
    model.generate(**prompts.single(), **GREEDY)
    model.save_pretrained(tmp_path / "patched")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "patched").iterdir()) == names
    for name in names:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes(), name
    loaded = type(stock_model("llama")).from_pretrained(tmp_path / "patched")
    assert not is_patched(loaded)
    assert_generates_as_stock(loaded)
    assert is_patched(model)


def test_from_pretrained_on_the_patched_class_gives_a_stock_model(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_generates_as_stock(loaded)


def test_moving_and_casting_after_patching():
    model = patched().to(torch.float64)
    expected = copy_of(LLAMA).to(torch.float64).generate(**prompts.ragged(), **GREEDY)
    assert torch.equal(model.generate(**prompts.ragged(), **GREEDY), expected)
    assert_generates_as_stock(model.to(torch.float32))


def test_changed_weights_are_seen():
    """In-place edits between two calls on one prompt: the second must not use the first one's blocks."""
    model, stock = patched(), copy_of(LLAMA)
    assert_generates_as_stock(model)
    for one in (model, stock):
        with torch.no_grad():
            one.model.layers[1].self_attn.k_proj.weight.add_(0.3)
    expected = stock.generate(**prompts.shared_prefix(), **GREEDY)
    assert not torch.equal(expected, expected_tokens())
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected)


def test_set_attn_implementation_after_patching():
    model, stock = patched(), copy_of(LLAMA)
    for one in (model, stock):
        one.set_attn_implementation("eager")
    output = [
        one.generate(**prompts.single(), **GREEDY, output_attentions=True, return_dict_in_generate=True)
        for one in (model, stock)
    ]
    assert torch.equal(output[0].sequences, output[1].sequences)
    assert_close(output[0].attentions[0][0], output[1].attentions[0][0], "attentions")


# Training


def batch_with_labels() -> dict:
    inputs = prompts.ragged()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def train_step(model) -> tuple[torch.Tensor, dict]:
    model.train()
    torch.manual_seed(1)
    loss = model(**batch_with_labels()).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", every_family(lambda family: family.packed is True or family.name in ("opt", "bart")))
def test_training_is_bit_for_bit_stock(family, checkpointing):
    results = []
    for model in (copy_of(family), patched(family)):
        if checkpointing:
            model.gradient_checkpointing_enable()
        results.append(train_step(model))
    assert torch.equal(results[0][0], results[1][0]), f"{family.name}: loss"
    for name, gradient in results[0][1].items():
        same = gradient is results[1][1][name] is None or torch.equal(gradient, results[1][1][name])
        assert same, f"{family.name}: gradient of {name}"


def test_generate_between_training_steps():
    """The loop of GRPO and friends: generate, step, generate, on one model."""
    sequences = []
    for model in (copy_of(LLAMA), patched()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        produced = []
        for _ in range(3):
            model.eval()
            produced.append(model.generate(**prompts.shared_prefix(), **GREEDY))
            optimizer.zero_grad()
            train_step(model)
            optimizer.step()
        sequences.append(produced)
    assert not torch.equal(sequences[0][0], sequences[0][2]), "the steps must change the output to test anything"
    for step, (expected, actual) in enumerate(zip(*sequences, strict=True)):
        assert torch.equal(actual, expected), f"after {step} steps"


def test_generate_in_train_mode():
    """Trainers generate in train mode too; without dropout the tokens are stock's, and the mode stays."""
    stock, model = copy_of(LLAMA).train(), patched().train()
    assert torch.equal(model.generate(**prompts.ragged(), **GREEDY), stock.generate(**prompts.ragged(), **GREEDY))
    assert model.training


# Wrappers


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config).eval()


def test_peft_model_patched_from_outside():
    stock, model = lora(copy_of(LLAMA)), lora(copy_of(LLAMA))
    expected = stock.generate(**prompts.shared_prefix(), **GREEDY)
    assert not torch.equal(expected, expected_tokens()), "the adapter must matter"
    assert patch_model(model, block_size=BLOCK_SIZE) is model
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected)
    stats = model.paged.stats()
    assert stats.prompt_tokens == prompts.num_real_tokens(prompts.shared_prefix())
    assert stats.fallbacks == {}
    assert stats.blocks_in_use == 0
    unpatch_model(model)
    assert not is_patched(model)
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected)


def test_model_patched_before_peft_wraps_it():
    expected = lora(copy_of(LLAMA)).generate(**prompts.shared_prefix(), **GREEDY)
    base = patched()
    assert_generates_as_stock(base)
    model = lora(base)
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected)
    assert model.paged.stats().blocks_in_use == 0


def test_peft_adapter_switched_off_and_on():
    """Each state of the adapter has its own cached prefixes."""
    model = patch_model(lora(copy_of(LLAMA)), block_size=BLOCK_SIZE)
    adapted = lora(copy_of(LLAMA)).generate(**prompts.shared_prefix(), **GREEDY)
    for _ in range(2):
        assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), adapted)
        with model.disable_adapter():
            assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected_tokens())


def test_peft_merge():
    stock, model = lora(copy_of(LLAMA)), patch_model(lora(copy_of(LLAMA)), block_size=BLOCK_SIZE)
    for _ in range(2):
        expected = stock.generate(**prompts.shared_prefix(), **GREEDY)
        assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected)
        stock.merge_adapter(), model.merge_adapter()
    merged = patch_model(lora(copy_of(LLAMA)), block_size=BLOCK_SIZE).merge_and_unload()
    assert torch.equal(merged.generate(**prompts.shared_prefix(), **GREEDY), expected)


# Pipelines


def tiny_tokenizer():
    """A word-level tokenizer of the words w3, w4, ... built in code."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = [f"w{index}" for index in range(3, VOCAB - 2)]
    names = ["<pad>", "<s>", "</s>", *words, "abcdef", "<unk>"]  # stop strings need abcdef
    tokenizer = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


TEXTS = [" ".join(f"w{token}" for token in prompts.tokens(length)) for length in (5, 18, 18, 9)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pipeline(batch_size):
    from transformers import pipeline

    def run(pipe):
        return pipe(TEXTS, do_sample=False, max_new_tokens=6, batch_size=batch_size)

    expected = run(pipeline("text-generation", model=copy_of(LLAMA), tokenizer=tiny_tokenizer()))
    pipe = pipeline("text-generation", model=copy_of(LLAMA), tokenizer=tiny_tokenizer())
    assert patch_model(pipe, block_size=BLOCK_SIZE) is pipe
    assert run(pipe) == expected
    assert pipe.model.paged.stats().blocks_in_use == 0
    assert pipe.model.paged.stats().prompt_tokens == sum(len(tiny_tokenizer()(text)["input_ids"]) for text in TEXTS)
    unpatch_model(pipe)
    assert not is_patched(pipe.model)
    assert run(pipe) == expected


def test_pipeline_made_from_a_patched_model():
    from transformers import pipeline

    pipe = pipeline("text-generation", model=patched(), tokenizer=tiny_tokenizer())
    stock = pipeline("text-generation", model=copy_of(LLAMA), tokenizer=tiny_tokenizer())
    assert pipe(TEXTS, do_sample=False, max_new_tokens=6) == stock(TEXTS, do_sample=False, max_new_tokens=6)


def test_stop_strings_need_the_tokenizer():
    word = f"w{int(stock_model('llama').generate(**prompts.single(), **GREEDY)[0, 24])}"
    outputs = [
        model.generate(
            **prompts.single(), do_sample=False, max_new_tokens=8, stop_strings=[word], tokenizer=tiny_tokenizer()
        )
        for model in (copy_of(LLAMA), patched())
    ]
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] < 21 + 8


# The runtime


def test_runtime_members():
    model = patched()
    assert isinstance(model.paged.config, PagedConfig)
    assert model.paged.stats() == PagedStats(bytes_reserved=model.paged.stats().bytes_reserved)
    inputs = prompts.shared_prefix()
    output = model.generate(**inputs, **GREEDY)
    stats = model.paged.stats()
    assert stats.generated_tokens == len(output) * GREEDY["max_new_tokens"]
    assert stats.bytes_reserved > 0
    model.paged.reset_stats()
    after = model.paged.stats()
    assert (after.prompt_tokens, after.computed_tokens, after.generated_tokens) == (0, 0, 0)
    assert (after.blocks_cached, after.bytes_reserved) == (stats.blocks_cached, stats.bytes_reserved), (
        "gauges stay true"
    )


def test_clear_and_release():
    model = patched()
    assert_generates_as_stock(model)
    model.paged.clear()
    assert model.paged.stats().blocks_cached == 0
    model.paged.reset_stats()
    assert_generates_as_stock(model)
    assert model.paged.stats().reused_tokens == 0, "cleared prefixes are not used"
    model.paged.release()
    assert model.paged.stats().bytes_reserved == 0
    assert_generates_as_stock(model)


def test_release_keeps_a_cache_that_the_user_holds():
    model = patched()
    output = model.generate(**prompts.single(), do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
    model.paged.clear()
    model.paged.release()
    whole = {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    continued = model.generate(**whole, past_key_values=output.past_key_values, **GREEDY)
    assert torch.equal(continued, stock_model("llama").generate(**whole, **GREEDY))


def test_a_returned_cache_outlives_the_patch():
    """After unpatching, a cache that the user still holds either works or says what is wrong; it never lies."""
    model = patched()
    output = model.generate(**prompts.single(), do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
    whole = {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    expected = stock_model("llama").generate(**whole, **GREEDY)
    unpatch_model(model)
    error = None
    try:
        continued = model.generate(**whole, past_key_values=output.past_key_values, **GREEDY)
    except (ValueError, RuntimeError) as caught:
        error = str(caught)
    if error is None:
        assert torch.equal(continued, expected)
    else:
        assert "cache" in error


def test_printed_table_is_for_people():
    model = patched(FAMILIES["bloom"])
    model.generate(**prompts.ragged(), **GREEDY)
    table = str(model.paged)
    assert len(table.splitlines()) > 5
    stats = model.paged.stats()
    assert stats.fallbacks
    assert all(reason in table for reason in stats.fallbacks), table
    assert str(stats.prompt_tokens) in table


def test_cache_salt_is_accepted_and_changes_no_token():
    model = patched()
    for salt in ("tenant-a", "tenant-b", None):
        output = model.generate(**prompts.shared_prefix(), **GREEDY, cache_salt=salt)
        assert torch.equal(output, expected_tokens())


def test_a_returned_cache_is_a_cache():
    from transformers import Cache

    output = patched().generate(**prompts.single(), **GREEDY, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, PagedCache)
    assert isinstance(output.past_key_values, Cache)
    assert output.past_key_values.get_seq_length() == 21 + GREEDY["max_new_tokens"] - 1


def test_pad_token_inside_the_prompt_is_a_token_like_any_other():
    """With an explicit mask, the id that is also the padding may stand in the middle of a text."""
    inputs = prompts.ragged()
    inputs["input_ids"][0, 4] = PAD
    expected = stock_model("llama").generate(**inputs, **GREEDY)
    assert torch.equal(patched().generate(**inputs, **GREEDY), expected)
