"""Compiles the Triton kernels for a GPU that need not be there: `python compile_kernels.py [capability] [--all]`.

Triton brings an assembler, so what a GPU would run is made to the end, which the interpreter does not do: types, shapes
of tiles, shared memory. Prints a line per kernel; with `--all`, for every dtype and shape of heads below.
"""

import inspect
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_paged_kernels import FORMATS, KVRecords, attend, copy, move, store
from hf_paged_kernels.device_formats import constants_of
from hf_paged_kernels.packed import is_packed
from hf_paged_kernels.tuning import PAGE_TOKENS, Tile, padded_dim, tiles_for
from hf_paged_kernels.work import ITEM_NUMBERS

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SHAPES = [(128, 128, 4), (64, 64, 3), (80, 80, 1), (192, 128, 1), (256, 256, 2), (96, 96, 16), (576 // 3, 128, 32)]
# Shared memory per block of a GPU of this capability, in bytes.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
NO_TILE = Tile(rows=0, tokens=0, warps=4, stages=3)
MEMORIES = ("p_key", "p_value", "p_keys", "p_values", "p_to_keys", "p_to_values")
PLAIN = {"HAS_SINKS": False, "HAS_SOFTCAP": False, "HAS_WINDOW": False}


def compile_kernel(kernel, capability, types, constants, tile=NO_TILE, odd_strides=(), **options):
    """Compile for `capability`; pointers and all but `odd_strides` are multiples of 16, as they are in practice."""
    signature, constexprs, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(inspect.signature(kernel.fn).parameters.items()):
        if name in constants or parameter.annotation in (triton.language.constexpr, "tl.constexpr"):
            signature[name], constexprs[index,] = "constexpr", constants[name]
        elif name.startswith("p_"):
            signature[name], attributes[index,] = "*" + types.get(name, "i32"), [["tt.divisibility", 16]]
        else:
            signature[name] = types.get(name, "i32")
            if name.startswith("stride") and name not in odd_strides:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options |= {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    assert made.metadata.shared <= SHARED_BYTES[capability], f"{made.metadata.shared} bytes of shared memory"
    print(kernel.fn.__name__, constants, f"{made.metadata.shared} bytes of shared memory", flush=True)


def compile_attend(capability, dtype, key_dim, value_dim, group, tile, is_final, kv_format=None, **features):
    kind = TYPES[dtype]
    records = None if kv_format is None else KVRecords(kv_format, key_dim, value_dim)
    types = {"scale": "fp32", "softcap": "fp32", "p_lse": "fp32", "p_sinks": kind}
    types |= {"p_query": kind, "p_out": kind if is_final else "fp32"}
    types |= dict.fromkeys(("p_keys", "p_values"), kind if records is None else "u8")
    constants = {
        "KEY_STRIDE": key_dim if records is None else records.key_bytes,
        "VALUE_STRIDE": value_dim if records is None else records.value_bytes,
        "GROUP": group,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_KEY": padded_dim(key_dim),
        "BLOCK_VALUE": padded_dim(value_dim),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_TOKENS": tile.tokens,
        "PAGE": PAGE_TOKENS,
        "ITEM": ITEM_NUMBERS,
        "STAGES": tile.stages,
        "IS_FINAL": is_final,
        "INTERPRETED": False,
        **constants_of(records),
        "IS_PACKED": is_packed(records, dtype, tile.rows),
        **PLAIN,
        **features,
    }
    constants |= {"p_lse": None} if is_final else {}
    constants |= {} if constants["HAS_SINKS"] else {"p_sinks": None}
    compile_kernel(attend._attend_kernel, capability, types, constants, tile, odd_strides(records))


def odd_strides(records):
    """Of memory that holds records: multiples of four only."""
    sides = ("key", "value", "keys", "values")
    return () if records is None else [f"stride_{side}_{dim}" for side in sides for dim in ("head", "slot")]


def compile_store(capability, dtype, key_dim, value_dim, kv_format=None):
    records = None if kv_format is None else KVRecords(kv_format, key_dim, value_dim)
    types = {name: TYPES[dtype] if records is None or name in ("p_key", "p_value") else "u8" for name in MEMORIES}
    constants = {
        "HEADS": 8,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_HEADS": 8,
        "BLOCK_KEY": padded_dim(key_dim),
        "BLOCK_VALUE": padded_dim(value_dim),
        **constants_of(records),
    }
    compile_kernel(
        store._store_kernel, capability, types, constants, NO_TILE, odd_strides(records), enable_fp_fusion=False
    )


def main(capability, everything):
    dims = {"KEY_DIM": 128, "VALUE_DIM": 128, "BLOCK_KEY": 128, "BLOCK_VALUE": 128}
    copies = {**dims, "COPY": 4, "BLOCK_TOKENS": 32, "INTERPRETED": False}
    compile_kernel(copy._copy_kernel, capability, dict.fromkeys(MEMORIES, "bf16"), copies)
    types = {"p_pieces": "i64", "p_blocks": "i64", "p_records": "i64"}
    moved = {"PIECE": 3, "WORD": triton.language.int64, "WORD_BYTES": 8, "TILE": 512, "INTERPRETED": False}
    for to_records in (True, False):
        compile_kernel(move._move_kernel, capability, types, moved | {"TO_RECORDS": to_records})
    merged = {"VALUE_DIM": 128, "BLOCK_VALUE": 128, "BLOCK_PARTS": 16, "HAS_SINKS": True, "INTERPRETED": False}
    types = {"p_parts_out": "fp32", "p_parts_lse": "fp32", "p_out": "bf16", "p_sinks": "bf16"}
    compile_kernel(attend._merge_kernel, capability, types, merged)
    everywhere = {"HAS_SINKS": True, "HAS_SOFTCAP": True, "HAS_WINDOW": True}
    for kv_format in (None, *FORMATS.values()):
        compile_store(capability, torch.bfloat16, 128, 128, kv_format)
    if not everything:
        decode, *_, prefill = tiles_for(torch.bfloat16, 128, 128, 4)
        compile_attend(capability, torch.bfloat16, 128, 128, 4, decode, False)
        compile_attend(capability, torch.bfloat16, 128, 128, 4, prefill, True, **everywhere)
        for name, kv_format in FORMATS.items():
            decode, *_, prefill = tiles_for(torch.bfloat16, 128, 128, 4, name)
            compile_attend(capability, torch.bfloat16, 128, 128, 4, decode, False, kv_format)
        compile_attend(capability, torch.bfloat16, 128, 128, 4, prefill, True, kv_format, **everywhere)
        return
    for dtype in TYPES:
        for key_dim, value_dim, group in SHAPES:
            for kv_format in FORMATS.values():
                compile_store(capability, dtype, key_dim, value_dim, kv_format)
            for name in (None, *FORMATS):
                for tile in tiles_for(dtype, key_dim, value_dim, group, name):
                    shape = dtype, key_dim, value_dim, group, tile
                    if name is None:
                        compile_attend(capability, *shape, False)
                    compile_attend(capability, *shape, True, FORMATS.get(name), **everywhere)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    main(numbers[0] if numbers else 90, "--all" in sys.argv)
