#!/usr/bin/env python3
"""Compares the speed of a CPU training step: relufy beside PyTorch.

Both train the same Llama shape (ReLU, f32, random weights) on random tokens. One step is
forward, backward, clipping of the global gradient norm at 1.0, AdamW and clearing the
gradients. PyTorch runs Hugging Face's LlamaForCausalLM, with whichever attention (eager or
sdpa) and whichever AdamW (fused or foreach) is faster on this machine.

    cargo build --release
    python3 scripts/bench_torch_cpu.py                    # both shapes, 7 pairs each
    python3 scripts/bench_torch_cpu.py --shape small --pairs 11 --steps 30
    python3 scripts/bench_torch_cpu.py --torch-only       # PyTorch alone

The two take turns: a pair is one run of relufy and one of PyTorch, and who goes first
alternates, so that a machine which gets slower or faster does so for both. PyTorch is
imported once and stays alive between its turns. A run's tokens/s come from its median step
after warm-up; the result is the median of the pairs' ratios.

PyTorch and transformers are installed into a virtual environment of their own, `.venv-bench`
in the repository (git ignores it). `--venv` puts it elsewhere, `--python` uses an interpreter
that has both already, and `--pip-arg` passes arguments to pip (an index of CPU-only wheels
saves a few gigabytes). Leave the machine alone while this runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["torch>=2.6", "transformers>=4.57", "numpy"]
# A run starts after this pause: worker threads of the one before spin for a moment.
SETTLE_SECONDS = 0.5


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model and its batch, as `relufy bench train --shape NAME` knows them."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    batch: int
    length: int
    steps: int  # measured steps a run unless --steps says otherwise

    @property
    def tokens(self) -> int:
        return self.batch * self.length


SHAPES = {
    "small": Shape(256, 4, 4, 704, 4096, batch=4, length=128, steps=20),
    "medium": Shape(512, 8, 8, 1408, 4096, batch=8, length=256, steps=5),
}


class Failure(Exception):
    """Something a person can act on; printed without a traceback."""


# --- PyTorch's side, in a process of its own -------------------------------------------------


class TorchTrainer:
    """One model with its optimizer; `run` trains it and times each step."""

    def __init__(self, shape: Shape, attention: str, optimizer: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            intermediate_size=shape.ffn,
            vocab_size=shape.vocab,
            max_position_embeddings=shape.length,
            hidden_act="relu",
            tie_word_embeddings=False,
            use_cache=False,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        model.train()
        parameters = list(model.parameters())
        wrong = {p.dtype for p in parameters} - {torch.float32}
        if wrong:
            raise Failure(f"the model's weights should be f32, found {wrong}")
        fast = {"fused": True} if optimizer == "fused" else {"foreach": True}
        self.model, self.parameters = model, parameters
        self.adamw = torch.optim.AdamW(parameters, lr=1e-4, **fast)
        self.ids = torch.randint(shape.vocab, (shape.batch, shape.length))
        self.clip = torch.nn.utils.clip_grad_norm_

    def step(self):
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.clip(self.parameters, 1.0)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return loss.detach()

    def run(self, warmup: int, steps: int) -> dict:
        for _ in range(warmup):
            self.step()
        times, loss = [], None
        for _ in range(steps):
            begun = time.perf_counter()
            loss = self.step()
            times.append((time.perf_counter() - begun) * 1e3)
        if not bool(loss.isfinite()):
            raise Failure(f"PyTorch's loss is {float(loss)}")
        return {"step_ms": times, "loss": float(loss)}


def calibrate(shape: Shape, steps: int) -> dict:
    """The best median step of each attention with each optimizer, over two rounds."""
    best: dict[tuple[str, str], float] = {}
    for _ in range(2):
        for attention in ("eager", "sdpa"):
            for optimizer in ("fused", "foreach"):
                trainer = TorchTrainer(shape, attention, optimizer)
                took = median(trainer.run(1, steps)["step_ms"])
                key = (attention, optimizer)
                best[key] = min(took, best.get(key, took))
    attention, optimizer = min(best, key=best.__getitem__)
    rows = [{"attention": a, "optimizer": o, "step_ms": ms} for (a, o), ms in best.items()]
    return {"attention": attention, "optimizer": optimizer, "tried": rows}


def worker(threads: int) -> int:
    """Answers commands, one JSON object a line, until its input ends."""
    # Libraries print what they like; only answers may reach the driver.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    trainer = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "start":
                import torch
                import transformers

                torch.set_num_threads(threads)
                torch.set_num_interop_threads(1)
                answer = {"torch": torch.__version__, "transformers": transformers.__version__}
            elif command["do"] == "calibrate":
                shape = SHAPES[command["shape"]]
                answer = calibrate(shape, command["steps"])
                trainer = TorchTrainer(shape, answer["attention"], answer["optimizer"])
                answer["parameters"] = sum(p.numel() for p in trainer.parameters)
            else:
                answer = trainer.run(command["warmup"], command["steps"])
        except Exception as error:  # noqa: BLE001 (told to the driver, which stops)
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
    return 0


class TorchWorker:
    """The driver's end of the PyTorch process."""

    def __init__(self, python: str, threads: int) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        command = [python, __file__, "--worker", "--threads", str(threads)]
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, text=True, env=environment
            )
        except OSError as error:
            raise Failure(f"cannot start {python}: {error.strerror}") from error
        self.versions = self.ask(do="start")

    def ask(self, **command) -> dict:
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failure(f"the PyTorch process ended (exit code {self.process.wait()})")
        answer = json.loads(line)
        if "error" in answer:
            raise Failure(f"PyTorch: {answer['error']}")
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# --- the driver ------------------------------------------------------------------------------


