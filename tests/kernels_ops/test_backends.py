"""Every backend against dense attention in float64, over prompts, decode steps and fragmented pools."""

import pytest
import torch
from one_layer import CALLS, CPU, SHAPES, OneLayer, short_story, story

from hf_paged_kernels import NativeKernel
from hf_paged_kernels.launch import triton_obstacle

# Backends as tests name them: `cpu` alone is torch's own attention, the others force a variant of the native kernel.
CPU_BACKENDS = ("cpu", "cpu avx2", "cpu avx512_bf16")
BACKENDS = (*CPU_BACKENDS, "reference")
OTHER_VARIANTS = ("cpu portable", "cpu avx512", "cpu neon")

# What the Triton kernels run through. Their interpreter takes some 20 ms a program; test_triton.py has more shapes.
TRITON_CASES = {
    "plain": ("gqa 4", torch.float32, "plain", {"fragmented": True}),
    "all": ("mqa", torch.float32, "all", {"block_size": 32}),
}
TRITON_DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_arguments(shape, call, backend):
    story(OneLayer(shape, torch.float32, CALLS[call], backend))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_dtypes(shape, dtype, backend):
    story(OneLayer(shape, dtype, {}, backend))


@pytest.mark.parametrize("backend", OTHER_VARIANTS, indirect=True)
@pytest.mark.parametrize("call", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_variants(dtype, call, backend):
    story(OneLayer("gqa 3", dtype, CALLS[call], backend))


@pytest.mark.parametrize("backend", CPU_BACKENDS, indirect=True)
@pytest.mark.parametrize("call", ["plain", "all"])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_in_any_order(seed, call, backend):
    story(OneLayer("gqa 3", torch.float32, CALLS[call], backend, fragmented=True, seed=seed))


@pytest.mark.parametrize("backend", CPU_BACKENDS, indirect=True)
@pytest.mark.parametrize("call", ["plain", "window", "all"])
@pytest.mark.parametrize("fragmented", [False, True])
def test_short_chunks(fragmented, call, backend):
    """As many tokens a row as a draft has, on top of what rows share."""
    model = OneLayer("gqa 3", torch.float32, CALLS[call], backend, fragmented=fragmented)
    model.packed([[*range(40), 1], [*range(40), 2], [3]])
    for tokens in (1, 2, 5, 16, 3):
        model.packed([[100 * row + i for i in range(tokens - row % 2 or 1)] for row in range(3)])
        model.decode([7, 8, 9])


@pytest.mark.parametrize("backend", CPU_BACKENDS, indirect=True)
@pytest.mark.parametrize("rows", [12, 40, 50])
def test_many_rows_share_a_prompt(rows, backend):
    """Few enough for one pass of the native kernel, for two, and more than it takes."""
    model = OneLayer("gqa 3", torch.float32, CALLS["plain"], backend, block_size=16)
    model.packed([[*range(35), row] for row in range(rows)])
    for step in range(2):
        model.decode([step] * rows)


@pytest.mark.parametrize("backend", CPU_BACKENDS, indirect=True)
@pytest.mark.parametrize("length", [1, 63, 300, 1000])
def test_long_prompts(length, backend):
    model = OneLayer("gqa 4", torch.float32, {}, backend, block_size=16)
    model.packed([list(range(length)), [*range(length // 2), -1]], chunk_tokens=256)
    for step in range(20):
        model.decode([step, step])


@pytest.mark.parametrize("call", ["plain", "softcap"])
@pytest.mark.parametrize("is_measured", [True, False])
def test_where_nobody_has_measured_it_torch_takes_prompts(is_measured, call, all_variants, monkeypatch):
    """But with a softcap, which torch's own flash attention does not do."""
    available, taken = all_variants._replace(multiplies=is_measured), []
    monkeypatch.setattr("hf_paged.backends.native.native_kernels", lambda: available)
    attend = NativeKernel.attend
    monkeypatch.setattr(NativeKernel, "attend", lambda self, *args: taken.append(args) or attend(self, *args))
    model = OneLayer("gqa 3", torch.float32, CALLS[call], "cpu")
    model.packed([list(range(50))])
    assert len(taken) == (is_measured or call == "softcap")
    model.decode([1])
    assert len(taken) == 1 + (is_measured or call == "softcap")


@pytest.mark.parametrize("name", TRITON_CASES)
def test_triton(name):
    obstacle = triton_obstacle(TRITON_DEVICE)
    if obstacle:
        pytest.skip(obstacle)
    shape, dtype, call, pool = TRITON_CASES[name]
    short_story(OneLayer(shape, dtype, CALLS[call], "triton", device=TRITON_DEVICE, **pool))
