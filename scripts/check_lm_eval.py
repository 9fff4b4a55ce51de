#!/usr/bin/env python3
"""Compares `relufy eval` with lm-evaluation-harness 0.4.13, request by request.

Both score the same documents of the same local files with the same checkpoint in float32. Of
every task are compared: which documents were scored, the prompts and the hashes, every
log-likelihood (2e-4 + 1e-6 |ll|) and `is_greedy`, every generated text, every document's
metrics, and every number in the results, groups included (1e-4 relative; accuracies exactly).

    python3 scripts/check_lm_eval.py --relufy target/release/relufy --data DIR --model DIR \\
        --tasks arc_easy,hellaswag,lambada_openai,wikitext --limit 50
    python3 scripts/check_lm_eval.py --relufy ... --tasks mmlu --limit 3 --num_fewshot 5

DIR of `--data` holds `REPOSITORY/CONFIG/SPLIT.jsonl`; `--model` can be given several times. With
`--reference DIR` the harness's answers are kept and used again (`DIR/MODEL/TASK_Kshot`, as
`lm_eval_local.py` writes them), and torch is not needed when all are there. `--keep DIR` keeps
what relufy wrote. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LL_ABSOLUTE, LL_RELATIVE = 2e-4, 1e-6
METRIC_RELATIVE = 1e-4
# What of a sample must be equal as it stands.
EQUAL = ("target", "arguments", "doc_hash", "prompt_hash", "target_hash", "metrics")
# Sections of the results that say how a task was run.
SECTIONS = ("versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks", "task_hashes")
SHOWN = 6  # differences printed of each task
COLUMNS = "{:34} {:>5} {:>5} {:>8} {:>9} {:>7} {:>6}  {}"

Samples = dict[tuple[int, str], dict[str, Any]]


@dataclass
class Run:
    """One `results_*.json` and the samples beside it: by task, then by document and filter."""

    results: dict[str, Any]
    samples: dict[str, Samples]

    @classmethod
    def read(cls, folder: Path) -> Run | None:
        files = sorted(folder.rglob("results_*.json"), key=lambda file: file.name)
        if not files:
            return None
        newest = files[-1]
        date = newest.stem.removeprefix("results_")
        samples = {}
        for file in sorted(newest.parent.glob(f"samples_*_{date}.jsonl")):
            with open(file, encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            task = file.stem.removeprefix("samples_").removesuffix(f"_{date}")
            samples[task] = {(row["doc_id"], row["filter"]): row for row in rows}
        return cls(json.loads(newest.read_text(encoding="utf-8")), samples)


@dataclass
class Comparison:
    """What the two runs of one task (or the results of one group) have in common, and what not."""

    task: str
    documents: int = 0
    left_out: int = 0
    requests: int = 0
    worst: float = 0.0
    greedy: int = 0
    metrics: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def differ(self, where: str, ours: Any, theirs: Any) -> None:
        self.differences.append(f"{where}\n      relufy  {shorten(ours)}\n      harness {shorten(theirs)}")

    def row(self) -> str:
        return COLUMNS.format(self.task, self.documents, self.left_out, self.requests, f"{self.worst:.1e}",
                              self.greedy, len(self.differences), "; ".join(self.metrics))


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:78]} ... {text[-78:]}"


def numbers_close(name: str, ours: Any, theirs: Any) -> bool:
    """Numbers of the results. Counts and means of zeros and ones must agree to the last digits."""
    if not is_number(ours) or not is_number(theirs):
        return ours == theirs
    exact = name.split(",")[0] in ("acc", "acc_norm", "exact_match", "sample_len")
    return math.isclose(ours, theirs, rel_tol=1e-12 if exact else METRIC_RELATIVE)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def compare_ll(found: Comparison, where: str, ours: float, theirs: float) -> None:
    found.worst = max(found.worst, abs(ours - theirs))
    if not abs(ours - theirs) <= LL_ABSOLUTE + LL_RELATIVE * abs(theirs):
        found.differ(f"{where}: log-likelihood", ours, theirs)


def compare_response(found: Comparison, where: str, ours: Any, theirs: Any, generated: bool) -> None:
    """A generated text, the log-likelihood of a whole text, or [log-likelihood, is it greedy]."""
    if generated:
        if ours != theirs:
            found.differ(f"{where}: text", ours, theirs)
    elif isinstance(theirs, list):
        compare_ll(found, where, float(ours[0]), float(theirs[0]))
        if ours[1] != theirs[1]:
            found.greedy += 1
            found.differ(f"{where}: greedy", ours[1], theirs[1])
    else:
        compare_ll(found, where, float(ours), float(theirs))


def compare_metric(found: Comparison, where: str, ours: Any, theirs: Any) -> None:
    """A document's metric: 0 or 1, a log-likelihood, or [log-likelihood, count]."""
    if isinstance(theirs, list):
        compare_ll(found, where, ours[0], theirs[0])
        ours, theirs = ours[1], theirs[1]
    elif where.endswith("perplexity"):
        return compare_ll(found, where, ours, theirs)
    if ours != theirs:
        found.differ(where, ours, theirs)


