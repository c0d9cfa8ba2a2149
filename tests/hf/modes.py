"""Generation modes as data: what to feed `generate`, and with which arguments."""

import copy
from collections.abc import Callable

import prompts
import torch
from families import BOS, Family
from mode_parts import (
    NEW,
    Mode,
    Outcome,
    RecordingStreamer,
    RowsEnd,
    Run,
    ShiftLogits,
    allowed_tokens,
    draft,
    ends_of_rows,
    prompt_length,
)
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

MODES: dict[str, Mode] = {}


def mode(inputs: Callable[[], dict], **options):
    """Registers the decorated `call` under its own name."""

    def register(call):
        MODES[call.__name__] = Mode(call.__name__, inputs, call, **options)
        return call

    return register


def simple(
    name: str, inputs: Callable[[], dict], *, copies: int = 1, plain: bool = True, greedy: bool = True, **kwargs
):
    """Registers a mode that is one `generate` call with these arguments; callables in them are called for each run."""

    def call(run: Run) -> Outcome:
        outcome = Outcome()
        arguments = {key: value(run) if callable(value) else value for key, value in kwargs.items()}
        outcome.add(run.generate(**{"do_sample": False, "max_new_tokens": NEW, **arguments}))
        return outcome

    MODES[name] = Mode(name, inputs, call, plain=plain, copies=copies, greedy=greedy)


# Greedy

simple("greedy_single", prompts.single)
simple("greedy_without_mask", prompts.single_without_mask)
simple("greedy_ragged", prompts.ragged)
simple("greedy_int32", prompts.ragged_int32)
simple("greedy_diverse", prompts.diverse)
simple("identical_rows", prompts.identical)
simple("shared_prefix", prompts.shared_prefix)
simple("one_new_token", prompts.shared_prefix, max_new_tokens=1)
simple("long", prompts.ragged, max_new_tokens=40)  # several blocks of new tokens, and past every small window
simple("from_bos", dict, bos_token_id=BOS)

# Sampling

simple("sampling", prompts.ragged, do_sample=True, temperature=1.3, greedy=False)
simple("sampling_filtered", prompts.single, do_sample=True, top_k=20, top_p=0.9, greedy=False)
simple("num_return_sequences", prompts.single, do_sample=True, num_return_sequences=3, copies=3, greedy=False)
simple("num_return_ragged", prompts.ragged, do_sample=True, num_return_sequences=2, copies=2, greedy=False)

# Beams

simple("beam", prompts.single, num_beams=3, copies=3, greedy=False)
simple("beam_ragged", prompts.ragged, num_beams=3, copies=3, greedy=False)
simple("beam_shared_prefix", prompts.shared_prefix, num_beams=2, copies=2, greedy=False)
simple("beam_sampling", prompts.ragged, num_beams=3, do_sample=True, copies=3, greedy=False)
simple("beam_return_two", prompts.ragged, num_beams=3, num_return_sequences=2, copies=3, greedy=False)
simple("beam_eos", prompts.ragged, num_beams=3, eos_token_id=ends_of_rows, copies=3, greedy=False)
simple(
    "beam_eos_early",
    prompts.ragged,
    num_beams=3,
    eos_token_id=ends_of_rows,
    early_stopping=True,
    length_penalty=0.5,
    copies=3,
    greedy=False,
)
simple(
    "beam_processors",
    prompts.ragged,
    num_beams=3,
    repetition_penalty=1.4,
    no_repeat_ngram_size=2,
    copies=3,
    greedy=False,
)
simple("beam_scores", prompts.ragged, num_beams=3, num_return_sequences=3, copies=3, greedy=False,
       return_dict_in_generate=True, output_scores=True, output_logits=True)  # fmt: skip

# Ends

simple("eos", prompts.ragged, eos_token_id=ends_of_rows)
simple("eos_sampling", prompts.ragged, eos_token_id=ends_of_rows, do_sample=True, greedy=False)
simple("criterion", prompts.ragged, stopping_criteria=lambda run: StoppingCriteriaList([RowsEnd(prompt_length(run))]))
simple("criterion_with_eos", prompts.ragged,
       stopping_criteria=lambda run: StoppingCriteriaList([RowsEnd(prompt_length(run), eos_token_id=2)]))  # fmt: skip
simple("min_new_tokens", prompts.ragged, eos_token_id=ends_of_rows, min_new_tokens=7)
simple("max_length", prompts.single, max_new_tokens=None, max_length=30)

# Logits

