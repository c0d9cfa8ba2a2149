"""lm-eval's ``HFLM`` on SmolLM2, stock and patched taking turns: questions that share a long few-shot prompt.

The task is made here, of the topics of Python's ``help()``: each question is the begin of a topic, to be answered with
its name. Answers and scores must be equal. The patched side forgets all prefixes before each run. One question to each
side comes first and is not counted::

    python -m benchmarks.lm_eval --runs 3
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_paged import patch_model

from . import environment, report, smollm2
from .measure import forget_prefixes

TASK = "topics"
_FIRST = {"function": "take_first"}
WORDS, ANSWER_TOKENS = 60, 12  # of a question; of an answer


@dataclass(frozen=True)
class Run:
    """One evaluation: seconds in ``generate_until``, what was answered, and the share of right answers."""

    seconds: float
    answers: list[str]
    score: float


class Timed(HFLM):
    """Notes how long the answers take."""

    seconds = 0.0

    def generate_until(self, *args: object, **kwargs: object) -> list[str]:
        begin = time.perf_counter()
        answers = super().generate_until(*args, **kwargs)
        self.seconds += time.perf_counter() - begin
        return answers


def write_task(folder: Path, num_shots: int, num_questions: int) -> dict:
    """Write the dataset; return the task that reads it."""
    names = sorted(name for name, text in topics.items() if len(text.split()) >= WORDS)
    rows = [{"text": " ".join(topics[name].split()[:WORDS]), "name": name} for name in names]
    parts = {"shots": rows[:num_shots], "test": rows[num_shots : num_shots + num_questions]}
    for split, part in parts.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in parts},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "shots",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": num_shots,
        "output_type": "generate_until",
        "doc_to_text": "Text: {{text}}\nTopic:",
        "doc_to_target": "{{name}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False},
        "filter_list": [{"name": "word", "filter": [{"function": "regex", "regex_pattern": r"(\S+)"}, _FIRST]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: dict, batch_size: int, limit: int | None = None
) -> Run:
    """Ask the first `limit` questions of the task, or all."""
    judge = Timed(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    manager = TaskManager(include_defaults=False)  # a look at all of lm-eval's tasks takes seconds
    outcome = simple_evaluate(
        judge, tasks=[dict(task)], task_manager=manager, limit=limit, bootstrap_iters=0, verbosity="ERROR"
    )
    answers = [sample["resps"][0][0] for sample in outcome["samples"][TASK]]
    return Run(judge.seconds, answers, float(outcome["results"][TASK]["exact_match,word"]))


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[list[Run]], dict[str, int]]:
    """Runs of stock and of the patched model, and the prompt tokens of one of the patched ones."""
    task, tokenizer = write_task(folder, options.shots, options.questions), smollm2.load_tokenizer()
    stock = smollm2.load_model(torch.float32)
    models, sides = [stock, patch_model(smollm2.twin(stock))], [[], []]
    for model in models:
        evaluate(model, tokenizer, task, options.batch_size, limit=1)
    for run in range(options.runs):
        for index in (0, 1) if run % 2 else (1, 0):
            if index:
                forget_prefixes(models[index])
                models[index].paged.reset_stats()
            sides[index].append(evaluate(models[index], tokenizer, task, options.batch_size))
    stats = asdict(models[1].paged.stats())
    return sides, {name: stats[name] for name in ("prompt_tokens", "computed_tokens", "reused_tokens", "shared_tokens")}


def main() -> int:
    """Measure. The exit status is 1 where an answer or a score differs from stock's."""
    parser = environment.parser("benchmarks.lm_eval", __doc__)
    parser.add_argument("--runs", type=int, default=3, help="of each side, taking turns (default 3)")
    parser.add_argument("--shots", type=int, default=8, help="examples in the prompt (default 8)")
    parser.add_argument("--questions", type=int, default=6, help="(default 6)")
    parser.add_argument("--batch-size", type=int, default=1, help="of HFLM (default 1)")
    options = environment.parse(parser)
    described = environment.describe() | {"lm_eval": environment.version("lm_eval")}
    with tempfile.TemporaryDirectory() as folder:
        (stock, patched), tokens = measure(options, Path(folder))
    before, after = (median(run.seconds for run in side) for side in (stock, patched))
    is_equal = all((run.answers, run.score) == (stock[0].answers, stock[0].score) for run in (*stock, *patched))
    console = report.console()
    console.print(f"generate_until  stock {before:.2f} s  patched {after:.2f} s  {before / after:.2f}×")
    console.print(f"{tokens}  answers equal: {is_equal}, right: {stock[0].score:.0%}")
    console.print(environment.summary(described))
    content = {
        "environment": described,
        "settings": vars(options) | {"out": None},
        "ratio": before / after,
        "answers_and_scores_equal": is_equal,
        "tokens_of_a_patched_run": tokens,
        "stock": list(map(asdict, stock)),
        "patched": list(map(asdict, patched)),
    }
    environment.save(options.out / "lm_eval.json", content)
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
