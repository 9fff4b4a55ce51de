#!/usr/bin/env python3
"""Compares the speed of decoding on the CPU: relufy beside llama.cpp.

Both decode one sequence of the same Llama shape, whose weights are random, token by token after a few
positions. llama.cpp runs dense with F16, Q8_0 and Q4_0 weights. relufy runs `relufy bench decode`: dense,
and with the zeros of a relufied model forced at the paper's densities (stage 2), in f16 and int8.

    cargo build --release
    python3 scripts/bench_llama_cpp.py --setup            # once: .venv-llama, builds llama.cpp
    python3 scripts/bench_llama_cpp.py                    # shape m, 5 rounds
    python3 scripts/bench_llama_cpp.py --rounds 9 --tokens 80 --json out.json

A round is one run of each, and who goes first alternates. In a run all formats decode in turns, and
their speed is that of the median token; ratios are formed within a round, and reported is the
median of the rounds. llama.cpp is loaded once and stays; each format gets the number of threads,
the way of loading (memory map or not) and the weight layout (repacked or as stored) with which it is
fastest here. It is called through its C interface, so that Python costs nothing, and like relufy it
forgets the token that it decoded, so that every token attends to as many positions.

The GGUF files have all matrices in the one format (`llama-quantize` keeps the head of a Q4_0 model in Q6_K,
which is slower) and are kept in `--models`: 3.4 GB for shape m.

`--setup` makes a virtual environment with
    llama-cpp-python==0.3.36 (built here, for this processor), gguf==0.19.0, numpy==2.4.6
for which a C++ compiler and CMake's needs must be there. `--python` takes another interpreter that has
them. Leave the machine alone while this runs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6"]
FORMATS = ["F16", "Q8_0", "Q4_0"]
# A run starts after this pause: worker threads of the one before spin for a moment.
SETTLE_SECONDS = 0.5


@dataclass(frozen=True)
class Shape:
    """A Llama as `relufy bench decode --shape NAME` knows it."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int


SHAPES = {
    "small": Shape(256, 4, 4, 704, 4096),
    "130m": Shape(768, 12, 12, 2048, 32000),
    "m": Shape(2048, 16, 16, 5632, 32000),
    "7b": Shape(4096, 32, 32, 11008, 32000),
}


class Failure(Exception):
    """Something a person can act on; printed without a traceback."""


# --- llama.cpp's side, in a process of its own -----------------------------------------------


