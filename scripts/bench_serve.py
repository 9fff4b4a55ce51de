#!/usr/bin/env python3
"""Measures `relufy serve` with several clients at once: texts side by side, and one after the other.

Two servers of the same model run at the same time, one with --parallel N and one with
--parallel 1, and take turns; the one that is not asked waits and costs nothing. A turn is C
clients that each ask for a text at the same moment, with a prompt and a seed of its own.

    cargo build --release
    python3 scripts/bench_serve.py MODEL                         # 1, 2, 4 and 8 clients
    python3 scripts/bench_serve.py MODEL --clients 4 --rounds 7 -- --stage 2 --format int8

What follows `--` goes to both servers. Printed are medians over the rounds: tokens/s of all
clients together, and the time until a client has its first text, for the client that waits
longest.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from urllib.parse import urlparse

ROOT = Path(__file__).resolve().parent.parent


class Failure(Exception):
    """Something a person can act on; printed without a traceback."""


class Server:
    """A running `relufy serve`."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if " at http" not in line:
            raise Failure(f"{' '.join(command)}\n{self.process.stderr.read()}")
        # Its log would fill the pipe.
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.place = urlparse(line.split(" at ")[1].strip()).netloc

    def ask(self, prompt: list[int], tokens: int, seed: int) -> tuple[float, int]:
        """Seconds until the first text, and how many tokens came."""
        connection = http.client.HTTPConnection(self.place, timeout=600)
        body = {"prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": True,
                "stream_options": {"include_usage": True}}
        begun = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise Failure(f"{self.place}: {reply.status}: {reply.read().decode()}")
        first, new = None, 0
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise Failure(f"{self.place}: {event['error']['message']}")
            first = first or time.perf_counter() - begun
            new = (event.get("usage") or {}).get("completion_tokens", new)
        connection.close()
        return first or 0.0, new

    def turn(self, clients: int, tokens: int, round_: int) -> tuple[float, float]:
        """Tokens/s of all clients, and the longest wait for a first text."""
        answers: list[tuple[float, int] | Exception] = []

        def client(n: int) -> None:
            draw = random.Random(1000 * round_ + n)
            prompt = [draw.randrange(10, 1000) for _ in range(16)]
            try:
                answers.append(self.ask(prompt, tokens, draw.randrange(1 << 30)))
            except (Failure, OSError) as error:
                answers.append(error)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begun
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return sum(new for _, new in answers) / seconds, max(first for first, _ in answers)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(servers: list[Server], args: argparse.Namespace) -> None:
    print(f"| clients | tokens/s with --parallel {args.parallel} | one after the other | ratio "
          "| longest wait for a first text, s | one after the other |")
    print("|--:|--:|--:|--:|--:|--:|")
    for clients in args.clients:
        turns: list[list[tuple[float, float]]] = [[], []]
        for round_ in range(-1, args.rounds):
            # Who goes first alternates; the first round warms up.
            order = [0, 1] if round_ % 2 else [1, 0]
            for which in order:
                result = servers[which].turn(clients, args.tokens, round_)
                if round_ >= 0:
                    turns[which].append(result)
        (ours, first), (alone, alone_first) = (
            [median(values) for values in zip(*each)] for each in turns
        )
        ratio = median(a[0] / b[0] for a, b in zip(*turns))
        print(f"| {clients} | {ours:.1f} | {alone:.1f} | {ratio:.2f} | {first:.2f} | {alone_first:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--parallel", type=int, default=8, help="texts side by side (8)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each text (48)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--relufy", type=Path, default=ROOT / "target/release/relufy")
    # argparse gives optional arguments after `--` to nobody.
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:end])
    servers: list[Server] = []
    try:
        if not args.relufy.exists():
            raise Failure(f"{args.relufy} is missing: cargo build --release")
        for parallel in (args.parallel, 1):
            command = [str(args.relufy), "serve", args.model, "--port", "0", "--queue", "64"]
            servers.append(Server([*command, "--parallel", str(parallel), *given[end + 1 :]]))
        measure(servers, args)
    except Failure as failure:
        sys.exit(f"error: {failure}")
    finally:
        for server in servers:
            server.stop()


if __name__ == "__main__":
    main()