def torch_python(arguments: argparse.Namespace) -> str:
    """An interpreter with PyTorch: the one given, or that of our virtual environment."""
    if arguments.python:
        return arguments.python
    folder = Path(arguments.venv)
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        print(f"installing {', '.join(PACKAGES)} into {folder}", flush=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", *arguments.pip_arg, *PACKAGES]
            subprocess.run(pip, check=True)
        except subprocess.CalledProcessError as error:
            raise Failure(f"cannot install PyTorch: {error}") from error
        # Only now: an interrupted installation is done again.
        ready.touch()
    return str(python)


def run_relufy(binary: str, name: str, steps: int, threads: int) -> float:
    """One run of `relufy bench train`; its tokens/s."""
    command = [binary, "bench", "train", "--shape", name, "--steps", str(steps), "--json"]
    environment = dict(os.environ, RAYON_NUM_THREADS=str(threads))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise Failure(f"`{' '.join(command)}` failed ({done.returncode}):\n{done.stderr.strip()}")
    try:
        result = json.loads(done.stdout)
        shape, times, claimed = result["shape"], result["step_ms"], result["tokens_per_second"]
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"`{' '.join(command)}` wrote no result: {error!r}") from error
    if shape != name or len(times) != steps:
        raise Failure(f"relufy measured {len(times)} steps of {shape!r}, not {steps} of {name!r}")
    # The same statistic for both sides, so ours; the program's own must agree with it.
    speed = tokens_per_second(SHAPES[name], times)
    if abs(speed - claimed) > 0.05 * speed:
        raise Failure(f"relufy says {claimed} tokens/s, but its steps make {speed:.0f}")
    return speed


def tokens_per_second(shape: Shape, step_ms: list[float]) -> float:
    return shape.tokens / (median(step_ms) / 1e3)


