#!/usr/bin/env python3
"""Compares `relufy eval` on a GPU, in f32 and in bf16, with `relufy eval` on the CPU in f32.

    scripts/build-cuda.sh
    python3 scripts/check_cuda_eval.py --data ../shared/data                                # here
    python3 scripts/check_cuda_eval.py --data ../shared/data --collect .carry/eval
    python3 scripts/check_cuda_eval.py --folder .carry/eval                                 # there

A real checkpoint (stories3M) scores the first `--limit` documents of each task three times. Of each
task are shown: documents and log-likelihoods; the largest and the mean difference of a
log-likelihood from the CPU's, `|d|`, and the largest relative one, `|d| / (1 + |ll|)`; greedy answers
that changed; documents of which a metric (acc, acc_norm) changed; the largest lead, in the CPU's
log-likelihoods, that the chosen answer lost where another was chosen; and acc on both sides.

The bounds: relative differences up to `--f32-bound` and `--bf16-bound`. In f32 no answer may change
whose lead was larger than twice the largest difference; in bf16 at most `--flips` of a task's
documents may. Exits with 1 beyond them.

`--collect` puts what a run needs into a folder of some 8 MB: the first documents of each file, and the
checkpoint with its weights rounded to bf16, so that all three use the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from check_lm_eval import Run
from cuda_libraries import environment

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = "checkpoints/stories3M"
TASKS = "arc_easy,arc_challenge,hellaswag,piqa,sciq,openbookqa,winogrande,boolq,lambada_openai"
# Of the data's repositories those that no task here reads.
UNREAD = ("cais", "mandarjoshi")
METRICS = ("acc", "acc_norm")
COLUMNS = "{:6} {:16} {:>5} {:>6}  {:>8} {:>8} {:>8}  {:>6} {:>6} {:>8}  {:>6} {:>6}"


class Failure(Exception):
    """What ends the run, in words."""


# --- what is carried -------------------------------------------------------------------------


def collect(data: Path, folder: Path, limit: int) -> None:
    """The first documents of each file, and the checkpoint in bf16."""
    source = data / "eval"
    for file in sorted(source.rglob("*.jsonl")):
        part = file.relative_to(source)
        if part.parts[0] in UNREAD:
            continue
        target = folder / "data" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(file, encoding="utf-8") as lines:
            target.write_text("".join(line for line, _ in zip(lines, range(limit))), encoding="utf-8")
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    for file in (data / CHECKPOINT).iterdir():
        if file.suffix == ".json":
            shutil.copyfile(file, model / file.name)
    rounded(data / CHECKPOINT / "model.safetensors", model / "model.safetensors")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB; carry it, and run with --folder {folder}")


def rounded(source: Path, target: Path) -> None:
    """Copies a safetensors file, f32 rounded to the nearest bf16, ties to even."""
    content = source.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header, parts, at = json.loads(content[8:begin]), [], 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise Failure(f"{source}: {name} is {entry['dtype']}, F32 is expected")
        first, last = entry["data_offsets"]
        bits = struct.unpack(f"<{(last - first) // 4}I", content[begin + first:begin + last])
        half = struct.pack(f"<{len(bits)}H", *((word + 0x7FFF + (word >> 16 & 1)) >> 16 for word in bits))
        entry.update(dtype="BF16", data_offsets=[at, at + len(half)])
        parts.append(half)
        at += len(half)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


# --- the runs --------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace, folder: Path, out: Path, name: str, flags: list[str]) -> Run:
    command = [options.relufy, "eval", folder / "model", "--data", folder / "data", "--tasks", options.tasks,
               "--limit", options.limit, "--bootstrap_iters", 0, "--log_samples", "--output_path", out / name, *flags]
    command = [str(part) for part in command] + options.relufy_arg
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment(options.attention), check=False)
    if done.returncode != 0:
        raise Failure(f"`{' '.join(command)}` failed ({done.returncode}):\n{done.stderr.strip()[-2000:]}")
    run = Run.read(out / name)
    if run is None:
        raise Failure(f"`{' '.join(command)}` wrote no results")
    print(f"{name}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
    return run


# --- the comparison --------------------------------------------------------------------------


@dataclass
class Distance:
    """How far the samples of a task are from the CPU's."""

    documents: int = 0
    differences: list[float] = field(default_factory=list)
    relative: float = 0.0
    greedy: int = 0
    flips: int = 0
    lead: float = 0.0

    def add(self, ours: dict[str, Any], cpu: dict[str, Any]) -> None:
        """One document."""
        if ours["arguments"] != cpu["arguments"]:
            raise Failure(f"document {cpu['doc_id']}: the prompts differ")
        self.documents += 1
        for (found, greedy), (expected, as_greedy) in zip(responses(ours), responses(cpu), strict=True):
            difference = abs(found - expected)
            self.differences.append(difference)
            # A NaN is no small difference.
            relative = difference / (1 + abs(expected))
            self.relative = max(self.relative, relative if relative == relative else float("inf"))
            self.greedy += greedy != as_greedy
        self.flips += any(ours.get(metric) != cpu.get(metric) for metric in METRICS)
        found, expected = ([ll for ll, _ in responses(row)] for row in (ours, cpu))
        self.lead = max(self.lead, max(expected) - expected[found.index(max(found))])

    @property
    def largest(self) -> float:
        return max(self.differences, default=0.0)

    @property
    def mean(self) -> float:
        return sum(self.differences) / max(len(self.differences), 1)


