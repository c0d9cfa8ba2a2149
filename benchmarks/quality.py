"""``python -m benchmarks.quality``: what each ``kv_cache_dtype`` does to SmolLM2's answers on real text."""

from __future__ import annotations

import sys

import torch
from rich.table import Table

from hf_paged.quality import Quality, measure
from hf_paged_kernels import FORMATS, KVRecords

from . import environment, report, smollm2
from .text import corpus

LIMITS = {"int8": 0.002, "fp8": 0.002, "int4": 0.05}
"""Largest mean KL divergence from full precision, in nats, that a format may have to be offered."""
TOKENS = 4096


def bytes_of_bfloat16(name: str, dim: int) -> float:
    """Bytes of a token's K and V in a format, as a part of what bfloat16 takes."""
    records = KVRecords(FORMATS[name], dim, dim)
    return (records.key_bytes + records.value_bytes) / (4 * dim)


def rows(found: dict[str, Quality], dim: int) -> list[dict[str, object]]:
    """The table as data, full precision first."""
    return [
        {
            "kv_cache_dtype": name,
            "mean_kl": each.mean_kl,
            "limit": LIMITS.get(name),
            "perplexity": each.perplexity,
            "of_bfloat16": bytes_of_bfloat16(name, dim) if name in FORMATS else None,
        }
        for name, each in found.items()
    ]


def markdown(listed: list[dict[str, object]], described: dict[str, object], tokens: int) -> str:
    """The table for people."""
    lines = [
        "# Quality of quantized KV",
        "",
        f"SmolLM2-135M-Instruct in float32 on {tokens:,} tokens of text, on stock's cache rounded by each format",
        "(`make bench-quality`). KL divergence of the next token from full precision: mean over the tokens, in nats.",
        f"torch {described['versions']['torch']}, transformers {described['versions']['transformers']}.",
        "",
        "| `kv_cache_dtype` | bytes, of bfloat16's | mean KL | allowed | perplexity |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in listed:
        size = "1 (bfloat16), 2 (float32)" if row["of_bfloat16"] is None else f"{row['of_bfloat16']:.3f}"
        limit = "" if row["limit"] is None else f"{row['limit']}"
        lines.append(
            f"| `{row['kv_cache_dtype']}` | {size} | {row['mean_kl']:.6f} | {limit} | {row['perplexity']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def table(listed: list[dict[str, object]]) -> Table:
    """The same in colours."""
    made = Table(title="Mean KL divergence from full precision, perplexity", title_justify="left")
    for name in ("kv_cache_dtype", "mean KL", "allowed", "perplexity"):
        made.add_column(name, justify="right")
    for row in listed:
        is_good = row["limit"] is None or row["mean_kl"] < row["limit"]
        kl = report.coloured(f"{row['mean_kl']:.6f}", is_good)
        made.add_row(row["kv_cache_dtype"], kl, str(row["limit"] or "—"), f"{row['perplexity']:.4f}")
    return made


def main() -> int:
    """Measure, print, write; the exit status is 1 where a limit was passed."""
    parser = environment.parser("benchmarks.quality", __doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    options = environment.parse(parser)
    model = smollm2.load_model()
    tokens = torch.tensor(corpus(smollm2.load_tokenizer())[: options.tokens])
    listed = rows(measure(model, tokens, list(FORMATS.values())), model.config.head_dim)
    described, console = environment.describe(), report.console()
    console.print(table(listed))
    stem = "quality" if options.tokens == TOKENS else "partial.quality"
    environment.save(options.out / f"{stem}.json", {"environment": described, "tokens": len(tokens), "formats": listed})
    (options.out / f"{stem}.md").write_text(markdown(listed, described, len(tokens)))
    console.print(f"Written: {options.out / stem}.json and .md")
    return int(any(row["limit"] is not None and not row["mean_kl"] < row["limit"] for row in listed))


if __name__ == "__main__":
    sys.exit(main())
