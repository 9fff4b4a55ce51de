#!/usr/bin/env python3
"""Compares the speed of `relufy eval` with lm-evaluation-harness 0.4.13 on the CPU.

Both score the same first documents of each task with the same checkpoint, in float32 with the
same number of threads. They take turns; a pair is one run of each, and who goes first alternates.
A task's result is the median of its pairs' ratios.

    cargo build --release
    python3 scripts/bench_lm_eval.py --make-model DIR --tokenizer DIR-OF-TOKENIZER.JSON
    python3 scripts/bench_lm_eval.py --data DIR --model DIR --model ANOTHER --pairs 5
    python3 scripts/bench_lm_eval.py --data DIR --model DIR --tasks piqa,mmlu --limit 40 --json out.json

Both times are those of asking the model: tokenising all requests and scoring them. The harness: its
`loglikelihood`, `loglikelihood_rolling` and `generate_until`. relufy: the seconds its results file gives
for each task (`relufication.tasks.TASK.seconds`), in which it counts densities too. In neither are
imports, loading the model, reading the data sets, building the prompts and the metrics. relufy starts
anew for each run, the harness stays alive.

The harness gets the batch size with which it is fastest, found for each task and model on the
first `--tune-limit` documents. Sizes whose logits would take more than half of the free memory are
not tried. Its `auto` can be named in `--batch-sizes`; on a CPU it settles for the largest size
allowed (64) after running it five times, so that it cannot win against a fixed 64.

The random model of `--make-model` is a Llama of 30.4 M parameters besides its embeddings (hidden
512, 8 layers, 8 heads, feed-forward 1792, 2,048 positions) with the tokenizer given. `mmlu` stands
for five subjects, five-shot. Leave the machine alone while this runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Callable, Iterator

TASKS = ["arc_easy", "arc_challenge", "hellaswag", "boolq", "piqa", "lambada_openai", "winogrande", "sciq",
         "openbookqa", "mmlu"]
SUBJECTS = ["abstract_algebra", "anatomy", "high_school_geography", "international_law", "marketing"]
# A run starts after this pause: worker threads of the one before spin for a moment.
SETTLE_SECONDS = 0.5


@dataclass(frozen=True)
class Case:
    """One line of the table: tasks that are evaluated together."""

    name: str
    tasks: tuple[str, ...]
    limit: int  # documents of each task
    num_fewshot: int | None

    @classmethod
    def named(cls, name: str, args: argparse.Namespace) -> Case:
        if name == "mmlu":
            subjects = tuple(f"mmlu_{subject}" for subject in args.mmlu_subjects.split(","))
            return cls("mmlu, 5-shot", subjects, args.mmlu_limit, 5)
        return cls(name, (name,), args.limit, None)


@dataclass
class Timing:
    """What was measured of a case."""

    case: str
    documents: int
    requests: int
    batch_size: int | str
    tuning: dict[str, float]
    harness: list[float] = field(default_factory=list)
    relufy: list[float] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for theirs, ours in zip(self.harness, self.relufy, strict=True)]


class Harness:
    """lm_eval, imported once, with one model."""

    def __init__(self, data: Path, model: Path, threads: int) -> None:
        import lm_eval_local

        self.local = lm_eval_local
        self.lm = lm_eval_local.shared_model(data, model, threads=threads)

    def prepare(self, case: Case) -> dict[str, Any]:
        """The case's tasks, without the documents on which the harness stops."""
        with self.local.quiet():
            loaded = self.local.load_tasks(list(case.tasks), case.num_fewshot)
            for task in loaded["tasks"].values():
                excluded = set(self.local.wordless_documents(self.lm, task, case.limit))
                if excluded:
                    split = task.config.test_split or task.config.validation_split
                    documents = task.dataset[split]
                    count = min(case.limit, len(documents))
                    task.dataset = {split: documents.select([i for i in range(count) if i not in excluded])}
        return loaded

    def longest(self, loaded: dict[str, Any], limit: int) -> int:
        """Tokens of the longest input."""
        longest = 1
        for task in loaded["tasks"].values():
            with self.local.quiet():
                task.build_all_requests(limit=limit, rank=0, world_size=1)
            for request in task.instances:
                longest = max(longest, len(self.lm.tok_encode(request.args[0] + str(request.args[-1]))))
        return min(longest, self.lm.max_length)

    def run(self, loaded: dict[str, Any], limit: int, batch_size: int | str) -> tuple[float, dict[str, Any]]:
        """Seconds the model was asked in one evaluation, and the results."""
        self.lm.batch_size_per_gpu = batch_size
        with self.local.quiet(), stopwatch(self.lm) as seconds:
            results = self.local.evaluator.evaluate(lm=self.lm, task_dict=loaded, limit=limit, bootstrap_iters=0,
                                                    log_samples=False)
        return sum(seconds), results["results"]

    def tune(self, loaded: dict[str, Any], limit: int, sizes: list[int | str]) -> dict[str, float]:
        """Seconds with each batch size that fits into memory."""
        row = self.longest(loaded, limit) * self.lm.model.config.vocab_size * 4
        self.run(loaded, 1, 1)  # warm-up
        seconds = {}
        for size in sizes:
            rows = self.lm.max_batch_size if size == "auto" else size
            # Logits and their log-softmax stand side by side.
            if size != 1 and 2 * rows * row > free_memory() / 2:
                continue
            seconds[str(size)] = self.run(loaded, limit, size)[0]
        return seconds