def write_gguf(path: Path, shape: Shape, name: str) -> None:
    """A model with random weights, whole or not at all."""
    import gguf
    import numpy as np

    dtype = gguf.GGMLQuantizationType[name]
    file_type = gguf.LlamaFileType["MOSTLY_" + name]
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(file_type)
    # Tokens without meaning; the first are those that a SentencePiece vocabulary must have.
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    names = special + bytes_ + [f"t{n}" for n in range(shape.vocab - 259)]
    kinds = [gguf.TokenType.UNKNOWN] + 2 * [gguf.TokenType.CONTROL] + 256 * [gguf.TokenType.BYTE]
    kinds += [gguf.TokenType.NORMAL] * (shape.vocab - 259)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * shape.vocab)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    random = np.random.default_rng(1)
    made: dict[tuple[int, int], Any] = {}

    def matrix(rows: int, columns: int):
        # One matrix of a shape serves all layers: the file holds it as often as the model does.
        if (rows, columns) not in made:
            values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
            made[rows, columns] = gguf.quants.quantize(values, dtype)
        return made[rows, columns]

    def add(name: str, rows: int, columns: int) -> None:
        data = matrix(rows, columns)
        writer.add_tensor(name + ".weight", data, raw_dtype=dtype if data.dtype == np.uint8 else None)

    def add_norm(name: str) -> None:
        writer.add_tensor(name + ".weight", np.ones(shape.hidden, dtype=np.float32))

    add("token_embd", shape.vocab, shape.hidden)
    for n in range(shape.layers):
        block = f"blk.{n}."
        add_norm(block + "attn_norm")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(block + part, shape.hidden, shape.hidden)
        add_norm(block + "ffn_norm")
        add(block + "ffn_gate", shape.ffn, shape.hidden)
        add(block + "ffn_up", shape.ffn, shape.hidden)
        add(block + "ffn_down", shape.hidden, shape.ffn)
    add_norm("output_norm")
    add("output", shape.vocab, shape.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


class Model:
    """A file in llama.cpp, with so many positions filled."""

    def __init__(self, path: Path, context: int, threads: int, mapped: bool, repacked: bool) -> None:
        import llama_cpp as lib

        self.lib = lib
        params = lib.llama_model_default_params()
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if mapped else lib.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = repacked
        self.model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise Failure(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx = context + 1
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise Failure(f"llama.cpp makes no context for {path}")
        self.memory = lib.llama_get_memory(self.context)
        self.filled = context
        self.token = (lib.llama_token * 1)(1)
        # One by one: only decoding is measured, and llama.cpp 0.25.3 crashes in its prompt pass with
        # AMX on virtual machines that keep no tiles.
        for _ in range(context):
            self.decode()

    def decode(self) -> None:
        code = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(self.token, 1))
        if code:
            raise Failure(f"llama_decode returned {code}")
        self.lib.llama_synchronize(self.context)

    def step(self) -> float:
        """Decodes a token and forgets it; milliseconds."""
        begun = time.perf_counter()
        self.decode()
        took = time.perf_counter() - begun
        if not self.lib.llama_get_logits(self.context):
            raise Failure("llama.cpp made no logits")
        self.lib.llama_memory_seq_rm(self.memory, 0, self.filled, -1)
        return took * 1e3

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


def fastest(path: Path, context: int, most: int, tokens: int) -> tuple[Model, dict]:
    """The model in the way in which its median token is fastest."""
    tried: list[dict] = []

    def attempt(**way) -> float:
        for row in tried:
            if row["way"] == way:
                return row["ms"]
        model = Model(path, context, **way)
        try:
            model.step()
            ms = median(model.step() for _ in range(tokens))
        finally:
            model.close()
        tried.append({"way": way, "ms": ms})
        return ms

    layouts = [(mapped, repacked) for mapped in (True, False) for repacked in (True, False)]
    mapped, repacked = min(
        layouts, key=lambda way: attempt(threads=most, mapped=way[0], repacked=way[1])
    )
    threads = min(
        range(1, most + 1), key=lambda n: attempt(threads=n, mapped=mapped, repacked=repacked)
    )
    way = {"threads": threads, "mapped": mapped, "repacked": repacked}
    return Model(path, context, **way), {"way": way, "tried": tried}


def versions() -> dict:
    """What llama.cpp is, by its own word."""
    import llama_cpp

    base = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"), None)
    found = {"llama_cpp_python": llama_cpp.__version__}
    if base is not None:
        library = ctypes.CDLL(str(base))
        for name in ("ggml_version", "ggml_commit"):
            function = getattr(library, name, None)
            if function is not None:
                function.restype = ctypes.c_char_p
                found[name] = function().decode()
    found["system"] = llama_cpp.llama_print_system_info().decode().strip()
    return found


def worker() -> int:
    """Answers commands, one JSON object a line, until its input ends."""
    # Libraries print what they like; only answers may reach the driver.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    models: dict[str, Model] = {}
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "start":
                import llama_cpp

                quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
                llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
                llama_cpp.llama_backend_init()
                answer = versions()
            elif command["do"] == "write":
                shape = SHAPES[command["shape"]]
                write_gguf(Path(command["path"]), shape, command["format"])
                answer = {}
            elif command["do"] == "load":
                model, answer = fastest(
                    Path(command["path"]), command["context"], command["threads"], command["tokens"]
                )
                models[command["format"]] = model
            else:
                answer = {name: [] for name in models}
                for model in models.values():
                    model.step()
                for _ in range(command["tokens"]):
                    for name, model in models.items():
                        answer[name].append(model.step())
        except Exception as error:  # noqa: BLE001 (told to the driver, which stops)
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
    for model in models.values():
        model.close()
    return 0


# --- the driver ------------------------------------------------------------------------------


class Llama:
    """The driver's end of the llama.cpp process."""

    def __init__(self, python: str) -> None:
        pipe = subprocess.PIPE
        command = [python, __file__, "--worker"]
        try:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
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
            raise Failure(f"the llama.cpp process ended (exit code {self.process.wait()})")
        answer = json.loads(line)
        if "error" in answer:
            raise Failure(f"llama.cpp: {answer['error']}")
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def setup(folder: Path, pip_arguments: list[str]) -> None:
    """A virtual environment with llama.cpp compiled for this processor."""
    print(f"installing {', '.join(PACKAGES)} into {folder}; compiling takes minutes", flush=True)
    environment = dict(os.environ, CMAKE_ARGS="-DGGML_NATIVE=ON")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-binary=llama-cpp-python"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([*pip, *pip_arguments, *PACKAGES], check=True, env=environment)
    except subprocess.CalledProcessError as error:
        raise Failure(
            f"cannot install llama.cpp: {error}\n"
            "hint: what pip says above; a C++ compiler and make must be there"
        ) from error
    # Only now: an interrupted installation is done again.
    (folder / "ready").touch()


def interpreter(options: argparse.Namespace) -> str:
    """A Python with llama.cpp: the one given, or that of our virtual environment."""
    if options.python:
        return options.python
    folder = Path(options.venv)
    if options.setup:
        setup(folder, options.pip_arg)
    if not (folder / "ready").exists():
        raise Failure(
            f"there is no llama.cpp in {folder}\n"
            "hint: --setup builds it there; --python names an interpreter that has it"
        )
    return str(folder / "bin" / "python")


def relufy_turn(options: argparse.Namespace) -> dict:
    """One run of `relufy bench decode`."""
    command = [options.relufy, "--threads", str(options.threads), "bench", "decode", "--json"]
    command += ["--shape", options.shape, "--format", ",".join(options.format)]
    command += ["--tokens", str(options.tokens), "--context", str(options.context)]
    time.sleep(SETTLE_SECONDS)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failure(f"`{' '.join(command)}` failed ({done.returncode}):\n{done.stderr.strip()}")
    try:
        found = json.loads(done.stdout)
        rows = {row["name"]: row for row in found["rows"]}
        asked = (options.threads, options.context, options.tokens)
        if (found["threads"], found["context"], found["tokens"]) != asked:
            raise Failure(f"`{' '.join(command)}` measured something else")
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"`{' '.join(command)}` wrote no result: {error!r}") from error
    return {"read": found["read"], "rows": rows}


