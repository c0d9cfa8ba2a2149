"""Cached prefixes to and from a folder: safetensors files, and a manifest that says what they belong to.

    folder/
      manifest.json                 whose K and V these are, and the SHA-256 of every file; replaced last, at once
      tokens-<sum>.safetensors      parents [pieces], lengths [pieces], tokens [tokens], kept [groups, pieces] bool
      layer-0000-<sum>.safetensors  keys, values [kv_heads, tokens, dim] of the pieces that the layer's group has kept
                                    (like_key, like_value [0, dim] beside records: dtype and dim of what these hold)
      ...

A piece is what one block held: the tokens that follow those of its parent, an earlier piece or none (-1). Names carry
the beginning of the content's sum, so writing never touches the files of the manifest that is still in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_paged.core.blocks import NULL_BLOCK, OutOfBlocks
from hf_paged.core.chain import Run
from hf_paged.core.forks import new_lock
from hf_paged.core.manager import BlockManager
from hf_paged.core.plan import Pin, StepPlan, strided_writes
from hf_paged.core.prefix import Entry, chain_key, pack_tokens, unpack_tokens
from hf_paged.identity import describe_circumstances, describe_config, encodable, fingerprint
from hf_paged.pool import KVPool
from hf_paged.prefixes import PrefixRoot
from hf_paged.store import run_slots

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "hf_paged prefixes", 4
_CHUNK_BYTES = 2**22


# Threads may save to one folder: each lists what is there, and removes what it does not list itself.
_saving = new_lock()


def save_prefixes(model: PreTrainedModel, pool: KVPool, root: PrefixRoot, folder: Path) -> int:
    """Write every prefix indexed under `root`; returns the number of tokens. Whole or not at all.

    The blocks cannot be given up meanwhile, whoever else needs memory. Raises `ValueError` where the model changes.
    """
    with _saving, _listed_or_gone(folder) as new:
        return _save(model, pool, root, folder, new)


def _save(model: PreTrainedModel, pool: KVPool, root: PrefixRoot, folder: Path, new: set[str]) -> int:
    entries, pins = pool.manager.hold_prefixes(root.key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = _listed_files(folder)
        files = {}
        for stem, tensors in _contents(pool, entries):
            name, content_sum, num_bytes = _write(folder, stem, tensors, new)
            files[name] = {"sha256": content_sum, "bytes": num_bytes}
    finally:
        pool.manager.unpin(pins[::-1])
    num_tokens = sum(entry.num_tokens for entry in entries if any(entry.blocks))
    manifest = {
        **_description(model, pool),
        "cache_salt": root.salt,
        "num_tokens": num_tokens,
        "files": files,
        "versions": {name: _version(name) for name in ("hf-paged", "torch", "transformers")},  # for people
    }
    if root.identity.digest() != root.digest:
        raise ValueError("save: the model has changed meanwhile; nothing was saved")
    manifest = json.loads(json.dumps(manifest, default=encodable))
    _replace(folder / MANIFEST, json.dumps({**manifest, "sha256": _sum_of(manifest)}, indent=1).encode())
    _remove(folder, before.difference(files))
    return num_tokens


@contextmanager
def _listed_or_gone(folder: Path) -> Iterator[set[str]]:
    """For the names of new files, which go again where something fails before a manifest lists them."""
    new: set[str] = set()
    try:
        yield new
    except BaseException:
        _remove(folder, new - _listed_files(folder))
        raise


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _listed_files(folder: Path) -> set[str]:
    """The files of the manifest that is there, if one is and can be read."""
    try:
        return {name for name in json.loads((folder / MANIFEST).read_bytes())["files"] if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def read_manifest(model: PreTrainedModel, pool: KVPool, folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are whole and belong to `model` as it is now, stored as `pool` stores it.

    Raises `ValueError` that names the file that is missing or damaged, or says what differs.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        content_sum = manifest.pop("sha256")
    except FileNotFoundError:
        raise ValueError(f"folder: {path} does not exist; it is what model.paged.save(folder) writes last") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path} is damaged; save the prefixes again") from None
    if content_sum != _sum_of(manifest):
        raise ValueError(f"{path} is damaged; save the prefixes again")
    _check_owner(model, pool, manifest)
    for name, expected in manifest["files"].items():
        _check_file(folder / name, expected)
    return manifest


def load_prefixes(pool: KVPool, root: bytes, folder: Path, files: Iterable[str], device: torch.device) -> int:
    """Take what the files hold into the pool, indexed under `root`, as far as blocks suffice; returns the tokens.

    `device` is where the layers lie whose memory the pool has not made yet.
    """
    *layers, pieces = [load_file(folder / name) for name in sorted(files)]
    for index, layer in enumerate(layers):
        store = pool.stores[index]
        target = device if store is None else store.keys.device
        layers[index] = {name: tensor.to(target) for name, tensor in layer.items()}
    kept = pieces["kept"].repeat_interleave(pieces["lengths"], dim=1)
    rows = torch.where(kept, kept.cumsum(dim=1) - 1, -1)
    manager = pool.manager
    loaded: set[int] = set()
    pins: list[Pin] = []
    try:
        for tokens, sources in _sequences(pieces):
            blocks = _take(manager, root, tokens, rows[:, sources])
            pins += [(group, block) for each in blocks for group, block in enumerate(each.blocks) if block]
            for index, layer in enumerate(layers):
                _fill(pool, index, layer, blocks)
            for each in blocks:
                manager.index_blocks(each.parent, each.packed, each.blocks)
                kept = (each.rows >= 0).any(dim=0).tolist()
                loaded.update(source for source, is_kept in zip(sources[each.start :], kept, strict=False) if is_kept)
            manager.index.prune(root if not blocks else chain_key(blocks[-1].parent, blocks[-1].packed))
            if sum(each.rows.shape[1] for each in blocks) < len(tokens):
                break
    finally:
        manager.unpin(pins[::-1])
    return len(loaded)


# -- writing -------------------------------------------------------------------------------------------------------


def _contents(pool: KVPool, entries: Sequence[Entry]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    number, groups = {entry.key: i for i, entry in enumerate(entries)}, range(len(pool.manager.pools))
    yield (
        "tokens",
        {
            "parents": torch.tensor(
                [number.get(entry.parent, -1) for entry in entries], dtype=torch.long, device="cpu"
            ),
            "lengths": torch.tensor([entry.num_tokens for entry in entries], dtype=torch.long, device="cpu"),
            "tokens": torch.tensor(
                [t for e in entries for t in unpack_tokens(e.tokens)], dtype=torch.long, device="cpu"
            ),
            "kept": torch.tensor(
                [[e.blocks[group] > 0 for e in entries] for group in groups], dtype=torch.bool, device="cpu"
            ),
        },
    )
    for index, store in enumerate(pool.stores):
        if entries and store is not None:
            held = [(e.blocks[store.group], e.num_tokens) for e in entries]
            runs = [Run(block * pool.block_size, num_tokens) for block, num_tokens in held if block]
            keys, values = store.gather(run_slots(runs, store.keys.device))
            tensors = {"keys": keys.cpu(), "values": values.cpu()}
            if store.records is not None:
                tensors["like_key"] = torch.empty(0, store.key_dim, dtype=store.dtype, device="cpu")
                tensors["like_value"] = torch.empty(0, store.value_dim, dtype=store.value_dtype, device="cpu")
            yield f"layer-{index:04d}", tensors


def _write(folder: Path, stem: str, tensors: dict[str, torch.Tensor], new: set[str]) -> tuple[str, str, int]:
    """Name, sum and size of the file that now holds `tensors`; among `new` if no such file was there."""
    scratch = _scratch(folder, stem)
    try:
        save_file(tensors, scratch)
        content_sum = _sum_of_file(scratch)
        name = f"{stem}-{content_sum[:16]}.safetensors"
        num_bytes = scratch.stat().st_size
        if not (folder / name).exists():
            new.add(name)
        os.replace(scratch, folder / name)
    finally:
        scratch.unlink(missing_ok=True)
    return name, content_sum, num_bytes


def _replace(path: Path, content: bytes) -> None:
    scratch = _scratch(path.parent, path.name)
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _scratch(folder: Path, stem: str) -> Path:
    """A name that nobody else writes to; processes of several containers may have one number."""
    return folder / f".{stem}.{secrets.token_hex(8)}.tmp"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return "not installed"


# -- checking ------------------------------------------------------------------------------------------------------


def _description(model: PreTrainedModel, pool: KVPool) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": "auto" if pool.kv_format is None else pool.kv_format.name,
        "config": describe_config(model),
        "circumstances": describe_circumstances(model),
        "weights": fingerprint(model),
    }


def _check_owner(model: PreTrainedModel, pool: KVPool, manifest: dict[str, Any]) -> None:
    mine = json.loads(json.dumps(_description(model, pool), default=encodable))
    for name, value in mine.items():
        theirs = manifest.get(name)
        if theirs == value:
            continue
        if name == "config" and isinstance(theirs, dict):
            fields = sorted(key for key in {*theirs, *value} if theirs.get(key) != value.get(key))
            raise ValueError(f"the saved prefixes belong to a model with another config: {', '.join(fields)} differ")
        if name == "weights":
            raise ValueError("the saved prefixes belong to a model with other weights or adapters")
        raise ValueError(f"the saved prefixes have {name} {theirs}, this model has {value}")


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    try:
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(f"{path} is truncated or damaged; save the prefixes again")
        content_sum = _sum_of_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; save the prefixes again") from None
    if content_sum != expected["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not what {MANIFEST} says; save the prefixes again")


def _sum_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sum_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# -- reading -------------------------------------------------------------------------------------------------------


def _sequences(pieces: dict[str, torch.Tensor]) -> Iterator[tuple[list[int], list[int]]]:
    """The saved sequences, from pieces that nothing follows back to their roots: token ids, and where they lie."""
    parents, tokens = pieces["parents"].tolist(), pieces["tokens"].tolist()
    ends = pieces["lengths"].cumsum(0)
    starts, ends = (ends - pieces["lengths"]).tolist(), ends.tolist()
    for leaf in sorted(set(range(len(parents))).difference(parents)):
        sources: list[int] = []
        piece = leaf
        while piece >= 0:
            sources[:0] = range(starts[piece], ends[piece])
            piece = parents[piece]
        yield [tokens[source] for source in sources], sources


class _Block(NamedTuple):
    """A block of a saved sequence: its tokens from number `start` on, the blocks of each group, which of them are new.

    `rows [groups, tokens]` says where each token lies in a layer's K and V, -1 where its group has not kept it.
    """

    parent: bytes
    packed: bytes
    start: int
    rows: torch.Tensor
    blocks: list[int]
    is_new: list[bool]


def _take(manager: BlockManager, root: bytes, tokens: list[int], rows: torch.Tensor) -> list[_Block]:
    """Pinned blocks for one sequence, as far as they suffice: in the groups that have kept all that a block holds."""
    taken: list[_Block] = []
    parent, blocks = root, [NULL_BLOCK] * len(manager.pools)
    with manager.lock:
        for start in range(0, len(tokens), manager.block_size):
            packed = pack_tokens(tokens[start : start + manager.block_size])
            here = rows[:, start : start + manager.block_size]
            try:
                blocks, is_new = manager.take_blocks(parent, packed, (here >= 0).all(dim=1).tolist(), blocks)
            except OutOfBlocks:
                break
            taken.append(_Block(parent, packed, start, here, blocks, is_new))
            parent = chain_key(parent, packed)
    return taken


def _fill(pool: KVPool, index: int, layer: dict[str, torch.Tensor], blocks: Sequence[_Block]) -> None:
    """Write one layer's K and V of the blocks that are new."""
    group = pool.layer_groups[index]
    new = [each for each in blocks if each.is_new[group]]
    if not new:
        return
    picked = torch.cat([each.rows[group] for each in new]).to(layer["keys"].device)
    key, value = (layer[name].index_select(1, picked).unsqueeze(0) for name in ("keys", "values"))
    slots = [each.blocks[group] * pool.block_size + i for each in new for i in range(each.rows.shape[1])]
    store = pool.layer(index, *(_like(layer, name, each) for name, each in (("key", key), ("value", value))))
    store.write_stored(StepPlan(len(slots), strided_writes(slots), [], [], [], [], 0), key, value)


def _like(layer: dict[str, torch.Tensor], name: str, stored: torch.Tensor) -> torch.Tensor:
    """A tensor as K or V of the layer come, where these are `stored [1, kv_heads, n, dim or record bytes]`."""
    like = layer.get(f"like_{name}")
    return stored if like is None else like.new_empty(1, stored.shape[1], 1, like.shape[1])
