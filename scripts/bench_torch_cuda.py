#!/usr/bin/env python3
"""Compares the speed of a training step on one NVIDIA GPU: relufy beside PyTorch.

Both train the same shape in bf16 from random weights on random tokens. One step is forward,
backward, clipping of the global gradient norm at 1.0, AdamW and clearing the gradients. PyTorch
runs Hugging Face's model with sdpa attention, bf16 weights and moments and the fused AdamW;
relufy (`relufy bench train`) keeps f32 master weights and moments.

    scripts/build-cuda.sh
    python3 scripts/bench_torch_cuda.py --shape 1b --rounds 2 --out 1b.json
    python3 scripts/bench_torch_cuda.py --shape 7b --modes eager,checkpointing \\
        --relufy-arg=--recompute --relufy-arg=auto
    python3 scripts/bench_torch_cuda.py --shape 1b --variant "s1=--stage 1" --modes compile

It needs an interpreter with a PyTorch for CUDA 13 and transformers: this one, or `--python`.

PyTorch's modes:
    eager           as it is
    checkpointing   gradient checkpointing of every block
    compile         torch.compile of the model's forward with its loss (one graph where that works)
    compile-step    that, and clipping with AdamW compiled too
    compile-cudnn   compile, with cuDNN's attention in place of FlashAttention-2
    compile-tuned   compile with mode max-autotune-no-cudagraphs

Where Hugging Face's model stands in PyTorch's way it is helped: no mask is built for a batch
without padding (OPT and Falcon would lose flash attention), a single key head goes to sdpa as
grouped attention, and OPT throws no dice for dropping layers (it would not be one graph).

Every measurement is a process of its own, one after another, so that the two sides never share
the GPU. A round measures every row once; every other round goes backwards. A row shows the median
of all its steps after `--warmup` ones, and the median over the rounds of the ratios to PyTorch's
compile and eager. A mode that fails is a row with the reason. `--budget` ends the whole run in
time: what no longer fits is a row that says so, and `--out` is written after every measurement.

Model TFLOP/s count the same for both sides, whatever is recomputed:

    FLOPs of a step = 6 * matrix parameters * tokens + 12 * L * H * D * T * T * B * 0.5

Matrix parameters are those of the blocks' linear layers and of the head (tied or not), not those
of embeddings, norms and biases; L layers, H query heads of size D, B sequences of T tokens, and
a half for causal attention. MFU is the share of 989 TFLOP/s (`--peak`), the H100's and H200's
dense bf16 rate.

Memory is `torch.cuda.max_memory_allocated` and relufy's `peak_bytes`. Leave the GPU alone while
this runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Callable

ROOT = Path(__file__).resolve().parent.parent
MODES = ("eager", "checkpointing", "compile", "compile-step", "compile-cudnn", "compile-tuned")
GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """A model and its batch, as `relufy bench train --shape NAME` knows them."""

    family: str
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    batch: int
    length: int
    activation: str
    steps: int = 20

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def matrix_parameters(self) -> int:
        """Parameters that a token is multiplied with."""
        head = self.hidden // self.heads
        keys = head if self.family == "falcon" else self.hidden
        attention = self.hidden * (2 * self.hidden + 2 * keys)
        feed_forward = (3 if self.family == "llama" else 2) * self.hidden * self.ffn
        return self.layers * (attention + feed_forward) + self.vocab * self.hidden

    @property
    def flops(self) -> float:
        """Of one training step."""
        attention = 12 * self.layers * self.hidden * self.length * self.length * self.batch * 0.5
        return 6 * self.matrix_parameters * self.tokens + attention


def llama(hidden: int, layers: int, heads: int, ffn: int, batch: int, length: int, **more: Any) -> Shape:
    settings = {"vocab": 32000, "activation": "silu"} | more
    return Shape("llama", hidden, layers, heads, ffn, batch=batch, length=length, **settings)


SHAPES = {
    "1b": llama(2048, 16, 16, 5632, 8, 2048),
    "130m": llama(768, 12, 12, 2048, 32, 1024, steps=40),
    "7b": llama(4096, 32, 32, 11008, 4, 2048, steps=12),
    "13b": llama(5120, 40, 40, 13824, 2, 2048, steps=12),
    "opt125m": Shape("opt", 768, 12, 12, 3072, 50272, 32, 1024, "relu", steps=40),
    "opt1b": Shape("opt", 2048, 24, 32, 8192, 50272, 8, 2048, "relu"),
    "falcon1b": Shape("falcon", 2048, 24, 32, 8192, 50304, 8, 2048, "gelu"),
    # Those of the CPU benchmark, to try this script without a GPU.
    "small": llama(256, 4, 4, 704, 4, 128, vocab=4096, activation="relu", steps=5),
    "medium": llama(512, 8, 8, 1408, 8, 256, vocab=4096, activation="relu", steps=3),
}
PUBLIC = [name for name in SHAPES if name not in ("small", "medium")]


class Failure(Exception):
    """Something a person can act on; printed without a traceback."""


# --- PyTorch's side: one shape in one mode, in a process of its own ---------------------------


def config_of(shape: Shape) -> Any:
    """Hugging Face's configuration of the shape."""
    import transformers

    if shape.family == "llama":
        return transformers.LlamaConfig(
            hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads, intermediate_size=shape.ffn, vocab_size=shape.vocab,
            max_position_embeddings=shape.length, hidden_act=shape.activation, tie_word_embeddings=False,
            use_cache=False)
    if shape.family == "opt":
        return transformers.OPTConfig(
            hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            ffn_dim=shape.ffn, vocab_size=shape.vocab, max_position_embeddings=max(2048, shape.length),
            word_embed_proj_dim=shape.hidden, activation_function=shape.activation, do_layer_norm_before=True,
            dropout=0.0, attention_dropout=0.0, layerdrop=0.0, tie_word_embeddings=True, use_cache=False)
    return transformers.FalconConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        ffn_hidden_size=shape.ffn, vocab_size=shape.vocab, max_position_embeddings=shape.length,
        activation=shape.activation, multi_query=True, new_decoder_architecture=False, parallel_attn=True,
        bias=False, alibi=False, hidden_dropout=0.0, attention_dropout=0.0, tie_word_embeddings=True,
        use_cache=False)