@contextlib.contextmanager
def stopwatch(lm: Any) -> Iterator[list[float]]:
    """The seconds of each call of the methods through which `evaluate` asks the model."""
    seconds: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(requests: list[Any]) -> list[Any]:
            start = time.perf_counter()
            answers = method(requests)
            seconds.append(time.perf_counter() - start)
            return answers
        return call

    names = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    for name in names:
        setattr(lm, name, timed(getattr(lm, name)))
    try:
        yield seconds
    finally:
        for name in names:
            delattr(lm, name)


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def run_relufy(args: argparse.Namespace, model: Path, case: Case) -> tuple[float, dict[str, Any]]:
    """The seconds relufy reports for the case, and its results."""
    with tempfile.TemporaryDirectory(prefix="bench-lm-eval-") as out:
        command = [args.relufy, "eval", model, "--tasks", ",".join(case.tasks), "--data", args.data, "--limit",
                   case.limit, "--threads", args.threads, "--output_path", out]
        if case.num_fewshot is not None:
            command += ["--num_fewshot", case.num_fewshot]
        command = [str(part) for part in command] + args.relufy_arg
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")
        (file,) = Path(out).rglob("results_*.json")
        results = json.loads(file.read_text(encoding="utf-8"))
    seconds = sum(results["relufication"]["tasks"][task]["seconds"] for task in case.tasks)
    return seconds, results["results"]


def measure(args: argparse.Namespace, model: Path, harness: Harness, case: Case) -> Timing:
    loaded = harness.prepare(case)
    sizes = [size if size == "auto" else int(size) for size in args.batch_sizes.split(",")]
    tuning = harness.tune(loaded, min(args.tune_limit, case.limit), sizes)
    best = min(tuning, key=tuning.get)
    best = best if best == "auto" else int(best)
    documents = sum(min(case.limit, len(task.eval_docs)) for task in loaded["tasks"].values())
    timing = Timing(case.name, documents, 0, best, tuning)

    def theirs() -> None:
        time.sleep(SETTLE_SECONDS)
        seconds, results = harness.run(loaded, case.limit, best)
        timing.harness.append(seconds)
        timing.accuracy["harness"] = mean_accuracy(results, case)

    def ours() -> None:
        time.sleep(SETTLE_SECONDS)
        seconds, results = run_relufy(args, model, case)
        timing.relufy.append(seconds)
        timing.accuracy["relufy"] = mean_accuracy(results, case)

    for pair in range(args.pairs):
        for run in (theirs, ours) if pair % 2 == 0 else (ours, theirs):
            run()
    timing.requests = sum(len(task.instances) for task in loaded["tasks"].values())
    return timing


def mean_accuracy(results: dict[str, Any], case: Case) -> float:
    """Accuracy or exact match, to see that both did the same work; the bits per byte of a text."""
    names = ("acc,none", "exact_match,remove_whitespace", "bits_per_byte,none")
    values = [next(results[task][name] for name in names if name in results[task]) for task in case.tasks]
    return sum(values) / len(values)