def llama_turn(llama: Llama, tokens: int) -> dict:
    """One run of llama.cpp: tokens/s of each format by its median token."""
    time.sleep(SETTLE_SECONDS)
    return {name: 1e3 / median(ms) for name, ms in llama.ask(do="run", tokens=tokens).items()}


def load(llama: Llama, options: argparse.Namespace) -> dict:
    """Writes the files that are not there yet and loads them as they are fastest."""
    models = Path(options.models)
    models.mkdir(parents=True, exist_ok=True)
    ways = {}
    for name in FORMATS:
        path = models / f"{options.shape}-{name}.gguf"
        if not path.exists():
            print(f"writing {path}", flush=True)
            llama.ask(do="write", path=str(path), shape=options.shape, format=name)
        ask = {"path": str(path), "format": name, "tokens": options.tuning_tokens}
        ways[name] = llama.ask(
            do="load", context=options.context, threads=options.threads, **ask
        )
        for row in ways[name]["tried"]:
            best = " <-" if row["way"] == ways[name]["way"] else ""
            print(f"  llama.cpp {name:5} {describe(row['way']):42} {1e3 / row['ms']:7.2f} tokens/s{best}")
    return ways


def describe(way: dict) -> str:
    mapped = "memory map" if way["mapped"] else "own memory"
    return f"{way['threads']} threads, {mapped}, {'repacked' if way['repacked'] else 'as stored'}"


def compare(options: argparse.Namespace, llama: Llama) -> dict:
    """Runs all rounds and prints the table."""
    shape = SHAPES[options.shape]
    print(
        f"{options.shape}: hidden {shape.hidden}, {shape.layers} layers, {shape.heads} heads, "
        f"ffn {shape.ffn}, vocab {shape.vocab}; one sequence, after {options.context} tokens"
    )
    ways = load(llama, options)
    rounds = []
    for number in range(options.rounds):
        if number % 2:
            theirs = llama_turn(llama, options.tokens)
            ours = relufy_turn(options)
        else:
            ours = relufy_turn(options)
            theirs = llama_turn(llama, options.tokens)
        rounds.append({"relufy": ours, "llama_cpp": theirs})
        speeds = [f"{name} {speed:.1f}" for name, speed in theirs.items()]
        speeds += [f"{name} {row['tokens_per_second']:.1f}" for name, row in ours["rows"].items()]
        read = ours["read"] / 1e9
        print(f"round {number + 1}: read {read:.1f} GB/s; " + ", ".join(speeds), flush=True)
    summary = summarise(rounds)
    print_table(summary, options)
    return {"shape": options.shape, "ways": ways, "rounds": rounds, "median": summary}