def help_model(model: Any) -> None:
    """Takes out of PyTorch's way what the model does not need here.

    No mask for a batch without padding and grouped key heads let sdpa choose its flash kernels;
    OPT's dice for dropping layers, which it never drops, would cut its graph at each.
    """
    import torch

    module = sys.modules[type(model).__module__]
    if hasattr(module, "create_causal_mask"):
        module.create_causal_mask = lambda *_, **__: None
    if model.config.model_type == "opt":
        model.model.decoder.training = False  # of this module alone, not of its layers
    if model.config.model_type != "falcon":
        return
    plain = torch.nn.functional.scaled_dot_product_attention

    def grouped(query: Any, key: Any, value: Any, **settings: Any) -> Any:
        return plain(query, key, value, enable_gqa=query.shape[1] != key.shape[1], **settings)

    def expanded(query: Any, key: Any, value: Any, **settings: Any) -> Any:
        heads = query.shape[1]
        key, value = (x.expand(-1, heads, -1, -1) for x in (key, value))
        return plain(query, key, value, **settings)

    head = model.config.hidden_size // model.config.num_attention_heads
    query, key = (torch.ones(1, heads, 64, head, device=model.device, dtype=model.dtype, requires_grad=True)
                  for heads in (model.config.num_attention_heads, 1))
    try:
        grouped(query, key, key, is_causal=True).sum().backward()
        chosen = grouped
    except RuntimeError:  # no flash kernel for it
        chosen = expanded
    torch.nn.functional.scaled_dot_product_attention = chosen