def table(timings: list[Timing]) -> str:
    lines = ["| Task | Documents | Requests | Batch | Harness, s | relufy, s | Harness, docs/s | relufy, docs/s "
             "| Ratio | Range |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for timing in timings:
        theirs, ours, ratios = median(timing.harness), median(timing.relufy), timing.ratios
        lines.append(f"| {timing.case} | {timing.documents} | {timing.requests} | {timing.batch_size} | {theirs:.2f} "
                     f"| {ours:.2f} | {timing.documents / theirs:.1f} | {timing.documents / ours:.1f} "
                     f"| {median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")
    return "\n".join(lines)


def make_model(folder: Path, tokenizer: Path, device: str = "cpu", **shape: Any) -> None:
    """Writes the random Llama, with the tokenizer's `<|endoftext|>` or `</s>` as BOS and EOS.

    `shape` changes its configuration; a model made on a GPU is stored in bf16.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    file = tokenizer / "tokenizer.json"
    definition = json.loads(file.read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in definition["added_tokens"]}
    end = next((name for name in ("<|endoftext|>", "</s>") if name in special), None)
    if end is None:
        raise SystemExit(f"{file}: neither <|endoftext|> nor </s> among the added tokens")
    vocab = 1 + max([*definition["model"]["vocab"].values(), *special.values()])
    torch.manual_seed(0)
    settings = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1792,
                "max_position_embeddings": 2048, "tie_word_embeddings": True} | shape
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, bos_token_id=special[end], eos_token_id=special[end], **settings))
    if device != "cpu":
        model = model.bfloat16()
    model.save_pretrained(folder)
    shutil.copyfile(file, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": end, "eos_token": end, "clean_up_tokenization_spaces": False,
         "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))
    embeddings = model.get_input_embeddings().weight.numel()
    print(f"{folder}: {(model.num_parameters() - embeddings) / 1e6:.1f} M parameters and {embeddings / 1e6:.1f} M "
          "of the embeddings, which are also the head")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--relufy", type=Path, default=Path("target/release/relufy"))
    parser.add_argument("--data", type=Path, help="folder of REPOSITORY/CONFIG/SPLIT.jsonl")
    parser.add_argument("--model", type=Path, action="append", default=[], help="checkpoint folder; repeatable")
    parser.add_argument("--tasks", default=",".join(TASKS), help="separated by commas")
    parser.add_argument("--limit", type=int, default=300, help="documents of each task")
    parser.add_argument("--mmlu-limit", type=int, default=40, help="documents of each subject")
    parser.add_argument("--mmlu-subjects", default=",".join(SUBJECTS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", default="1,8,16,32,64", help="of the harness; auto is known too")
    parser.add_argument("--tune-limit", type=int, default=32, help="documents on which batch sizes are tried")
    parser.add_argument("--relufy-arg", action="append", default=[], help="passed on to relufy; repeatable")
    parser.add_argument("--json", type=Path, help="write all measurements into this file")
    parser.add_argument("--make-model", type=Path, metavar="DIR", help="write the random model and end")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of the random model's tokenizer.json")
    args = parser.parse_args()

    if args.make_model:
        if args.tokenizer is None:
            parser.error("--make-model needs --tokenizer")
        make_model(args.make_model, args.tokenizer)
        return
    if args.data is None or not args.model:
        parser.error("--data and --model are needed")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    measured: dict[str, list[Timing]] = {}
    for model in args.model:
        harness = Harness(args.data, model, args.threads)
        timings = measured[model.name] = []
        for name in args.tasks.split(","):
            timing = measure(args, model, harness, Case.named(name, args))
            timings.append(timing)
            tried = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in timing.tuning.items())
            print(f"{timing.case}: batch sizes {tried}; ratios {', '.join(f'{ratio:.2f}' for ratio in timing.ratios)}; "
                  f"harness {timing.accuracy['harness']:.6g}, relufy {timing.accuracy['relufy']:.6g}",
                  file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps({name: [asdict(timing) for timing in done]
                                                 for name, done in measured.items()}, indent=1))
        print(f"\n{model.name}, {args.threads} threads, median of {args.pairs} pairs\n\n{table(timings)}", flush=True)


if __name__ == "__main__":
    main()