def compare_samples(found: Comparison, ours: Samples, theirs: Samples, generated: bool) -> None:
    for missing in theirs.keys() - ours.keys():
        found.differ(f"document {missing[0]}", "left out", "scored")
    for extra in ours.keys() - theirs.keys():
        found.differ(f"document {extra[0]}", "scored", "left out")
    for key in sorted(ours.keys() & theirs.keys()):
        mine, other = ours[key], theirs[key]
        where = f"document {key[0]}"
        found.documents += 1
        for name in EQUAL:
            if mine.get(name) != other[name]:
                found.differ(f"{where}: {name}", mine.get(name), other[name])
        if len(mine["resps"]) != len(other["resps"]):
            found.differ(f"{where}: number of requests", len(mine["resps"]), len(other["resps"]))
            continue
        for name in ("resps", "filtered_resps"):
            for index, (answer, right) in enumerate(zip(mine[name], other[name], strict=True)):
                if name == "resps":
                    found.requests += 1
                    answer, right = answer[0], right[0]
                compare_response(found, f"{where}, request {index}, {name}", answer, right, generated)
        for name in other["metrics"]:
            compare_metric(found, f"{where}: {name}", mine.get(name), other[name])


def compare_results(found: Comparison, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The entry of a task or group under `results`."""
    for name in dict.fromkeys([*theirs, *ours]):
        mine, right = ours.get(name), theirs.get(name)
        if not numbers_close(name, mine, right):
            found.differ(f"results: {name}", mine, right)
        if is_number(right) and name != "sample_len" and "_stderr" not in name:
            error = theirs.get(name.replace(",", "_stderr,"))
            shown = f" ± {error:.4g}" if is_number(error) else ""
            found.metrics.append(f"{name.split(',')[0]} {mine:.6g} / {right:.6g}{shown}"
                                 if is_number(mine) else f"{name} {mine} / {right:.6g}")


def compare(ours: Run, theirs: Run) -> list[Comparison]:
    """One comparison for each task and group of the harness's run."""
    compared = []
    for task, entry in theirs.results["results"].items():
        found = Comparison(task)
        if task in theirs.samples:
            original = theirs.results["n-samples"][task]
            limit = theirs.results["config"]["limit"] or original["original"]
            found.left_out = min(limit, original["original"]) - original["effective"]
            generated = theirs.results["configs"][task]["output_type"] == "generate_until"
            compare_samples(found, ours.samples.get(task, {}), theirs.samples[task], generated)
        compare_results(found, ours.results["results"].get(task, {}), entry)
        for section in SECTIONS:
            right = theirs.results.get(section, {}).get(task)
            mine = ours.results.get(section, {}).get(task)
            if right is not None and mine != right:
                found.differ(section, mine, right)
        compared.append(found)
    return compared


def run_relufy(args: argparse.Namespace, model: Path, out: Path) -> Run:
    command = [args.relufy, "eval", model, "--tasks", args.tasks, "--data", args.data, "--output_path", out,
               "--log_samples"]
    if args.limit is not None:
        command += ["--limit", args.limit]
    if args.num_fewshot is not None:
        command += ["--num_fewshot", args.num_fewshot]
    command = [str(part) for part in command] + args.relufy_arg
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")
    if (run := Run.read(out)) is None:
        raise SystemExit(f"{' '.join(command)}\nwrote no results_*.json into {out}")
    return run


def run_harness(args: argparse.Namespace, model: Path, task: str, reference: Path) -> Run:
    """The harness's run of one task, from the reference folder if it is there."""
    suffix = f"_{args.num_fewshot}shot" if args.num_fewshot else ""
    folder = reference / model.name / (task + suffix)
    found = Run.read(folder)
    if found is None or found.results["config"]["limit"] != args.limit:
        import lm_eval_local

        lm = lm_eval_local.shared_model(args.data, model, args.batch_size, args.threads)
        lm_eval_local.write(lm, lm_eval_local.evaluate(lm, [task], args.limit, args.num_fewshot), folder)
        found = Run.read(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--relufy", type=Path, default=Path("target/release/relufy"))
    parser.add_argument("--data", type=Path, required=True, help="folder of REPOSITORY/CONFIG/SPLIT.jsonl")
    parser.add_argument("--model", type=Path, action="append", required=True, help="checkpoint folder; repeatable")
    parser.add_argument("--tasks", required=True, help="names of tasks or groups, separated by commas")
    parser.add_argument("--limit", type=int, help="first N documents of each task")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--batch_size", type=int, default=8, help="of the harness")
    parser.add_argument("--threads", type=int, default=2, help="of the harness")
    parser.add_argument("--relufy-arg", action="append", default=[], help="passed on to relufy; repeatable")
    parser.add_argument("--reference", type=Path, help="where the harness's answers are kept")
    parser.add_argument("--keep", type=Path, help="where relufy's answers are kept")
    args = parser.parse_args()

    wrong = 0
    with tempfile.TemporaryDirectory(prefix="check-lm-eval-") as scratch:
        for number, model in enumerate(args.model):
            model = model.resolve()
            out = (args.keep or Path(scratch) / "ours") / f"{number}-{model.name}"
            ours = run_relufy(args, model, out)
            print(f"{model.name}, limit {args.limit}, {args.num_fewshot or 0}-shot")
            print(COLUMNS.format("task", "docs", "out", "requests", "worst dll", "greedy", "differ",
                                 "relufy / harness"))
            for task in args.tasks.split(","):
                theirs = run_harness(args, model, task, args.reference or Path(scratch) / "theirs")
                for found in compare(ours, theirs):
                    print(found.row(), flush=True)
                    for difference in found.differences[:SHOWN]:
                        print(f"    {difference}")
                    if len(found.differences) > SHOWN:
                        print(f"    ... and {len(found.differences) - SHOWN} more")
                    wrong += bool(found.differences)
            print()
    print(f"{wrong} tasks differ" if wrong else "no differences")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