class TorchTrainer:
    """One model with its optimizer."""

    def __init__(self, shape: Shape, mode: str, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.cuda = device == "cuda"
        self.torch = torch
        dtype = torch.bfloat16 if self.cuda else torch.float32
        torch.manual_seed(0)
        if self.cuda:
            # Attention with all scores in memory would be no peer: rather an error.
            torch.backends.cuda.enable_math_sdp(False)
        if mode == "compile-cudnn":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            # For the life of the process.
            self.backend = sdpa_kernel([SDPBackend.CUDNN_ATTENTION])
            self.backend.__enter__()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config_of(shape), attn_implementation="sdpa")
        torch.set_default_dtype(before)
        model.train()
        help_model(model)
        if mode == "checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.parameters = list(model.parameters())
        wrong = {p.dtype for p in self.parameters} - {dtype}
        if wrong:
            raise Failure(f"the model's weights should be {dtype}, found {wrong}")
        self.adamw = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.ids = torch.randint(shape.vocab, (shape.batch, shape.length), device=device)
        self.notes: list[str] = []

        # The model shifts the labels itself, and computes the loss in f32.
        def loss(ids: Any) -> Any:
            return model(input_ids=ids, labels=ids, use_cache=False).loss

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.adamw.step()

        self.loss, self.update = loss, update
        if mode.startswith("compile"):
            self.compile(loss, "max-autotune-no-cudagraphs" if mode == "compile-tuned" else None)
        if mode == "compile-step":
            # A learning rate in a tensor, so that a schedule would not compile again.
            lr = torch.tensor(1e-4, device=device) if self.cuda else 1e-4
            self.adamw = torch.optim.AdamW(self.parameters, lr=lr, capturable=self.cuda, foreach=True)
            self.update = torch.compile(update)

    def compile(self, loss: Callable[[Any], Any], mode: str | None) -> None:
        """One graph, or as many as it takes."""
        compiled = self.torch.compile(loss, fullgraph=True, mode=mode)
        try:
            compiled(self.ids).backward()
        except self.torch._dynamo.exc.TorchDynamoException as error:
            self.notes.append(f"graph breaks: {first_line(error)}")
            self.torch._dynamo.reset()
            compiled = self.torch.compile(loss, mode=mode)
            compiled(self.ids).backward()
        self.adamw.zero_grad(set_to_none=True)
        self.loss = compiled

    def step(self) -> Any:
        loss = self.loss(self.ids)
        loss.backward()
        self.update()
        self.adamw.zero_grad(set_to_none=True)
        return loss.detach()

    def mark(self) -> Any:
        """A point in time, on the GPU's own clock: nobody waits for it until the end."""
        if not self.cuda:
            return time.perf_counter()
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def run(self, warmup: int, steps: int) -> dict[str, Any]:
        begun = time.perf_counter()
        for _ in range(warmup):
            self.step()
        if self.cuda:
            self.torch.cuda.synchronize()
        warmed = time.perf_counter() - begun
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
        marks, loss = [self.mark()], None
        for _ in range(steps):
            loss = self.step()
            marks.append(self.mark())
        if self.cuda:
            self.torch.cuda.synchronize()
            times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
        else:
            times = [1e3 * (b - a) for a, b in zip(marks, marks[1:])]
        if not bool(loss.isfinite()):
            raise Failure(f"PyTorch's loss is {float(loss)}")
        answer = {"step_ms": times, "loss": float(loss), "warmup_seconds": warmed}
        if self.cuda:
            answer["peak_bytes"] = self.torch.cuda.max_memory_allocated()
            answer["reserved_bytes"] = self.torch.cuda.max_memory_reserved()
        return answer


def worker(task: dict[str, Any]) -> int:
    """Measures one mode; the answer is one line of JSON."""
    # Libraries print what they like; only the answer may reach the driver.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        import torch
        import transformers

        shape = replace(SHAPES[task["shape"]], activation=task["activation"])
        trainer = TorchTrainer(shape, task["mode"], task["device"])
        answer = trainer.run(task["warmup"], task["steps"])
        answer |= {
            "parameters": sum(p.numel() for p in trainer.parameters), "notes": trainer.notes,
            "torch": torch.__version__, "transformers": transformers.__version__,
            "gpu": torch.cuda.get_device_name() if trainer.cuda else "none",
        }
    except Exception as error:  # noqa: BLE001 (told to the driver, which makes it a row)
        answer = {"error": f"{type(error).__name__}: {first_line(error)}"}
    answers.write(json.dumps(answer) + "\n")
    return 0


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


