#!/usr/bin/env python3
"""Compares the speed of `relufy eval` with lm-evaluation-harness 0.4.13 on one NVIDIA GPU.

Both score the same first documents of each task with the same checkpoint in bf16. The tasks, the
tables and what is timed are those of `bench_lm_eval.py`: the seconds in which the model is asked,
tokenising included; not imports, loading, prompts and metrics.

    scripts/build-cuda.sh
    python3 scripts/bench_lm_eval_cuda.py --collect .carry/lm-eval --data DIR --tokenizer DIR-OF-TOKENIZER.JSON
    python3 scripts/bench_lm_eval_cuda.py --data .carry/lm-eval/data --tokenizer .carry/lm-eval/tokenizer \\
        --model 1b --model 30m --pairs 3 --json out.json

They take turns; a pair is one run of each over all tasks, and who goes first alternates. The
harness stays alive with its model on the GPU and gives its cached memory back between turns. It
gets the batch size with which it is fastest, found for each task and model on the first
`--tune-limit` documents; sizes that do not fit are passed over. relufy starts anew in each pair, once
for the tasks without examples and once for `mmlu`, five-shot; loading kernels counts as its time.
The line `all` is the whole task set: seconds of all tasks together.

`--model` takes checkpoint folders, and makes random Llamas with the tokenizer given: `30m` (hidden
512, 8 layers) and `1b` (hidden 2048, 16 layers, 16 heads, feed-forward 5632), 2,048 positions. They
go into `--models` and are made once.

`--collect` copies the first `--limit` documents of each split and the tokenizer, some 10 MB. For a
machine without a network that has torch, transformers and scikit-learn, the harness and what it
needs travel as wheels, 13 MB for Python 3.12:

    python3 -m pip wheel --no-deps -w WHEELS lm_eval==0.4.13 datasets==5.2.0 evaluate==0.4.6 dill==0.4.1 \\
        pytablewriter==1.2.1 DataProperty==1.1.1 mbstrdecoder==1.1.5 pathvalidate==3.3.1 tabledata==1.3.5 \\
        tcolorpy==0.1.7 typepy==1.3.5 chardet==6.0.0.post1 pytz==2026.6 rouge_score==0.1.2 nltk==3.10.4 \\
        defusedxml==0.7.1 sqlitedict==2.1.0 word2number==1.1 more-itertools==11.2.1
    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d WHEELS multiprocess==0.70.19
    # there:
    python3 -m pip install --no-index --no-deps --target SITE WHEELS/*.whl && export PYTHONPATH=SITE
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench_lm_eval import SUBJECTS, TASKS, Case, Harness, Timing, make_model, mean_accuracy, table
from cuda_libraries import environment

ROOT = Path(__file__).resolve().parent.parent
RANDOM = {
    "30m": {},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 5632},
}


class GpuHarness(Harness):
    """lm_eval, imported once, with one model on the GPU."""

    def __init__(self, data: Path, model: Path, device: str) -> None:
        import lm_eval_local
        import torch

        self.torch = torch
        self.local = lm_eval_local
        dtype = "bfloat16" if device == "cuda" else "float32"
        self.lm = lm_eval_local.shared_model(data, model, threads=torch.get_num_threads(), device=device, dtype=dtype)

    def tune(self, loaded: dict[str, Any], limit: int, sizes: list[int | str]) -> dict[str, float]:
        """Seconds with each batch size, up to the first that does not fit."""
        self.run(loaded, 1, 1)  # warm-up
        seconds: dict[str, float] = {}
        for size in sizes:
            try:
                seconds[str(size)] = min(self.run(loaded, limit, size)[0] for _ in range(2))
            except self.torch.OutOfMemoryError:
                break
            finally:
                self.release()
        return seconds

    def release(self) -> None:
        """Leaves the GPU's memory to the other side."""
        gc.collect()
        if self.torch.cuda.is_available():
            self.torch.cuda.empty_cache()

    def close(self) -> None:
        self.lm = None
        self.local.shared_model.cache_clear()
        self.release()