def summarise(rounds: list[dict]) -> dict:
    """Medians over the rounds; ratios are formed within each."""
    theirs = {name: median(r["llama_cpp"][name] for r in rounds) for name in FORMATS}
    ours = {}
    for name in rounds[0]["relufy"]["rows"]:
        rows = [r["relufy"]["rows"][name] for r in rounds]
        ratios = {
            other: median(
                r["relufy"]["rows"][name]["tokens_per_second"] / r["llama_cpp"][other] for r in rounds
            )
            for other in FORMATS
        }
        faster = [row["faster"] for row in rows if row["faster"]]
        ours[name] = {
            "tokens_per_second": median(row["tokens_per_second"] for row in rows),
            "share_of_read": median(row["share_of_read"] for row in rows),
            "times_dense": median(f["times"] for f in faster) if faster else None,
            "share_of_allowed": median(f["share"] for f in faster) if faster else None,
            "times_llama_cpp": ratios,
        }
    read = median(r["relufy"]["read"] for r in rounds)
    return {"read": read, "llama_cpp": theirs, "relufy": ours}


def print_table(found: dict, options: argparse.Namespace) -> None:
    print(
        f"\nmedians of {options.rounds} rounds of {options.tokens} tokens, {options.threads} threads; "
        f"plain read {found['read'] / 1e9:.1f} GB/s\n"
    )
    heads = ["", "tokens/s", "of read", "x dense", "of allowed", *(f"x {name}" for name in FORMATS)]
    lines = [heads]
    for name, speed in found["llama_cpp"].items():
        lines.append([f"llama.cpp {name}", f"{speed:.1f}", *6 * [""]])
    for name, row in found["relufy"].items():
        dense, allowed = row["times_dense"], row["share_of_allowed"]
        lines.append(
            [
                f"relufy {name}",
                f"{row['tokens_per_second']:.1f}",
                f"{100 * row['share_of_read']:.1f} %",
                "" if dense is None else f"{dense:.2f}",
                "" if allowed is None else f"{100 * allowed:.1f} %",
                *(f"{row['times_llama_cpp'][other]:.2f}" for other in FORMATS),
            ]
        )
    widths = [max(len(line[n]) for line in lines) for n in range(len(heads))]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]
        print("  ".join(cells).rstrip())


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
    add("--shape", choices=list(SHAPES), default="m", help="default m")
    add("--format", nargs="+", default=["f16", "int8"], help="relufy's formats (default f16 int8)")
    add("--rounds", type=positive, default=5, help="default 5")
    add("--tokens", type=positive, default=40, help="tokens a run of each format (default 40)")
    add("--tuning-tokens", type=positive, default=12, help="tokens a way that is tried (default 12)")
    add("--context", type=positive, default=16, help="positions that are filled (default 16)")
    add("--threads", type=positive, default=os.cpu_count() or 1, help="at most (default: all cores)")
    add("--relufy", default=str(ROOT / "target" / "release" / "relufy"), help="the binary")
    add("--models", default=str(ROOT / ".carry" / "gguf"), help="where the GGUF files lie")
    add("--setup", action="store_true", help="make the virtual environment first")
    add("--venv", default=str(ROOT / ".venv-llama"), help="virtual environment to make or use")
    add("--python", help="an interpreter that has llama_cpp and gguf; installs nothing")
    add("--pip-arg", action="append", default=[], help="e.g. --pip-arg=--index-url=URL")
    add("--json", metavar="FILE", help="write the results there too")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.worker:
        return worker()
    if not os.access(options.relufy, os.X_OK):
        raise Failure(
            f"there is no program {options.relufy}\nhint: `cargo build --release` makes it"
        )
    llama = Llama(interpreter(options))
    try:
        for name, value in llama.versions.items():
            print(f"{name}: {value}")
        load_ = os.getloadavg()[0]
        if load_ > 1.0:
            print(f"warning: something else is running here (load {load_:.1f}); don't trust this")
        results = compare(options, llama)
    finally:
        llama.close()
    if options.json:
        report = {"versions": llama.versions, "threads": options.threads, **results}
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
