"""transformers' own continuous batching (what ``generate_batch`` runs) on the same work, where it can do it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from .measure import Work

PAGE_SIZE = 256
MAX_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class PeerRun:
    """Seconds, or why there are none; and the share of tokens equal to stock's where both are greedy."""

    seconds: float | None
    note: str = ""
    equal_share: float | None = None


def run_peer(model: PreTrainedModel, work: Work, expected: list[list[int]]) -> PeerRun:
    """Run once. ``expected`` are stock's new tokens, row by row."""
    if work.scenario.arguments.get("num_beams", 1) > 1:
        return PeerRun(None, "continuous batching has no beam search")
    try:
        return continuous_batching(model, work, expected)
    except Exception as error:  # whatever it is, the reason belongs in the table
        return PeerRun(None, f"{type(error).__name__}: {error}")


def continuous_batching(model: PreTrainedModel, work: Work, expected: list[list[int]]) -> PeerRun:
    """What ``generate_batch`` does, with a length per request, which it does not take.

    The decode part runs from the moment every row has its first token, which flatters it: tokens that other rows made
    while a prompt was still being read are not counted.
    """
    scenario = work.scenario
    ends = scenario.ends or (scenario.new,) * len(scenario.own)
    arguments = {"do_sample": False, **scenario.arguments}
    copies = arguments.get("num_return_sequences", 1)
    begin = time.perf_counter()
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(max_new_tokens=scenario.new, eos_token_id=-1, pad_token_id=0, **arguments),
        continuous_batching_config=cache_for(work),
        block=True,
        timeout=5,
    ) as manager:
        for i, prompt in enumerate(work.prompts):
            manager.add_request(
                prompt, request_id=f"row{i}", max_new_tokens=ends[i], record_timestamps=True, eos_token_id=-1
            )
        results = {}
        while len(results) < len(ends) * copies:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                results[result.request_id] = result
            elif result is None and not manager.is_running():
                raise RuntimeError("the generation thread ended early")
    end = time.perf_counter()
    errors = [result.error for result in results.values() if result.error]
    if errors:
        raise RuntimeError(errors[0])
    stamps = [result.timestamps for result in results.values()]
    decode = max(s[-1] for s in stamps) - max(s[0] for s in stamps)
    share = None
    if not arguments["do_sample"]:
        made = [results[f"row{i}"].generated_tokens for i in range(len(ends))]
        pairs = [x == y for a, b in zip(made, expected, strict=True) for x, y in zip(a, b[: len(a)], strict=True)]
        share = sum(pairs) / len(pairs)
    return PeerRun(decode if scenario.timed == "decode" else end - begin, "", share)


def cache_for(work: Work) -> ContinuousBatchingConfig:
    """Return room for the whole work; left alone, it would take 90 % of the machine's memory."""
    copies = work.scenario.arguments.get("num_return_sequences", 1)
    pages = sum(-(-(len(prompt) + work.scenario.new) // PAGE_SIZE) + 1 for prompt in work.prompts)
    return ContinuousBatchingConfig(
        page_size=PAGE_SIZE, num_blocks=copies * pages + 4, max_batch_tokens=MAX_BATCH_TOKENS
    )