def run_relufy(args: argparse.Namespace, model: Path, cases: list[Case]) -> dict[str, tuple[float, dict[str, Any]]]:
    """Of each case the seconds relufy reports, and its results; one process for each number of examples."""
    found = {}
    for shots in dict.fromkeys(case.num_fewshot for case in cases):
        for limit in dict.fromkeys(case.limit for case in cases if case.num_fewshot == shots):
            chosen = [case for case in cases if (case.num_fewshot, case.limit) == (shots, limit)]
            found |= run_once(args, model, chosen, shots, limit)
    return found


def run_once(args: argparse.Namespace, model: Path, cases: list[Case], shots: int | None,
             limit: int) -> dict[str, tuple[float, dict[str, Any]]]:
    tasks = ",".join(task for case in cases for task in case.tasks)
    with tempfile.TemporaryDirectory(prefix="bench-lm-eval-") as out:
        command = [args.relufy, "eval", model, "--tasks", tasks, "--data", args.data, "--limit", limit,
                   "--output_path", out]
        if args.device == "cuda":
            command += ["--device", "cuda", "--dtype", "bf16"]
        if shots is not None:
            command += ["--num_fewshot", shots]
        command = [str(part) for part in command] + args.relufy_arg
        done = subprocess.run(command, capture_output=True, text=True, env=environment(args.attention))
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
        (file,) = Path(out).rglob("results_*.json")
        results = json.loads(file.read_text(encoding="utf-8"))
    seconds = results["relufication"]["tasks"]
    return {case.name: (sum(seconds[task]["seconds"] for task in case.tasks), results["results"]) for case in cases}


