"""Models that were quantized, compiled, wrapped or cut into shards before or after they were patched."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import prompts
import pytest
import torch
from families import FAMILIES
from pair import BLOCK_SIZE, Pair
from torch import nn

from hf_paged import patch_model, unpatch_model

WORKER = Path(__file__).with_name("distributed_worker.py")


def ask_everything(pair) -> None:
    """Greedy, samples and beams, then greedy again on what is left of the first call."""
    rows = prompts.shared_prefix()
    pair.ask(rows)
    pair.ask(rows, do_sample=True, num_return_sequences=2)
    pair.ask(rows, num_beams=2)
    pair.ask(rows)


def with_int8_weights(model):
    # Not among the test's packages: importing it writes to stderr, which other tests look at.
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def test_int8_weights_of_torchao_take_the_fast_path():
    pair = Pair(wrap=with_int8_weights)
    kind = type(pair.model.model.layers[0].mlp.up_proj.weight)
    assert kind is not nn.Parameter, "nothing was quantized"
    ask_everything(pair)
    assert pair.paged.stats().fallbacks == {}
    assert pair.reused > 0


def test_int8_weights_that_are_edited_are_noticed():
    """The numbers lie inside a tensor subclass; what was computed with others must not come back."""
    pair = Pair(wrap=with_int8_weights)
    pair.ask(prompts.single())

    def louder(model):
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.scale.mul_(3.0)

    pair.both(louder)
    pair.ask(prompts.single())
    assert pair.reused == 0


def test_linear_layers_that_quantize_by_the_batch_are_right():
    """torch's dynamic quantization scales by the largest input of a batch: packed tokens would come out otherwise."""

    def quantized(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    pair = Pair(wrap=quantized)
    ask_everything(pair)
    assert any("packed logits differ" in reason for reason in pair.paged.stats().fallbacks)


@pytest.mark.parametrize("first", ["patched", "compiled"])
def test_compiled_models(first):
    torch._dynamo.reset()
    try:
        pair = Pair()
        if first == "compiled":
            unpatch_model(pair.model)
            compiled = torch.compile(pair.model, backend="eager")
            assert patch_model(compiled, block_size=8) is compiled
        else:
            compiled = torch.compile(pair.model, backend="eager")
        rows = prompts.shared_prefix()
        with torch.no_grad():
            assert torch.equal(compiled(**rows).logits, pair.stock(**rows).logits)
        answer = pair.ask(rows)
        assert torch.equal(compiled.generate(**rows, do_sample=False, max_new_tokens=6), answer)
        assert pair.paged.stats().fallbacks == {}
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_exported_models(strict):
    """Of a pass without cache; the patched model goes on."""
    pair = Pair()
    ids = torch.tensor([prompts.tokens(12, seed=3)])
    with torch.no_grad():
        exported = torch.export.export(pair.model, (ids,), {"use_cache": False}, strict=strict).module()
        torch.testing.assert_close(exported(ids, use_cache=False).logits, pair.stock(ids).logits)
    pair.ask(prompts.shared_prefix())
    assert pair.paged.stats().fallbacks == {}


def test_compiled_layers():
    """What is compiled ends where ours begins: nothing of ours is traced, whose numbers change with every step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        pair = Pair.of(FAMILIES["llama"].build(num_hidden_layers=1), block_size=8)
        for layer in pair.model.model.layers:
            layer.compile(backend="eager")
        pair.ask(prompts.shared_prefix())
        assert pair.paged.stats().fallbacks == {}
        breaks = list(torch._dynamo.utils.counters["graph_break"])
        assert breaks
        assert all("torch.compiler.disable" in each for each in breaks), breaks
    finally:
        torch._dynamo.reset()


def compiled_in_their_places(model):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def compiled_inside(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


@pytest.mark.parametrize("first", ["patched", "compiled"])
@pytest.mark.parametrize("compile_", [compiled_in_their_places, compiled_inside])
def test_compiled_parts(compile_, first):
    """`torch.compile` puts modules around them that are not made as others are."""
    torch._dynamo.reset()
    try:
        stock = FAMILIES["llama"].build()
        pair = Pair.of(stock) if first == "patched" else Pair.of(compile_(stock))
        if first == "patched":
            pair.ask(prompts.shared_prefix())
            pair.stock, pair.model = compile_(pair.stock), compile_(pair.model)
        ask_everything(pair)
        assert pair.paged.stats().fallbacks == {}
        assert pair.reused > 0
        pair.model.train()
        pair.model.generate(**prompts.single(), max_new_tokens=2)
        assert any("training mode" in reason for reason in pair.paged.stats().fallbacks)
    finally:
        torch._dynamo.reset()


def test_data_parallel_models():
    pair = Pair()
    wrapped = nn.DataParallel(pair.model)
    assert patch_model(wrapped, block_size=8) is wrapped
    rows = prompts.shared_prefix()
    with torch.no_grad():
        assert torch.equal(wrapped(**rows).logits, pair.stock(**rows).logits)
    ask_everything(pair)
    assert pair.paged.stats().fallbacks == {}


def _ranks(count, folder):
    """What each rank of a run of `distributed_worker.py` has found."""
    FAMILIES["llama"].build().save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder / "model"), str(folder)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "PYTHONWARNINGS": "ignore",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [rank.communicate(timeout=280)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def test_tensor_parallel_ranks_hold_the_blocks_of_their_heads_and_agree(tmp_path):
    first, second = _ranks(2, tmp_path)
    assert all(first["equal"]), first["equal"]
    if first["hooked"]:  # which is how older transformers cut layers
        assert list(first["fallbacks"]) == ["prefixes not reused: Linear with a forward hook"]
    else:
        assert first["fallbacks"] == {}
        assert first["counts"][-1][2] > first["counts"][0][2], "the last call reuses what the first has left"
    assert first["kv_heads"] == [1, 1], "each rank holds one of the two KV heads of both layers"
    assert first == second, "the ranks' tables, counts and answers differ"


def test_a_model_that_fsdp_has_wrapped_is_right_and_says_why_it_reuses_nothing(tmp_path):
    from torch.distributed.fsdp import fully_shard

    def sharded(model):
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        pair = Pair()
        pair.model = patch_model(sharded(unpatch_model(pair.model)), block_size=BLOCK_SIZE)
        ask_everything(pair)
        assert list(pair.paged.stats().fallbacks) == ["prefixes not reused: FSDPLlamaForCausalLM with a forward hook"]
        assert pair.paged.stats().shared_tokens > 0, "rows of one call still share"
    finally:
        torch.distributed.destroy_process_group()
