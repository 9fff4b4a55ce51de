#!/usr/bin/env python3
"""Checks training on a GPU against the CPU and against PyTorch: the same data, the same schedule.

A real checkpoint (stories3M) is trained for 200 steps by
    relufy on the GPU in bf16, twice: the losses must be bit-equal
    relufy on the GPU in f32
    relufy on the CPU in f32
    PyTorch in f32, and with bf16 autocast
and the loss of every step is compared. In f32, the gradients of the first step are compared
tensor by tensor, as AdamW's first moment holds them after that step.

    scripts/build-cuda.sh
    python3 scripts/check_cuda_training.py --data ../shared/data                # here
    python3 scripts/check_cuda_training.py --data ../shared/data --collect .carry/training
    python3 scripts/check_cuda_training.py --folder .carry/training             # there

`--collect` puts what a run needs into a folder of about 16 MB: the checkpoint, and the first
stories of the corpus. Nothing else is read then, and zstd is not needed. `--cpu-metrics` takes
the `metrics.jsonl` of an earlier CPU run instead of making one.

PyTorch runs Hugging Face's Llama with sdpa attention. It reads the batches that relufy reads
because this script packs the corpus by the same rules: documents with BOS and EOS one after the
other, cut into sequences, shuffled by ChaCha8; attention stays within a document and positions
begin anew in each. AdamW, warm-up, cosine and clipping are written down here once more.

The bounds (`--loss-bound`, `--gradient-bound`): bf16 against f32 within 1 % at each step and over
the mean of the last 50; f32 against f32 likewise; gradients within 1e-4 relative by norm. Needs an
interpreter with torch, transformers, tokenizers and safetensors. `--stage 1` and `2` relufy the
model on both sides first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = "checkpoints/stories3M"
CORPUS = "corpora/stories3m-samples.jsonl.zst"
IGNORE = -100

CONFIG = """output_dir = {output}
seed = {seed}

[model]
path = {model}
stage = {stage}

[train]
seq_len = {length}
per_device_train_batch_size = {batch}
max_steps = {steps}
logging_steps = 1
eval_steps = 0
save_steps = {save}
tensorboard = false

[optim]
learning_rate = 3e-4
lr_scheduler_type = "cosine"
warmup_steps = 20
min_lr_ratio = 0.1
weight_decay = 0.1
adam_beta1 = 0.9
adam_beta2 = 0.95
max_grad_norm = 1.0

[data]
cache_dir = {cache}

[[data.sources]]
path = {corpus}
"""


class Failure(Exception):
    """Something a person can act on; printed without a traceback."""


# --- the data, packed as relufy packs it ------------------------------------------------------


def chacha8(key: bytes, counter: int) -> list[int]:
    """A block of ChaCha with 8 rounds, 64-bit counter, nonce 0."""
    state = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key),
             counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    x = list(state)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for to, by, other, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[to] = (x[to] + x[by]) & 0xFFFFFFFF
            mixed = x[other] ^ x[to]
            x[other] = (mixed << turn | mixed >> (32 - turn)) & 0xFFFFFFFF

    for _ in range(4):
        for column in range(4):
            quarter(column, column + 4, column + 8, column + 12)
        for row in range(4):
            quarter(row, 4 + (row + 1) % 4, 8 + (row + 2) % 4, 12 + (row + 3) % 4)
    return [(a + b) & 0xFFFFFFFF for a, b in zip(x, state)]


def permutation(seed: int, epoch: int, length: int) -> list[int]:
    """The order of the only pool's sequences in an epoch."""
    epoch_purpose, pool = 1, 0
    key = struct.pack("<4Q", seed, epoch_purpose, pool << 32 | epoch & 0xFFFFFFFF, epoch >> 32)
    words: list[int] = []
    block = 0
    order = list(range(length))
    for i in range(length - 1, 0, -1):
        if not words:
            words = chacha8(key, block)[::-1]
            block += 1
        low, high = words.pop(), words.pop()
        j = ((high << 32 | low) * (i + 1)) >> 64
        order[i], order[j] = order[j], order[i]
    return order


