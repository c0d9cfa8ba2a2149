"""What a patched model counts, and the table that people read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hf_paged.core.forks import new_lock


@dataclass(frozen=True, kw_only=True)
class PagedStats:
    """Counters since patching or the last `reset_stats()`, and gauges that are true now.

    Always `prompt_tokens == computed_tokens + reused_tokens + shared_tokens`.

    Attributes:
        prompt_tokens: real prompt tokens asked for; padding left out, every row counted.
        computed_tokens: prompt tokens that went through the model.
        reused_tokens: prompt tokens taken from earlier calls.
        shared_tokens: prompt tokens computed once in their call for several rows.
        generated_tokens: new tokens returned, padding left out.
        replayed_steps: decode steps that were CUDA graphs.
        copied_blocks: blocks copied on write.
        evicted_blocks: cached blocks given up for their memory.
        offloaded_bytes, fetched_bytes: moved to and from lower tiers; what is read there counts at every step.
        fetch_choices, recompute_choices: how often lower tiers had what a prompt begins with, and it was fetched, or
            held to be computed in less time.
        fallbacks: reason -> calls that took the slower padded path, were handed to stock, or could not reuse prefixes;
            why decode steps were no CUDA graphs; what went wrong with lower tiers.
        blocks_in_use, bytes_in_use: held by running sequences, on the model's devices.
        blocks_cached, blocks_host, blocks_disk: kept for later calls, per tier; those of running sequences that lie on
            the host are among `blocks_host`.
        bytes_reserved: all memory held for KV on the model's devices.
        host_bytes_per_second, disk_bytes_per_second, compute_tokens_per_second: the estimates that such choices go by;
            0 before anything was measured, which needs a lower tier.
    """

    prompt_tokens: int = 0
    computed_tokens: int = 0
    reused_tokens: int = 0
    shared_tokens: int = 0
    generated_tokens: int = 0
    replayed_steps: int = 0
    copied_blocks: int = 0
    evicted_blocks: int = 0
    offloaded_bytes: int = 0
    fetched_bytes: int = 0
    fetch_choices: int = 0
    recompute_choices: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    blocks_in_use: int = 0
    blocks_cached: int = 0
    blocks_host: int = 0
    blocks_disk: int = 0
    bytes_in_use: int = 0
    bytes_reserved: int = 0
    host_bytes_per_second: float = 0.0
    disk_bytes_per_second: float = 0.0
    compute_tokens_per_second: float = 0.0


class Counters:
    """The counters of one model, safe to add to from several threads."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._counts: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()

    def add(self, **counts: int) -> None:
        """Add to the counters of these names."""
        with self._lock:
            self._counts = self._counts + Counter(counts)  # all of them at once: Ctrl-C may come at any time

    def fall_back(self, reason: str) -> None:
        """Count a call that left the fast path, and why."""
        with self._lock:
            self._fallbacks[reason] += 1

    def reset(self) -> None:
        """Back to zero."""
        with self._lock:
            self._counts.clear()
            self._fallbacks.clear()

    def snapshot(self, **gauges: float) -> PagedStats:
        """The counters as they are, with `gauges` beside them."""
        with self._lock:
            return PagedStats(**self._counts, fallbacks=dict(self._fallbacks), **gauges)


def format_bytes(count: float) -> str:
    """`count` bytes for a person to read."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def format_table(stats: PagedStats, title: str) -> str:
    """A plain-text table of `stats`."""
    prompt = stats.prompt_tokens
    saved = stats.reused_tokens + stats.shared_tokens
    rows = [
        ("prompt tokens", f"{prompt:,}"),
        ("  computed", f"{stats.computed_tokens:,}"),
        ("  shared within a call", f"{stats.shared_tokens:,}"),
        ("  reused from earlier calls", f"{stats.reused_tokens:,}"),
        ("  not computed", f"{saved / prompt:.0%}" if prompt else "-"),
        ("generated tokens", f"{stats.generated_tokens:,}"),
        ("blocks in use / cached", f"{stats.blocks_in_use:,} / {stats.blocks_cached:,}"),
        ("blocks on host / disk", f"{stats.blocks_host:,} / {stats.blocks_disk:,}"),
        ("bytes in use / reserved", f"{format_bytes(stats.bytes_in_use)} / {format_bytes(stats.bytes_reserved)}"),
        ("blocks copied on write / evicted", f"{stats.copied_blocks:,} / {stats.evicted_blocks:,}"),
    ]
    if stats.blocks_host or stats.blocks_disk or stats.offloaded_bytes:
        moved = map(format_bytes, (stats.offloaded_bytes, stats.fetched_bytes))
        read = (stats.host_bytes_per_second, stats.disk_bytes_per_second)
        speeds = [f"{format_bytes(each)}/s" for each in read] + [f"{stats.compute_tokens_per_second:,.0f} tokens/s"]
        rows += [
            ("bytes offloaded / fetched", " / ".join(moved)),
            ("prefixes fetched / computed anew", f"{stats.fetch_choices:,} / {stats.recompute_choices:,}"),
            ("speed of host / disk / computing", " / ".join(speeds)),
        ]
    if stats.replayed_steps:
        rows.append(("decode steps from CUDA graphs", f"{stats.replayed_steps:,}"))
    rows += [(f"fallback: {reason}", f"{calls:,} calls") for reason, calls in sorted(stats.fallbacks.items())]
    if not stats.fallbacks:
        rows.append(("fallbacks", "none"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])