simple("prefix_allowed", prompts.ragged, prefix_allowed_tokens_fn=lambda run: allowed_tokens, greedy=False)
simple(
    "beam_prefix_allowed",
    prompts.ragged,
    num_beams=3,
    copies=3,
    prefix_allowed_tokens_fn=lambda run: allowed_tokens,
    greedy=False,
)
simple("repetition_penalty", prompts.ragged, repetition_penalty=1.5, greedy=False)
simple("no_repeat_ngram", prompts.single, no_repeat_ngram_size=2, greedy=False)
simple("own_processor", prompts.ragged, logits_processor=lambda run: LogitsProcessorList([ShiftLogits()]), greedy=False)
simple("guidance", prompts.single, guidance_scale=1.7, plain=False, greedy=False)
simple("guidance_negative_prompt", prompts.single, guidance_scale=1.7, plain=False, greedy=False,
       negative_prompt_ids=lambda run: torch.tensor([prompts.tokens(9, seed=80)]),
       negative_prompt_attention_mask=lambda run: torch.ones(1, 9, dtype=torch.long))  # fmt: skip

# Chunked prefill

simple("prefill_chunks", prompts.single, prefill_chunk_size=5)
simple("prefill_chunks_shared", prompts.shared_prefix, prefill_chunk_size=5)
simple("prefill_chunks_larger_than_prompt", prompts.single, prefill_chunk_size=64)

# Helpers that guess

simple("assisted_near", prompts.single, assistant_model=lambda run: draft(run, near=True), plain=False)
simple("assisted_stranger", prompts.single, assistant_model=lambda run: draft(run, near=False), plain=False)
simple(
    "assisted_patched_draft",
    prompts.single,
    assistant_model=lambda run: draft(run, near=True, patched=True),
    plain=False,
)
simple(
    "assisted_sampling",
    prompts.single,
    assistant_model=lambda run: draft(run, near=True),
    do_sample=True,
    plain=False,
    greedy=False,
)
simple(
    "assisted_eos",
    prompts.single,
    assistant_model=lambda run: draft(run, near=True),
    eos_token_id=ends_of_rows,
    plain=False,
)
simple(
    "prompt_lookup",
    lambda: prompts.batch([prompts.tokens(6) * 4]),
    prompt_lookup_num_tokens=4,
    eos_token_id=2,
    plain=False,
)
simple("early_exit", prompts.single, assistant_early_exit=1, plain=False)

# The user's choice of cache

simple("use_cache_false", prompts.ragged, use_cache=False, plain=False)
simple("static_cache", prompts.ragged, cache_implementation="static", plain=False)

# Unusual masks and positions

simple("right_padded", prompts.right_padded, plain=False)
simple("holes", prompts.holes, plain=False)
simple("beam_holes", prompts.holes, num_beams=2, copies=2, plain=False, greedy=False)


@mode(prompts.single)
def position_ids(run: Run) -> Outcome:
    outcome = Outcome()
    positions = torch.arange(run.inputs["input_ids"].shape[1])[None] * 2 + 3
    outcome.add(run.generate(position_ids=positions, do_sample=False, max_new_tokens=NEW))
    return outcome


@mode(prompts.single)
def inputs_embeds(run: Run) -> Outcome:
    outcome = Outcome()
    embeds = run.model.get_input_embeddings()(run.inputs["input_ids"]).detach()
    outcome.add(run.generate(inputs={"inputs_embeds": embeds}, do_sample=False, max_new_tokens=NEW))
    return outcome


@mode(prompts.ragged)
def inputs_embeds_ragged(run: Run) -> Outcome:
    outcome = Outcome()
    embeds = run.model.get_input_embeddings()(run.inputs["input_ids"]).detach()
    mask = run.inputs["attention_mask"]
    inputs = {"inputs_embeds": embeds, "attention_mask": mask}
    outcome.add(run.generate(inputs=inputs, do_sample=False, max_new_tokens=NEW))
    outcome.add(run.generate(inputs=inputs, num_beams=2, max_new_tokens=5))
    return outcome


# What a call returns


@mode(prompts.ragged, plain=True)
def scores_and_logits(run: Run) -> Outcome:
    outcome = Outcome()
    output = run.generate(do_sample=False, max_new_tokens=NEW, repetition_penalty=1.2,
                          return_dict_in_generate=True, output_scores=True, output_logits=True)  # fmt: skip
    outcome.add(output)
    outcome.notes += [type(output).__name__, sorted(output.keys())]
    return outcome