def measure(args: argparse.Namespace, model: Path, harness: GpuHarness, cases: list[Case],
            save: Any) -> list[Timing]:
    """All cases of a model; `save` is called with what is known after each pair."""
    loaded, timings = {}, {}
    sizes = [size if size == "auto" else int(size) for size in args.batch_sizes.split(",")]
    for case in cases:
        loaded[case.name] = harness.prepare(case)
        tuning = harness.tune(loaded[case.name], min(args.tune_limit, case.limit), sizes)
        if not tuning:
            raise SystemExit(f"{case.name}: no batch size of {args.batch_sizes} fits into memory")
        best = min(tuning, key=tuning.get)
        tasks = loaded[case.name]["tasks"].values()
        documents = sum(min(case.limit, len(task.eval_docs)) for task in tasks)
        timings[case.name] = Timing(case.name, documents, 0, best if best == "auto" else int(best), tuning)
        tried = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in tuning.items())
        print(f"{model.name}, {case.name}: batch sizes {tried}", file=sys.stderr, flush=True)

    def theirs() -> None:
        for case in cases:
            timing = timings[case.name]
            seconds, results = harness.run(loaded[case.name], case.limit, timing.batch_size)
            timing.harness.append(seconds)
            timing.accuracy["harness"] = mean_accuracy(results, case)
            timing.requests = sum(len(task.instances) for task in loaded[case.name]["tasks"].values())
        harness.release()

    def ours() -> None:
        for name, (seconds, results) in run_relufy(args, model, cases).items():
            case = next(case for case in cases if case.name == name)
            timings[name].relufy.append(seconds)
            timings[name].accuracy["relufy"] = mean_accuracy(results, case)

    for pair in range(args.pairs):
        begun = time.monotonic()
        for run in (theirs, ours) if pair % 2 == 0 else (ours, theirs):
            run()
        save(list(timings.values()))
        print(f"{model.name}: pair {pair + 1} in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return list(timings.values())


def together(timings: list[Timing]) -> Timing:
    """The whole task set, pair by pair."""
    whole = Timing("all", sum(t.documents for t in timings), sum(t.requests for t in timings), "", {})
    whole.harness = [sum(pair) for pair in zip(*(t.harness for t in timings), strict=True)]
    whole.relufy = [sum(pair) for pair in zip(*(t.relufy for t in timings), strict=True)]
    return whole


def accuracies(timings: list[Timing]) -> str:
    """Both sides' results: in bf16 they differ in the last digits, and by a document now and then."""
    return "; ".join(f"{t.case} {t.accuracy['harness']:.4g} / {t.accuracy['relufy']:.4g}" for t in timings)


def collect(folder: Path, data: Path, tokenizer: Path, args: argparse.Namespace) -> None:
    """The first documents of every split that a task reads, and the tokenizer."""
    subjects = args.mmlu_subjects.split(",")
    for file in sorted(data.rglob("*.jsonl")):
        part = file.relative_to(data)
        if "mmlu" in part.parts and part.parts[-2] not in subjects or "trivia_qa" in part.parts:
            continue
        target = folder / "data" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(file, encoding="utf-8") as lines:
            target.write_text("".join(line for line, _ in zip(lines, range(args.limit))), encoding="utf-8")
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


def checkpoint(name: str, args: argparse.Namespace) -> Path:
    """A folder given, or a random model made there."""
    if name not in RANDOM:
        return Path(name)
    folder = args.models / name
    if not (folder / "tokenizer_config.json").exists():
        if args.tokenizer is None:
            raise SystemExit(f"--model {name} needs --tokenizer")
        make_model(folder, args.tokenizer, args.device, **RANDOM[name])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--relufy", type=Path, default=ROOT / "target" / "cuda" / "release" / "relufy")
    add("--data", type=Path, required=True, help="folder of REPOSITORY/CONFIG/SPLIT.jsonl")
    add("--model", action="append", default=[], help="checkpoint folder, 30m or 1b; repeatable (default 1b and 30m)")
    add("--models", type=Path, default=ROOT / "runs" / "bench-lm-eval", help="where random models are made")
    add("--tokenizer", type=Path, metavar="DIR", help="folder of the random models' tokenizer.json")
    add("--tasks", default=",".join(TASKS), help="separated by commas")
    add("--limit", type=int, default=300, help="documents of each task (default 300)")
    add("--mmlu-limit", type=int, default=40, help="documents of each subject (default 40)")
    add("--mmlu-subjects", default=",".join(SUBJECTS))
    add("--pairs", type=int, default=3)
    add("--batch-sizes", default="32,64,128,256", help="of the harness, rising; auto is known too")
    add("--tune-limit", type=int, default=100, help="documents on which batch sizes are tried (default 100)")
    add("--attention", choices=("auto", "own", "cudnn"), help="of relufy")
    add("--relufy-arg", action="append", default=[], help="passed on to relufy; repeatable")
    add("--json", type=Path, help="write all measurements into this file")
    add("--collect", type=Path, metavar="DIR", help="copy what a run needs there and end")
    add("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.collect:
        if args.tokenizer is None:
            parser.error("--collect needs --tokenizer")
        collect(args.collect, args.data, args.tokenizer, args)
        return

    measured: dict[str, list[Timing]] = {}
    for name in args.model or ["1b", "30m"]:
        model = checkpoint(name, args)
        cases = [Case.named(task, args) for task in args.tasks.split(",")]
        harness = GpuHarness(args.data, model, args.device)

        def save(timings: list[Timing], name: str = model.name) -> None:
            measured[name] = timings
            if args.json:
                args.json.write_text(json.dumps(
                    {name: [asdict(timing) for timing in done] for name, done in measured.items()}, indent=1))

        timings = measure(args, model, harness, cases, save)
        harness.close()
        whole = together(timings)
        print(f"\n{model.name}, bf16, median of {args.pairs} pairs\n\n{table([*timings, whole])}\n\n"
              f"results, harness / relufy: {accuracies(timings)}\n\n"
              f"the whole task set: relufy {median(whole.ratios):.2f} times as fast", flush=True)


if __name__ == "__main__":
    main()
