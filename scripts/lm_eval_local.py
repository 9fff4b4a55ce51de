#!/usr/bin/env python3
"""Runs lm-evaluation-harness itself on local dataset files, without the hub.

The harness's own task files, request building, scoring and aggregation are used as they are.
Three things are put in their place:

* `datasets.load_dataset(repository, config)` reads `DATA/repository/config/SPLIT.jsonl`. A split
  that is not there is empty, so that a task still loads of which only the evaluated split exists.
* The tokenizer is what `tokenizer.json` says. (`LlamaTokenizer` of transformers 5 builds one of
  its own, which can cut a text into other tokens.)
* A document with a continuation that becomes no token at all stops the harness; it is left out
  by its number and listed under `excluded` in the results.

As a program it writes what the harness writes, and every request, into a folder for each task:

    python3 scripts/lm_eval_local.py --data DIR --model DIR --tasks arc_easy,mmlu_anatomy \\
        --limit 100 --num_fewshot 5 --out OUT
    # OUT/arc_easy/results_TIME.json, samples_arc_easy_TIME.jsonl, requests.jsonl

It needs a Python that has torch, transformers and lm_eval 0.4.13 (`pip install "lm_eval[hf]==0.4.13"`).
`check_lm_eval.py` and `bench_lm_eval.py` stand on it.
"""

from __future__ import annotations

import os

# Read by the libraries when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
# The bootstrap's result does not depend on this; no processes are forked for it.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

import argparse
import contextlib
import functools
import io
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator

try:
    import datasets
    import tokenizers
    import torch
    from lm_eval import evaluator
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast
except ImportError as error:
    raise SystemExit(f'{error}: this needs a Python with torch and "lm_eval[hf]==0.4.13"') from error

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# Strings on which the tokenizer the harness gets must agree with tokenizer.json.
PROBES = ("Question: What is 2 + 2?\nAnswer:", " two", "The cat\t sat…  “naïve” 東京\n\n", "A", "<s> x", "\n")


class LocalDatasets:
    """Stands in for `datasets.load_dataset`: `root/repository/config/SPLIT.jsonl`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loaded: dict[Path, Splits] = {}
        # On disk, as downloaded data would be: the library keeps the result of a `map` only then.
        self.cache = tempfile.TemporaryDirectory(prefix="lm-eval-")

    def install(self) -> None:
        datasets.disable_progress_bars()
        datasets.load_dataset = self.load

    def load(self, path: str, name: str | None = None, **_: Any) -> Splits:
        folder = self.root / path
        if name is None:
            configs = [child for child in folder.glob("*") if child.is_dir()]
            if len(configs) != 1:
                raise SystemExit(f"{folder}: one folder for the data set's only config expected, found {len(configs)}")
            folder = configs[0]
        else:
            folder /= name
        if folder not in self.loaded:
            self.loaded[folder] = Splits(folder, Path(self.cache.name) / str(len(self.loaded)))
        return self.loaded[folder]


class Splits(dict):
    """The splits of one config, each read when it is asked for."""

    def __init__(self, folder: Path, cache: Path) -> None:
        super().__init__()
        self.folder, self.cache = folder, cache

    def __missing__(self, split: str) -> datasets.Dataset:
        file = self.folder / f"{split}.jsonl"
        if file.exists():
            with open(file, encoding="utf-8") as lines:
                rows = datasets.Dataset.from_list([json.loads(line) for line in lines if line.strip()])
            rows.save_to_disk(self.cache / split)
            self[split] = datasets.load_from_disk(self.cache / split)
        else:
            others = sorted(self.folder.glob("*.jsonl"))
            if not others:
                raise SystemExit(f"{self.folder}: no SPLIT.jsonl there")
            self[split] = self[others[0].stem].select([])
        return self[split]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of `tokenizer.json`, with the special tokens named beside it."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            settings.update(json.loads((folder / name).read_text(encoding="utf-8")))
    special = {key: token["content"] if isinstance(token, dict) else token
               for key in SPECIAL_TOKENS if (token := settings.get(key))}
    file = str(folder / "tokenizer.json")
    clean_up = settings.get("clean_up_tokenization_spaces", False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, clean_up_tokenization_spaces=clean_up, **special)
    plain = tokenizers.Tokenizer.from_file(file)
    for text in PROBES:
        if tokenizer.encode(text) != plain.encode(text).ids:
            raise SystemExit(f"{file}: transformers encodes {text!r} otherwise than the tokenizers library")
    return tokenizer


def load_model(folder: Path, batch_size: int | str = 8, max_batch_size: int = 64, device: str = "cpu",
               dtype: str = "float32") -> HFLM:
    """The harness's Hugging Face backend."""
    return HFLM(pretrained=str(folder), tokenizer=load_tokenizer(folder), dtype=dtype, device=device,
                batch_size=batch_size, max_batch_size=max_batch_size)


@functools.cache
def shared_model(data: Path, folder: Path, batch_size: int | str = 8, threads: int = 1, device: str = "cpu",
                 dtype: str = "float32") -> HFLM:
    """A model loaded once, and the local data sets put in place."""
    torch.set_num_threads(threads)
    LocalDatasets(data).install()
    return load_model(folder, batch_size, device=device, dtype=dtype)