def _internals(run: Run, **wanted) -> Outcome:
    """Hidden states or attentions of every step: compared in shape everywhere, in value where tokens are real."""
    outcome = Outcome()
    output = run.generate(do_sample=False, max_new_tokens=4, return_dict_in_generate=True, **wanted)
    outcome.add(output)
    rows, width = run.inputs["input_ids"].shape
    mask = run.inputs.get("attention_mask", torch.ones(rows, width, dtype=torch.long)).bool()
    for name in ("hidden_states", "attentions", "decoder_hidden_states", "decoder_attentions", "cross_attentions"):
        for step in getattr(output, name, None) or ():
            for value in step:
                if value is None:
                    outcome.notes.append((name, None))
                    continue
                if name.endswith("states") and value.dim() == 4:  # gemma3n: several versions of a token, ahead of rows
                    value = value.movedim(0, -1)
                queries = value.shape[1] if name.endswith("states") else value.shape[2]
                real = mask if queries == width and "decoder" not in name else torch.ones(rows, queries).bool()
                moved = value if name.endswith("states") else value.transpose(1, 2)  # [rows, queries, ...]
                outcome.tensors.setdefault(name, []).append(moved)
                outcome.rows.setdefault(name, []).append(real)
    return outcome


@mode(prompts.single)
def hidden_states(run: Run) -> Outcome:
    return _internals(run, output_hidden_states=True)


@mode(prompts.ragged)
def hidden_states_ragged(run: Run) -> Outcome:
    return _internals(run, output_hidden_states=True)


@mode(prompts.ragged, attention="eager")
def attentions(run: Run) -> Outcome:
    return _internals(run, output_attentions=True)


@mode(prompts.shared_prefix, attention="eager")
def eager(run: Run) -> Outcome:
    outcome = Outcome()
    outcome.add(run.generate(do_sample=False, max_new_tokens=NEW))
    outcome.add(run.generate(num_beams=2, do_sample=False, max_new_tokens=NEW))
    return outcome


@mode(prompts.ragged, plain=True)
def streamer(run: Run) -> Outcome:
    outcome, recorder = Outcome(), RecordingStreamer()
    outcome.add(run.generate(do_sample=False, max_new_tokens=NEW, streamer=recorder, eos_token_id=ends_of_rows(run)))
    outcome.streamed = recorder.puts
    outcome.notes.append(recorder.ended)
    return outcome


# Going on from a cache


def _returned(run: Run, **kwargs):
    return run.generate(do_sample=False, max_new_tokens=6, return_dict_in_generate=True, **kwargs)


@mode(prompts.single)
def continue_whole_sequence(run: Run) -> Outcome:
    """Feed back everything, with one's own cache of all but the last token."""
    outcome = Outcome()
    first = _returned(run)
    outcome.add(first)
    for _ in range(2):
        whole = torch.cat([outcome.tokens[-1], torch.tensor([prompts.tokens(5, seed=70)])], dim=1)
        inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        outcome.add(_returned(run, inputs=inputs, past_key_values=outcome.caches[-1]))
    return outcome