# --- the driver ------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table: a side in one mode, over all rounds."""

    shape: str
    side: str
    kind: str  # relufy or torch
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good(self) -> list[dict[str, Any]]:
        return [answer for answer in self.rounds if "error" not in answer]

    @property
    def steps(self) -> list[float]:
        return [ms for answer in self.good for ms in answer["step_ms"]]

    def record(self) -> dict[str, Any]:
        shape = SHAPES[self.shape]
        record = {"shape": self.shape, "side": self.side, "kind": self.kind, "rounds": self.rounds}
        if self.steps:
            seconds = median(self.steps) / 1e3
            record |= {"median_ms": 1e3 * seconds, "tokens_per_second": shape.tokens / seconds,
                       "model_tflops": shape.flops / seconds / 1e12}
        return record


class Clock:
    """How much of the budget is left."""

    def __init__(self, budget: float | None) -> None:
        self.end = None if budget is None else time.monotonic() + budget

    def left(self, at_most: float) -> float:
        return at_most if self.end is None else min(at_most, self.end - time.monotonic())


def measure(row: Row, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """One measurement of a row: an answer, or an `error`."""
    limit = clock.left(options.timeout)
    if limit < options.least:
        return {"error": f"skipped: {max(limit, 0):.0f} s of the budget were left"}
    begun = time.monotonic()
    try:
        # A session of its own, so that a timeout ends compiler processes too.
        process = subprocess.Popen(row.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env=row.environment, start_new_session=True)
    except OSError as error:
        return {"error": f"cannot start {row.command[0]}: {error.strerror}"}
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return {"error": f"no result within {limit:.0f} s"}
    if options.verbose and err:
        print(err, file=sys.stderr)
    try:
        answer = json.loads(out.strip().splitlines()[-1] if row.kind == "torch" else out)
    except (ValueError, IndexError):
        lines = [line.strip() for line in err.splitlines() if line.strip()] or ["no output"]
        why = next((line for line in lines if line.lower().startswith("error")), lines[-1])
        return {"error": f"exit code {process.returncode}: {why[:300]}"}
    if row.kind == "relufy" and "error" not in answer:
        answer = checked(answer, row, options)
    answer["wall_seconds"] = time.monotonic() - begun
    return answer


def checked(answer: Any, row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """What relufy measured, without the steps that warm up."""
    shape = SHAPES[row.shape]
    try:
        times, claimed, name = answer["step_ms"], answer["tokens_per_second"], answer["shape"]
    except (KeyError, TypeError) as error:
        return {"error": f"not the JSON of `relufy bench train`: {error!r}"}
    wanted = options.warmup + steps_of(row.shape, options)
    name = name.get("name") if isinstance(name, dict) else name
    if name != row.shape or len(times) != wanted:
        return {"error": f"measured {len(times)} steps of {name!r}, not {wanted} of {row.shape!r}"}
    # The same statistic for both sides, so ours; the program's own must agree with it.
    own = shape.tokens / median(times) * 1e3
    if abs(own - claimed) > 0.05 * own:
        return {"error": f"says {claimed} tokens/s, but its steps make {own:.0f}"}
    loss = answer.get("last_loss")
    if not isinstance(loss, float) or loss != loss or loss in (float("inf"), float("-inf")):
        return {"error": f"its loss is {loss}"}
    wanted_activation = options.activation or shape.activation
    if answer.get("activation", wanted_activation) != wanted_activation:
        return {"error": f"its activation is {answer['activation']}, not {wanted_activation}"}
    return answer | {"all_step_ms": times, "step_ms": times[options.warmup:]}


def steps_of(name: str, options: argparse.Namespace) -> int:
    return options.steps or SHAPES[name].steps


def rows_of(name: str, options: argparse.Namespace) -> list[Row]:
    """The rows of a shape, relufy's first."""
    from cuda_libraries import environment

    steps, activation = steps_of(name, options), options.activation or SHAPES[name].activation
    rows = []
    cuda = options.device == "cuda"
    kinds = ("cudnn", "own") if options.attention == "both" and cuda else (options.attention,)
    variants = [("", "")] if not options.only_variants else []
    variants += [tuple(text.split("=", 1)) if "=" in text else (text, text) for text in options.variant]
    for label, extra in [] if options.torch_only else variants:
        for attention in kinds:
            command = [options.relufy, "bench", "train", "--shape", name, "--steps", str(options.warmup + steps),
                       "--json"]
            if cuda:
                command += ["--device", "cuda", "--dtype", "bf16", "--activation", activation]
            if options.recompute:
                command += ["--recompute", options.recompute]
            command += options.relufy_arg + shlex.split(extra)
            side = ", ".join(part for part in ("relufy", f"{attention} attention" if cuda else "", label) if part)
            rows.append(Row(name, side, "relufy", command, environment(attention if cuda else None)))
    for mode in options.modes:
        task = {"shape": name, "mode": mode, "device": options.device, "warmup": options.warmup, "steps": steps,
                "activation": activation}
        command = [options.python, str(Path(__file__).resolve()), "--worker", json.dumps(task)]
        settings = dict(os.environ, TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
        rows.append(Row(name, f"PyTorch {mode}", "torch", command, settings))
    return rows


def ratio(row: Row, other: Row | None) -> float | None:
    """The median over the rounds in which both were measured; of tokens/s."""
    if other is None:
        return None
    pairs = [median(theirs["step_ms"]) / median(ours["step_ms"])
             for ours, theirs in zip(row.rounds, other.rounds) if "error" not in ours and "error" not in theirs]
    return median(pairs) if pairs else None


def table(rows: list[Row], options: argparse.Namespace) -> str:
    head = ["Shape", "Side", "tokens/s", "step ms", "range", "TFLOP/s", "MFU", "peak GiB", "of compile", "of eager"]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "--:|" * (len(head) - 2)]
    for row in rows:
        if not row.steps:
            reasons = sorted((answer["error"] for answer in row.rounds), key=lambda why: why.startswith("skipped"))
            why = reasons[0].replace("|", "/") if reasons else "not measured"
            lines.append(f"| {row.shape} | {row.side} | {why} |" + " |" * (len(head) - 3))
            continue
        record = row.record()
        peak = max((answer.get("peak_bytes") or 0 for answer in row.good), default=0)

        def against(side: str) -> str:
            other = next((r for r in rows if r.shape == row.shape and r.side == f"PyTorch {side}"), None)
            found = ratio(row, other)
            return "" if found is None else f"{found:.3f}"

        cells = [row.shape, row.side, f"{record['tokens_per_second']:,.0f}", f"{record['median_ms']:.2f}",
                 f"{min(row.steps):.1f} to {max(row.steps):.1f}", f"{record['model_tflops']:.1f}",
                 f"{100 * record['model_tflops'] / options.peak:.1f} %", f"{peak / GIB:.2f}" if peak else "",
                 against("compile"), against("eager")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def said_of_itself(rows: list[Row]) -> str:
    """What relufy says of its steps: how it did them, their parts, and the memory it foresaw."""
    lines = []
    for row in rows:
        for answer in [answer for answer in row.good if row.kind == "relufy"][-1:]:
            said = [f"{key} {answer[key]}" for key in ("recompute", "attention", "deterministic", "grad_dtype",
                                                       "moment_dtype") if answer.get(key) is not None]
            if isinstance(answer.get("parts"), dict):
                said += [f"{name} {value:.2f} ms" for name, value in answer["parts"].items()
                         if isinstance(value, (int, float))]
            planned, peak = answer.get("planned_bytes"), answer.get("peak_bytes")
            if planned and peak:
                said.append(f"memory planned {planned / GIB:.2f} GiB, {100 * (planned / peak - 1):+.1f} % of the peak")
            lines.append(f"{row.shape}, {row.side}: {', '.join(said)}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """The GPU, as its driver names it."""
    query = "name,driver_version,power.limit,temperature.gpu,memory.total"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True,
                              text=True, check=False, timeout=30)
        return {"gpu": done.stdout.strip().splitlines()[:1], "query": query}
    except (OSError, subprocess.TimeoutExpired):
        return {}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def modes(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in MODES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(MODES)}")
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), metavar="NAME", action="append",
        help=f"{', '.join(PUBLIC)}; may be repeated (default: 1b)")
    add("--modes", type=modes, default=modes("eager,checkpointing,compile"), help="of PyTorch, separated by commas "
        "(default: eager,checkpointing,compile); empty: none")
    add("--rounds", type=positive, default=1, help="measurements of each row (default 1)")
    add("--steps", type=positive, help="measured steps each time (default: 20; 12 of 7b, 40 of the small ones)")
    add("--warmup", type=positive, default=3, help="steps before them, of either side (default 3)")
    add("--attention", choices=("cudnn", "own", "auto", "both"), default="both", help="of relufy (default both)")
    add("--activation", metavar="NAME", help="of both sides, as Hugging Face names it (default: the family's own)")
    add("--recompute", metavar="WHAT", help="passed on to relufy: none, inputs, block or auto")
    add("--relufy-arg", action="append", default=[], help="passed on to relufy; may be repeated")
    add("--variant", action="append", default=[], metavar="LABEL=ARGUMENTS",
        help="measure relufy once more with these arguments; may be repeated")
    add("--only-variants", action="store_true", help="measure relufy with the variants only")
    add("--relufy", default=str(ROOT / "target" / "cuda" / "release" / "relufy"), help="the binary")
    add("--torch-only", action="store_true", help="measure PyTorch without relufy")
    add("--python", default=sys.executable, help="an interpreter that has torch and transformers (default: this)")
    add("--budget", type=float, metavar="SECONDS", help="of the whole run; what no longer fits is skipped")
    add("--timeout", type=float, default=300, metavar="SECONDS", help="of one measurement (default 300)")
    add("--least", type=float, default=20, metavar="SECONDS", help="start none with less time left (default 20)")
    add("--peak", type=float, default=989, help="TFLOP/s that are 100 %% MFU (default 989)")
    add("--out", type=Path, metavar="FILE", help="write the results there, as JSON")
    add("--verbose", action="store_true", help="show what the processes write on stderr")
    add("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    add("--worker", metavar="TASK", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.worker:
        return worker(json.loads(options.worker))
    if not options.torch_only and not os.access(options.relufy, os.X_OK):
        raise Failure(f"there is no program {options.relufy}\n"
                      "hint: scripts/build-cuda.sh makes it; --torch-only measures PyTorch alone")
    clock = Clock(options.budget)
    result: dict[str, Any] = {"machine": machine(), "arguments": sys.argv[1:], "shapes": {}, "rows": []}
    every: list[Row] = []
    for name in options.shape or ["1b"]:
        shape = SHAPES[name]
        result["shapes"][name] = asdict(shape) | {
            "matrix_parameters": shape.matrix_parameters, "flops": shape.flops}
        rows = rows_of(name, options)
        every += rows
        for number in range(options.rounds):
            for row in rows if number % 2 == 0 else reversed(rows):
                answer = measure(row, options, clock)
                row.rounds.append(answer)
                said = answer.get("error") or f"{median(answer['step_ms']):.2f} ms"
                wall = f" ({answer['wall_seconds']:.0f} s)" if "wall_seconds" in answer else ""
                notes = "".join(f"; {note}" for note in answer.get("notes", []))
                print(f"{name}, round {number + 1}, {row.side}: {said}{wall}{notes}", file=sys.stderr, flush=True)
                if options.out:
                    result["rows"] = [row.record() for row in every]
                    options.out.write_text(json.dumps(result, indent=1))
    torch = next((answer for row in every for answer in row.good if "torch" in answer), {})
    print(f"\n{'; '.join(result['machine'].get('gpu', []))} PyTorch {torch.get('torch', '-')}, "
          f"transformers {torch.get('transformers', '-')}, {options.rounds} round(s)\n")
    print(table(every, options))
    if said := said_of_itself(every):
        print(f"\n{said}")
    # A table without a number is no result.
    return 0 if any(row.steps for row in every) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(f"error: {failure}")