def responses(row: dict[str, Any]) -> list[tuple[float, str]]:
    return [(float(ll), greedy) for ll, greedy in row["filtered_resps"]]


def accuracy(run: Run, task: str) -> float:
    return run.results["results"][task]["acc,none"]


def compare(name: str, gpu: Run, cpu: Run, options: argparse.Namespace) -> list[str]:
    """Shows a line for each task; what is beyond the bounds."""
    bound = options.bf16_bound if name == "bf16" else options.f32_bound
    beyond = []
    if gpu.samples.keys() != cpu.samples.keys():
        raise Failure(f"{name}: the tasks differ: {sorted(gpu.samples)}, {sorted(cpu.samples)}")
    for task in sorted(cpu.samples):
        ours, theirs = gpu.samples[task], cpu.samples[task]
        if ours.keys() != theirs.keys():
            raise Failure(f"{name}, {task}: the documents differ")
        found = Distance()
        for key in theirs:
            found.add(ours[key], theirs[key])
        print(COLUMNS.format(
            name, task, found.documents, len(found.differences), f"{found.largest:.1e}", f"{found.mean:.1e}",
            f"{found.relative:.1e}", found.greedy, found.flips, f"{found.lead:.1e}",
            f"{accuracy(cpu, task):.4f}", f"{accuracy(gpu, task):.4f}"), flush=True)
        if found.relative > bound:
            beyond.append(f"{name}, {task}: a log-likelihood is {found.relative:.1e} off, {bound:.0e} is allowed")
        if name == "bf16" and found.flips > options.flips * found.documents:
            beyond.append(f"{name}, {task}: {found.flips} of {found.documents} documents changed")
        if name != "bf16" and found.lead > 2 * found.largest:
            beyond.append(f"{name}, {task}: an answer changed that led by {found.lead:.1e}")
    return beyond


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help=f"folder with {CHECKPOINT} and eval/REPOSITORY/CONFIG/SPLIT.jsonl")
    add("--folder", type=Path, help="a folder that --collect has made")
    add("--collect", type=Path, metavar="DIR", help="make such a folder and end")
    add("--relufy", type=Path, default=ROOT / "target" / "cuda" / "release" / "relufy", help="the binary")
    add("--relufy-arg", action="append", default=[], help="passed on to `relufy eval` (--stage=1); repeatable")
    add("--attention", choices=("auto", "own", "cudnn"), help="of relufy on the GPU")
    add("--tasks", default=TASKS, help="separated by commas")
    add("--limit", type=int, default=500, help="documents of each task (default 500)")
    add("--f32-bound", type=float, default=3e-5, help="relative (default 3e-5)")
    add("--bf16-bound", type=float, default=1.5e-1, help="relative (default 0.15)")
    add("--flips", type=float, default=0.05, help="share of a task's documents in bf16 (default 0.05)")
    add("--no-gpu", action="store_true", help=argparse.SUPPRESS)  # to try this script without a GPU
    options = parser.parse_args()
    if (options.data is None) == (options.folder is None):
        parser.error("either --data or --folder")
    if options.collect and options.data is None:
        parser.error("--collect needs --data")
    return options


def main() -> int:
    options = arguments()
    if options.collect:
        collect(options.data, options.collect, options.limit)
        return 0
    if not os.access(options.relufy, os.X_OK):
        raise Failure(f"there is no program {options.relufy}\nhint: scripts/build-cuda.sh makes it")
    with tempfile.TemporaryDirectory(prefix="check-cuda-eval-") as scratch:
        work, folder = Path(scratch), options.folder
        if folder is None:
            folder = work / "carried"
            collect(options.data, folder, options.limit)
        cpu = evaluate(options, folder, work, "cpu", [])
        beyond = []
        print(COLUMNS.format("type", "task", "docs", "lls", "max |d|", "mean |d|", "relative", "greedy", "flips",
                             "lead", "cpu", "gpu"))
        for name in ("f32", "bf16"):
            flags = ["--tokens_per_batch", 700] if options.no_gpu else ["--device", "cuda", "--dtype", name]
            beyond += compare(name, evaluate(options, folder, work, name, flags), cpu, options)
    if beyond:
        print("\nbeyond the bounds:\n  " + "\n  ".join(beyond))
        return 1
    print("\nall within the bounds")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(f"error: {failure}")