def compare(name: str, torch: TorchWorker, arguments: argparse.Namespace) -> dict:
    """Runs all pairs of one shape and prints them."""
    shape = SHAPES[name]
    steps = arguments.steps or shape.steps
    print(
        f"\n{name}: hidden {shape.hidden}, {shape.layers} layers, {shape.heads} heads, "
        f"ffn {shape.ffn}, vocab {shape.vocab}, batch {shape.batch} x {shape.length}, f32"
    )
    chosen = torch.ask(do="calibrate", shape=name, steps=arguments.calibration_steps)
    tried = ", ".join(
        f"{row['attention']}/{row['optimizer']} {row['step_ms']:.0f}" for row in chosen["tried"]
    )
    print(f"PyTorch's step in ms: {tried}")
    print(
        f"PyTorch with {chosen['attention']} attention and {chosen['optimizer']} AdamW, "
        f"{chosen['parameters']:,} parameters; {steps} steps a run, {arguments.threads} threads\n"
    )

    def torch_turn() -> float:
        time.sleep(SETTLE_SECONDS)
        answer = torch.ask(do="run", warmup=arguments.warmup, steps=steps)
        return tokens_per_second(shape, answer["step_ms"])

    def relufy_turn() -> float:
        time.sleep(SETTLE_SECONDS)
        return run_relufy(arguments.relufy, name, steps, arguments.threads)

    pairs = []
    print(f"{'pair':>6} {'relufy tok/s':>14} {'PyTorch tok/s':>14} {'ratio':>7}")
    for number in range(1, arguments.pairs + 1):
        if arguments.torch_only:
            pair = {"relufy": None, "torch": torch_turn(), "ratio": None}
        elif number % 2:
            ours = relufy_turn()
            pair = {"relufy": ours, "torch": torch_turn()}
        else:
            theirs = torch_turn()
            pair = {"relufy": relufy_turn(), "torch": theirs}
        if pair["relufy"] is not None:
            pair["ratio"] = pair["relufy"] / pair["torch"]
        pairs.append(pair)
        print(row(str(number), pair), flush=True)
    middle = {
        key: None if arguments.torch_only and key != "torch" else median(p[key] for p in pairs)
        for key in ("relufy", "torch", "ratio")
    }
    print(row("median", middle))
    return {"shape": asdict(shape), "steps": steps, "torch": chosen, "pairs": pairs, "median": middle}


def row(label: str, pair: dict) -> str:
    ours = "-" if pair["relufy"] is None else f"{pair['relufy']:,.0f}"
    ratio = "-" if pair["ratio"] is None else f"{pair['ratio']:.3f}"
    return f"{label:>6} {ours:>14} {pair['torch']:>14,.0f} {ratio:>7}"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), action="append", help="default: all; may be repeated")
    add("--pairs", type=positive, default=7, help="pairs of runs per shape (default 7)")
    add("--steps", type=positive, help="measured steps a run (default: 20 small, 5 medium)")
    add("--warmup", type=positive, default=2, help="PyTorch's steps before each run (default 2)")
    add("--calibration-steps", type=positive, default=3, help="steps per variant (default 3)")
    add("--threads", type=positive, default=2, help="threads of either side (default 2)")
    add("--relufy", default=str(ROOT / "target" / "release" / "relufy"), help="the binary")
    add("--torch-only", action="store_true", help="measure PyTorch without relufy")
    add("--venv", default=str(ROOT / ".venv-bench"), help="virtual environment to make or use")
    add("--python", help="an interpreter that has torch and transformers; installs nothing")
    add("--pip-arg", action="append", default=[], help="e.g. --pip-arg=--index-url=URL")
    add("--json", metavar="FILE", help="write the results there too")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.worker:
        return worker(options.threads)
    if not options.torch_only and not os.access(options.relufy, os.X_OK):
        raise Failure(
            f"there is no program {options.relufy}\n"
            "hint: `cargo build --release` makes it; `--torch-only` measures PyTorch alone"
        )
    torch = TorchWorker(torch_python(options), options.threads)
    try:
        versions = torch.versions
        print(f"PyTorch {versions['torch']}, transformers {versions['transformers']}")
        load = os.getloadavg()[0]
        if load > 1.0:
            print(f"warning: something else is running here (load {load:.1f}); don't trust this")
        results = {name: compare(name, torch, options) for name in options.shape or SHAPES}
    finally:
        torch.close()
    if options.json:
        report = {"versions": versions, "threads": options.threads, "results": results}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