def documents(folder: Path, corpus: Path) -> list[list[int]]:
    """The ids of each document, with what the tokenizer adds, and EOS."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    eos = tokenizer.token_to_id(settings["eos_token"])
    texts = []
    with open(corpus, encoding="utf-8") as lines:
        texts = [text for line in lines if line.strip() and (text := json.loads(line)["text"])]
    found = []
    for encoding in tokenizer.encode_batch(texts):
        ids = list(encoding.ids)
        found.append(ids if ids[-1:] == [eos] else [*ids, eos])
    return found


@dataclass
class Batches:
    """The sequences of a corpus in relufy's order."""

    ids: list[int]
    starts: list[int]  # of each position's document in the stream
    ends: list[int]
    length: int
    seed: int
    pad: int

    @classmethod
    def of(cls, found: list[list[int]], length: int, seed: int) -> Batches:
        ids, starts, ends = [], [], []
        for document in found:
            begin = len(ids)
            ids += document
            starts += [begin] * len(document)
            ends += [begin + len(document)] * len(document)
        return cls(ids, starts, ends, length, seed, found[0][-1])

    @property
    def sequences(self) -> int:
        return -(-(len(self.ids) - 1) // self.length)

    def row(self, index: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """Ids, targets, positions and a number for each segment."""
        begin = index * self.length
        end = min(begin + self.length, len(self.ids) - 1)
        ids, targets, positions, segments = [], [], [], []
        for at in range(begin, end):
            first = max(self.starts[at], begin)
            ids.append(self.ids[at])
            targets.append(self.ids[at + 1] if at + 1 < self.ends[at] else IGNORE)
            positions.append(at - first)
            segments.append(first)
        missing = self.length - len(ids)
        return (ids + [self.pad] * missing, targets + [IGNORE] * missing,
                positions + list(range(missing)), segments + [-1] * missing)

    def batch(self, step: int, rows: int) -> list[tuple[list[int], ...]]:
        found = []
        for number in range(step * rows, (step + 1) * rows):
            epoch, place = divmod(number, self.sequences)
            if not hasattr(self, "order") or self.order[0] != epoch:
                self.order = (epoch, permutation(self.seed, epoch, self.sequences))
            found.append(self.row(self.order[1][place]))
        return found


# --- PyTorch ---------------------------------------------------------------------------------


def rate(step: int, steps: int) -> float:
    """The learning rate of `CONFIG`'s schedule, steps counted from 0."""
    peak, warmup, floor = 3e-4, 20, 0.1
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def relufy_model(model: Any, stage: int) -> None:
    """ReLU for SiLU, and from stage 2 on behind the norms too."""
    import torch

    for module in model.modules():
        if stage >= 1 and hasattr(module, "act_fn"):
            module.act_fn = torch.nn.ReLU()
        for name in ("input_layernorm", "post_attention_layernorm"):
            if stage >= 2 and hasattr(module, name):
                getattr(module, name).register_forward_hook(lambda _, __, output: torch.relu(output))


def train_torch(model_folder: Path, batches: Batches, options: argparse.Namespace, device: str,
                bf16: bool) -> tuple[list[float], dict[str, Any]]:
    """The loss of each step, and AdamW's first moments after the first."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="sdpa").float().to(device).train()
    relufy_model(model, options.stage)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for _, p in named if p.dim() == 2], "weight_decay": 0.1},
              {"params": [p for _, p in named if p.dim() != 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    losses, moments = [], {}
    for step in range(options.steps):
        ids, targets, positions, segments = (
            torch.tensor(part, device=device) for part in zip(*batches.batch(step, options.batch)))
        causal = torch.ones(options.length, options.length, dtype=torch.bool, device=device).tril()
        mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for group in adamw.param_groups:
            group["lr"] = rate(step, options.steps)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step == 0:
            moments = {name: adamw.state[p]["exp_avg"].double().cpu() for name, p in named}
    return [float(loss) for loss in losses], moments


def fused(moments: dict[str, Any], layers: int) -> dict[str, Any]:
    """PyTorch's tensors under the names of relufy's optimizer file, queries, keys and values together."""
    import torch

    names = {"embed": ["model.embed_tokens.weight"], "finalnorm": ["model.norm.weight"], "head": ["lm_head.weight"]}
    for n in range(layers):
        attention, mlp = f"model.layers.{n}.self_attn.", f"model.layers.{n}.mlp."
        names |= {
            f"layers.{n}.attnnorm": [f"model.layers.{n}.input_layernorm.weight"],
            f"layers.{n}.qkv": [f"{attention}{x}_proj.weight" for x in "qkv"],
            f"layers.{n}.o": [f"{attention}o_proj.weight"],
            f"layers.{n}.mlpnorm": [f"model.layers.{n}.post_attention_layernorm.weight"],
            f"layers.{n}.up": [f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"],
            f"layers.{n}.down": [f"{mlp}down_proj.weight"],
        }
    return {name: torch.cat([moments[part] for part in parts]) for name, parts in names.items()
            if all(part in moments for part in parts)}


# --- relufy ----------------------------------------------------------------------------------


def train_relufy(options: argparse.Namespace, model: Path, corpus: Path, work: Path, name: str, flags: list[str],
                 steps: int, save: int = 0) -> Path:
    """A run of relufy; its folder."""
    from cuda_libraries import environment

    folder = work / name
    values = {"output": folder, "model": model, "corpus": corpus, "cache": work / "cache"}
    text = CONFIG.format(**{key: json.dumps(str(path)) for key, path in values.items()}, seed=options.seed,
                         stage=options.stage, length=options.length, batch=options.batch, steps=steps, save=save)
    config = work / f"{name}.toml"
    config.write_text(text, encoding="utf-8")
    command = [options.relufy, "train", str(config), *flags, *options.relufy_arg]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment(options.attention), check=False)
    if done.returncode != 0:
        raise Failure(f"`{' '.join(command)}` failed ({done.returncode}):\n{done.stderr.strip()[-2000:]}")
    print(f"relufy {name}: {steps} steps in {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
    return folder


def losses_of(metrics: Path, steps: int) -> list[float]:
    with open(metrics, encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    if sorted(losses) != list(range(1, steps + 1)):
        raise Failure(f"{metrics} has {len(losses)} losses instead of one for each of {steps} steps")
    return [losses[step] for step in range(1, steps + 1)]


def moments_of(folder: Path) -> dict[str, Any]:
    """The first moments of a run of one step."""
    from safetensors.torch import load_file

    file = folder / "checkpoint-1" / "optimizer.safetensors"
    return {name[2:]: tensor.double() for name, tensor in load_file(file).items() if name.startswith("m.")}


# --- the comparison ---------------------------------------------------------------------------


class Report:
    """What was compared, and what differs too much."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def curve(self, name: str, ours: list[float], theirs: list[float], bound: float) -> None:
        relative = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
        tail = min(50, len(ours))
        mean, other = sum(ours[-tail:]) / tail, sum(theirs[-tail:]) / tail
        worst = max(range(len(relative)), key=relative.__getitem__)
        row = {"curves": name, "largest": relative[worst], "at_step": worst + 1, "first": relative[0],
               "tail": abs(mean - other) / other, "tail_means": [mean, other]}
        good = max(relative[worst], row["tail"]) <= bound
        self.add(name, row, good)
        print(f"{name:44} {relative[0]:9.1e} {relative[worst]:9.1e} (step {worst + 1:3}) {row['tail']:9.1e} "
              f"({mean:.4f}, {other:.4f}){'' if good else '   <- differs'}", flush=True)

    def gradients(self, name: str, ours: dict[str, Any], theirs: dict[str, Any], bound: float) -> None:
        if sorted(ours) != sorted(theirs):
            raise Failure(f"{name}: tensors differ: {sorted(set(ours) ^ set(theirs))[:6]}")
        errors = {key: float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in ours}
        worst = max(errors, key=errors.__getitem__)
        self.add(name, {"gradients": name, "largest": errors[worst], "tensor": worst, "tensors": len(errors),
                        "each": errors}, errors[worst] <= bound)
        print(f"{name:44} {errors[worst]:9.1e} ({worst}, of {len(errors)} tensors)"
              f"{'' if errors[worst] <= bound else '   <- differs'}", flush=True)

    def add(self, name: str, row: dict[str, Any], good: bool) -> None:
        self.rows.append(row | {"good": good})
        if not good:
            self.failed.append(name)


def compare(options: argparse.Namespace, model: Path, corpus: Path, work: Path) -> Report:
    import torch

    report, steps = Report(), options.steps
    device = "cpu" if options.no_gpu else "cuda"
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    layers = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    batches = Batches.of(documents(model, corpus), options.length, options.seed)
    print(f"PyTorch {torch.__version__}, GPU {gpu}; {steps} steps of {options.batch} x {options.length} tokens, "
          f"{batches.sequences} sequences of {len(batches.ids)} tokens", flush=True)

    def relufy(name: str, flags: list[str], steps: int = steps, save: int = 0) -> Path:
        return train_relufy(options, model, corpus, work, name, flags, steps, save)

    def on_gpu(dtype: str) -> list[str]:
        return [] if options.no_gpu else ["--device", "cuda", "--dtype", dtype]

    def curve(folder: Path) -> list[float]:
        return losses_of(folder / "metrics.jsonl", steps)

    half = curve(relufy("cuda-bf16", on_gpu("bf16")))
    again = curve(relufy("cuda-bf16-again", on_gpu("bf16")))
    full = curve(relufy("cuda-f32", on_gpu("f32")))
    first = moments_of(relufy("cuda-f32-first", on_gpu("f32"), steps=1, save=1))
    cpu_first = moments_of(relufy("cpu-f32-first", [], steps=1, save=1))
    cpu = losses_of(options.cpu_metrics, steps) if options.cpu_metrics else curve(relufy("cpu-f32", []))
    begun = time.monotonic()
    torch_full, moments = train_torch(model, batches, options, device, bf16=False)
    torch_half, _ = train_torch(model, batches, options, device, bf16=not options.no_gpu)
    print(f"PyTorch: twice {steps} steps in {time.monotonic() - begun:.1f} s\n", file=sys.stderr, flush=True)

    print(f"{'losses, relative difference':44} {'step 1':>9} {'largest':>9} {'':10} {'last 50':>9} (means)")
    report.curve("relufy GPU bf16, relufy CPU f32", half, cpu, options.loss_bound)
    report.curve("relufy GPU bf16, PyTorch f32", half, torch_full, options.loss_bound)
    report.curve("relufy GPU f32, relufy CPU f32", full, cpu, options.loss_bound)
    report.curve("relufy GPU f32, PyTorch f32", full, torch_full, options.loss_bound)
    report.curve("relufy GPU bf16, PyTorch bf16 autocast", half, torch_half, options.loss_bound)
    report.curve("PyTorch bf16 autocast, PyTorch f32", torch_half, torch_full, math.inf)
    equal = half == again
    report.add("twice", {"bit_equal": equal, "differ": sum(a != b for a, b in zip(half, again))}, equal)
    print(f"{'relufy GPU bf16, twice':44} {'bit-equal' if equal else 'the losses differ   <- differs'}\n")
    print(f"{'gradients of step 1, relative by norm':44} {'largest':>9}")
    theirs = fused(moments, layers)
    report.gradients("relufy GPU f32, PyTorch f32", first, theirs, options.gradient_bound)
    report.gradients("relufy CPU f32, PyTorch f32", cpu_first, theirs, options.gradient_bound)
    report.gradients("relufy GPU f32, relufy CPU f32", first, cpu_first, options.gradient_bound)
    if options.out:
        curves = {"relufy_gpu_bf16": half, "relufy_gpu_f32": full, "relufy_cpu_f32": cpu, "torch_f32": torch_full,
                  "torch_bf16": torch_half}
        record = {"gpu": gpu, "torch": torch.__version__, "steps": steps, "batch": options.batch,
                  "length": options.length, "stage": options.stage, "rows": report.rows, "losses": curves}
        options.out.write_text(json.dumps(record, indent=1))
    return report


def collect(data: Path, folder: Path, stories: int) -> None:
    """Copies what a run needs, the corpus cut short."""
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    for file in sorted((data / CHECKPOINT).iterdir()):
        if file.suffix in (".json", ".safetensors"):
            shutil.copyfile(file, model / file.name)
    decoder = subprocess.Popen(["zstd", "-dc", str(data / CORPUS)], stdout=subprocess.PIPE, text=True,
                               encoding="utf-8")
    with decoder, open(folder / "train.jsonl", "w", encoding="utf-8") as out:
        for number, line in enumerate(decoder.stdout):
            if number >= stories:
                decoder.kill()
                break
            out.write(json.dumps({"text": json.loads(line)["text"]}, ensure_ascii=False) + "\n")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB; carry it, and run with --folder {folder}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help=f"folder with {CHECKPOINT} and {CORPUS}")
    add("--folder", type=Path, help="a folder that --collect has made")
    add("--collect", type=Path, metavar="DIR", help="make such a folder and end")
    add("--stories", type=int, default=4000, help="of the corpus (default 4000)")
    add("--relufy", default=str(ROOT / "target" / "cuda" / "release" / "relufy"), help="the binary")
    add("--relufy-arg", action="append", default=[], help="passed on to `relufy train`; may be repeated")
    add("--attention", choices=("auto", "own", "cudnn"), help="of relufy on the GPU")
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=8, help="sequences of a step (default 8)")
    add("--length", type=int, default=256, help="tokens of a sequence (default 256)")
    add("--seed", type=int, default=1, help="of the data's order (default 1)")
    add("--stage", type=int, choices=(0, 1, 2), default=0, help="relufy the model to this stage first")
    add("--cpu-metrics", type=Path, metavar="FILE", help="metrics.jsonl of an earlier CPU run with these settings")
    add("--loss-bound", type=float, default=0.01, help="relative, of each step (default 0.01)")
    add("--gradient-bound", type=float, default=1e-4, help="relative by norm (default 1e-4)")
    add("--keep", type=Path, metavar="DIR", help="run there and leave the runs")
    add("--out", type=Path, metavar="FILE", help="write the results there, as JSON")
    add("--no-gpu", action="store_true", help=argparse.SUPPRESS)  # to try this script without a GPU
    options = parser.parse_args()
    if (options.data is None) == (options.folder is None):
        parser.error("either --data or --folder")
    return options


def main() -> int:
    options = arguments()
    if options.collect:
        collect(options.data, options.collect, options.stories)
        return 0
    if not os.access(options.relufy, os.X_OK):
        raise Failure(f"there is no program {options.relufy}\nhint: scripts/build-cuda.sh makes it")
    with tempfile.TemporaryDirectory(prefix="check-cuda-training-") as scratch:
        work = options.keep or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        folder = options.folder
        if folder is None:
            folder = work / "data"
            collect(options.data, folder, options.stories)
        report = compare(options, (folder / "model").resolve(), (folder / "train.jsonl").resolve(), work.resolve())
    if report.failed:
        print(f"\n{len(report.failed)} comparison(s) failed: {'; '.join(report.failed)}")
        return 1
    print("\nall within the bounds")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(f"error: {failure}")