@mode(prompts.ragged)
def continue_whole_ragged(run: Run) -> Outcome:
    outcome = Outcome()
    outcome.add(_returned(run))
    ids = outcome.tokens[-1]
    mask = torch.cat([run.inputs["attention_mask"], torch.ones(len(ids), 6, dtype=torch.long)], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    outcome.add(_returned(run, inputs=inputs, past_key_values=outcome.caches[-1]))
    return outcome


@mode(prompts.single)
def continue_new_tokens(run: Run) -> Outcome:
    """Feed back only what the cache has not seen, with a mask that covers everything."""
    outcome = Outcome()
    outcome.add(_returned(run))
    ids = outcome.tokens[-1]
    new = torch.cat([ids[:, -1:], torch.tensor([prompts.tokens(3, seed=71)])], dim=1)
    mask = torch.ones(1, ids.shape[1] - 1 + new.shape[1], dtype=torch.long)
    outcome.add(_returned(run, inputs={"input_ids": new, "attention_mask": mask}, past_key_values=outcome.caches[-1]))
    return outcome


@mode(prompts.ragged)
def continue_new_tokens_ragged(run: Run) -> Outcome:
    outcome = Outcome()
    outcome.add(_returned(run))
    ids = outcome.tokens[-1]
    new = torch.cat([ids[:, -1:], torch.tensor([prompts.tokens(3, seed) for seed in range(len(ids))])], dim=1)
    seen = torch.ones(len(ids), 6 + 3, dtype=torch.long)
    inputs = {"input_ids": new, "attention_mask": torch.cat([run.inputs["attention_mask"], seen], dim=1)}
    outcome.add(_returned(run, inputs=inputs, past_key_values=outcome.caches[-1]))
    return outcome


@mode(prompts.single)
def continue_twice_from_copies(run: Run) -> Outcome:
    """Two conversations branch off one cache: a deep copy each."""
    outcome = Outcome()
    outcome.add(_returned(run))
    cache, ids = outcome.caches[-1], outcome.tokens[-1]
    for seed in (72, 73):
        whole = torch.cat([ids, torch.tensor([prompts.tokens(4, seed)])], dim=1)
        inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        outcome.add(_returned(run, inputs=inputs, past_key_values=copy.deepcopy(cache)))
    return outcome


@mode(prompts.ragged)
def own_dynamic_cache(run: Run) -> Outcome:
    """The user's own cache is used, filled and returned: the same object."""
    outcome = Outcome()
    own = DynamicCache(config=run.model.config)
    output = _returned(run, past_key_values=own)
    outcome.add(output)
    outcome.notes += [output.past_key_values is own, type(own).__name__, own.get_seq_length()]
    outcome.tensors["keys"] = [layer.keys for layer in own.layers if getattr(layer, "keys", None) is not None]
    return outcome


# Somebody else's loop


def _greedy_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """A decoding loop as users write it for `custom_generate`: no `_prefill`, a plain call of the model each step."""
    unfinished = torch.ones(len(input_ids), dtype=torch.bool)
    length = None
    while unfinished.any():
        model_inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=length, **model_kwargs)
        outputs = model(**model_inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        scores = logits_processor(input_ids, outputs.logits[:, -1].float())
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=1)
        unfinished &= ~stopping_criteria(input_ids, None)
        length = 1
    return input_ids


simple("custom_generate", prompts.ragged, custom_generate=lambda run: _greedy_loop, plain=False)


# What does not apply. Rows: a family's name, tag or "*"; the modes; why.

ASSISTED = (
    "assisted_near assisted_stranger assisted_patched_draft assisted_sampling assisted_eos prompt_lookup early_exit"
)
CHUNKS = "prefill_chunks prefill_chunks_shared prefill_chunks_larger_than_prompt"
CONTINUE = (
    "continue_whole_sequence continue_whole_ragged continue_new_tokens continue_new_tokens_ragged "
    "continue_twice_from_copies"
)

EXCLUDED: list[tuple[str, str, str]] = [
    ("encoder_decoder", f"{CONTINUE} {CHUNKS} from_bos own_dynamic_cache position_ids inputs_embeds holes beam_holes "
     "inputs_embeds_ragged guidance guidance_negative_prompt early_exit right_padded prompt_lookup",
     "is about the decoder's prompt, and the prompt of an encoder-decoder goes to the encoder"),
    ("falcon_rotary", "attentions", "Falcon keeps sdpa whatever one sets, and adds its boolean mask to the scores"),
    ("falcon_alibi", "attentions", "Falcon keeps sdpa whatever one sets, and adds its boolean mask to the scores"),
]  # fmt: skip

# Pairs that stock transformers itself refuses, in some version: skipped where stock raises, run where it does not.
STOCK_MAY_REFUSE: list[tuple[str, str, str]] = [
    ("mpt", f"{ASSISTED} {CHUNKS}", "MPT does not say that it supports Cache objects, so generate makes none"),
    ("mpt", f"{CONTINUE} custom_generate", "MPT's mask forgets the cache when only new tokens are passed"),
    ("mamba", f"{ASSISTED} {CHUNKS} {CONTINUE} own_dynamic_cache attentions",
     "Mamba has neither attention nor past_key_values"),
    ("recurrent", ASSISTED, "a recurrent state cannot be cropped"),
    ("lfm2", f"{CHUNKS} {CONTINUE} static_cache", "a conv layer cannot continue with several tokens in old versions"),
    ("qwen3_next", "static_cache", "no static cache for linear attention in old versions"),
    ("llama4", "static_cache", "masks of chunks did not take what a static cache asks for around 5.17"),
    ("falcon_alibi", "static_cache", "Falcon's alibi expects a 2-D mask"),
    ("*", "early_exit", "early exit edits num_hidden_layers of the config, which many families read elsewhere"),
    ("sliding", ASSISTED, "cropping a sliding window was broken around 5.17"),
]  # fmt: skip


def lookup(table: list[tuple[str, str, str]], family: Family, mode_name: str) -> str | None:
    """The reason that the table gives for this family and mode, if any."""
    for who, which, reason in table:
        if (who in ("*", family.name) or who in family.tags) and mode_name in which.split():
            return reason
    return None
