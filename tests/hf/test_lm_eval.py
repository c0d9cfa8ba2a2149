"""lm-eval on a patched model: the same answers and scores, and few-shot prompts are computed once."""

import json

import prompts
import pytest
from pair import Pair
from words import text, tokenizer

SHOTS, QUESTIONS, OWN = 2, 4, 12


@pytest.fixture
def task(tmp_path) -> dict:
    """Continue a line of words, after the examples of a small local dataset."""
    for split, count in (("shots", SHOTS), ("test", QUESTIONS)):
        lines = [text(prompts.tokens(OWN, seed=len(split) * 100 + index)) for index in range(count)]
        rows = [{"line": line, "rest": "w9"} for line in lines]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(tmp_path / f"{split}.jsonl") for split in ("shots", "test")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "shots",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": SHOTS,
        "output_type": "generate_until",
        "doc_to_text": "{{line}}",
        "doc_to_target": "{{rest}}",
        "generation_kwargs": {"until": ["w7"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "bleu"}, {"metric": "exact_match"}],
    }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_and_scores_are_stocks_and_shots_are_shared(task, batch_size):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # reading the 14,000 files of its own tasks takes 20 s
    pair, found = Pair(), []
    for model in (pair.stock, pair.model):
        judge = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=batch_size, max_length=200)
        outcome = simple_evaluate(judge, tasks=[dict(task)], task_manager=manager, bootstrap_iters=0)
        scores = {name: score for name, score in outcome["results"]["words"].items() if "," in name}
        found.append((scores, [sample["resps"] for sample in outcome["samples"]["words"]]))
    assert found[0] == found[1]
    assert len(found[0][1]) == QUESTIONS
    stats = pair.check()
    assert stats.fallbacks == {}
    spared = stats.reused_tokens + stats.shared_tokens
    assert spared >= (QUESTIONS - 1) * (SHOTS * OWN // 8 * 8), "the examples were computed once"
