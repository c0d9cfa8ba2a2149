"""`PagedStats` for Prometheus. Needs prometheus-client, which comes with the extra `serve`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# Fields of `PagedStats`, and what scrapers are told about them.
COUNTERS = {
    "prompt_tokens": "Real prompt tokens asked for",
    "computed_tokens": "Prompt tokens that went through the model",
    "reused_tokens": "Prompt tokens taken from earlier calls",
    "shared_tokens": "Prompt tokens computed once in their call for several rows",
    "generated_tokens": "New tokens returned",
    "replayed_steps": "Decode steps that were CUDA graphs",
    "copied_blocks": "Blocks copied on write",
    "evicted_blocks": "Cached blocks given up for their memory",
    "offloaded_bytes": "Bytes moved to lower tiers",
    "fetched_bytes": "Bytes moved back from lower tiers",
    "fetch_choices": "Prefixes on a lower tier that were fetched",
    "recompute_choices": "Prefixes on a lower tier that were computed anew, being quicker",
}
GAUGES = {
    "blocks_in_use": "Blocks held by running sequences",
    "blocks_cached": "Blocks kept for later calls",
    "blocks_host": "Blocks in host memory",
    "blocks_disk": "Blocks kept on disk",
    "bytes_in_use": "Bytes of the blocks held by running sequences",
    "bytes_reserved": "Bytes held for K and V on the model's devices",
    "host_bytes_per_second": "Measured speed of fetching from host memory",
    "disk_bytes_per_second": "Measured speed of fetching from disk",
    "compute_tokens_per_second": "Measured speed of computing prompts",
}


class PagedCollector(Collector):
    """A custom collector of patched models' statistics, each read when it is scraped: `hf_paged_...{model="..."}`.

    Args:
        models: gives the patched models there are now, by the name that scrapers see.
    """

    def __init__(self, models: Callable[[], Mapping[str, Any]]):
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """One family of samples for each field."""
        stats = {name: model.paged.stats() for name, model in self._models().items()}
        for families, fields in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for field, meaning in fields.items():
                family = families(f"hf_paged_{field}", meaning, labels=["model"])
                for name, each in stats.items():
                    family.add_metric([name], getattr(each, field))
                yield family
        family = CounterMetricFamily("hf_paged_fallbacks", "Calls off the fast path", labels=["model", "reason"])
        for name, each in stats.items():
            for reason, calls in each.fallbacks.items():
                family.add_metric([name, reason], calls)
        yield family