@functools.cache
def task_manager() -> TaskManager:
    """The index of the harness's tasks; reading it takes seconds."""
    return TaskManager()


def load_tasks(names: list[str], num_fewshot: int | None) -> dict[str, Any]:
    """Tasks and groups as `simple_evaluate` prepares them for `evaluate`."""
    loaded = task_manager().load(names)
    for task in loaded["tasks"].values():
        configured = task.get_config("num_fewshot")
        if num_fewshot is not None and configured != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif configured is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return loaded


def encode(lm: HFLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a request, split as `TemplateLM.loglikelihood` splits them."""
    if context:
        return lm._encode_pair(context, continuation)
    tokens = lm.tok_encode(continuation, add_special_tokens=False)
    if tokens and tokens[0] == lm.prefix_token_id:
        return tokens[:1], tokens[1:]
    return [lm.prefix_token_id], tokens


def wordless_documents(lm: HFLM, task: Any, limit: int | None) -> list[int]:
    """Numbers of the documents with a continuation that encodes to no token."""
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    found = {request.doc_id for request in task.instances
             if request.request_type == "loglikelihood" and not encode(lm, *request.args)[1]}
    return sorted(found)


def evaluate(lm: HFLM, names: list[str], limit: int | None, num_fewshot: int | None = None,
             bootstrap_iters: int = 100_000) -> dict[str, Any]:
    """`simple_evaluate` on the first `limit` documents of each task, those without tokens left out."""
    with quiet():
        loaded = load_tasks(names, num_fewshot)
        excluded = {name: found for name, task in loaded["tasks"].items()
                    if (found := wordless_documents(lm, task, limit))}
        samples = None
        if excluded:
            samples = {}
            for name, task in loaded["tasks"].items():
                count = min(limit or len(task.eval_docs), len(task.eval_docs))
                samples[name] = [i for i in range(count) if i not in excluded.get(name, ())]
        results = evaluator.simple_evaluate(
            model=lm, tasks=names, num_fewshot=num_fewshot, batch_size=lm.batch_size, device=str(lm.device),
            limit=None if samples else limit, samples=samples, bootstrap_iters=bootstrap_iters, log_samples=True,
            task_manager=task_manager())
    results["config"].update(model="hf", model_args={"pretrained": lm.pretrained, "dtype": "float32"}, limit=limit)
    results["excluded"] = excluded
    return results


def request_records(lm: HFLM, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every request with its tokens and its answer."""
    for task, samples in results["samples"].items():
        kind = results["configs"][task]["output_type"]
        for sample in samples:
            for index, (args, responses) in enumerate(zip(sample["arguments"], sample["resps"], strict=True)):
                record = {"task": task, "doc_id": sample["doc_id"], "idx": index, "kind": kind}
                answer = responses[0]
                if kind == "generate_until":
                    record |= {"ctx": args[0], "n_ctx": len(lm.tok_encode(args[0])), "text": answer}
                elif kind == "loglikelihood_rolling":
                    record |= {"n_tokens": len(lm.tok_encode(args[0])), "ll": answer}
                else:
                    context, continuation = encode(lm, *args)
                    over = len(context) + len(continuation) - (lm.max_length + 1)
                    record |= {"ctx": args[0], "cont": args[1], "ctx_ids": context, "cont_ids": continuation,
                               "truncated": max(over, 0), "ll": answer[0], "greedy": answer[1]}
                yield record


def write(lm: HFLM, results: dict[str, Any], out: Path) -> None:
    """`results_*.json` and `samples_*.jsonl` by the harness's own writer, and `requests.jsonl`."""
    records = list(request_records(lm, results))
    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(out / "run.json"))
    tracker.general_config_tracker.log_experiment_args(
        model_source="hf", model_args=f"pretrained={lm.pretrained}", system_instruction=None, chat_template=None,
        fewshot_as_multiturn=False)
    out.mkdir(parents=True, exist_ok=True)
    with quiet():
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
    for file in out.glob("run_*.json"):
        file.rename(out / file.name.replace("run_", "results_", 1))
    with open(out / "requests.jsonl", "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the harness's chatter from the terminal; errors still raise."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of REPOSITORY/CONFIG/SPLIT.jsonl")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--tasks", required=True, help="names of tasks or groups, separated by commas")
    parser.add_argument("--limit", type=int, help="first N documents of each task")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--suffix", default="", help="appended to the folder name of each task")
    parser.add_argument("--together", help="run all tasks in one evaluation, into the folder of this name")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    lm = shared_model(args.data, args.model, args.batch_size, args.threads)
    names = args.tasks.split(",")
    for folder, batch in [(args.together, names)] if args.together else [(name, [name]) for name in names]:
        start = time.perf_counter()
        results = evaluate(lm, batch, args.limit, args.num_fewshot)
        excluded = {task: len(found) for task, found in results["excluded"].items()}
        write(lm, results, args.out / (folder + args.suffix))
        print(f"{folder}{args.suffix}: {time.perf_counter() - start:.1f} s, excluded {excluded or 0}", flush=True)


if __name__ == "__main__":
    main()
