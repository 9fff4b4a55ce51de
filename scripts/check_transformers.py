#!/usr/bin/env python3
"""Proves that relufy's exports are what transformers loads.

For a tiny random model of every family and block form (and for any model folder named on the
command line) it runs `relufy surgery` and `relufy probe`, loads the exported folder with
transformers and compares logits in f32. Stage 1 must load as a stock model; stage 2, shifted
ReLUs and choices of sites load through the Python module in the folder, and must be refused
without `trust_remote_code`.

    cargo build --release
    python3 scripts/check_transformers.py                  # transformers 4.57 and 5, each in a venv of its own
    python3 scripts/check_transformers.py --python /path/to/python [--family llama] [MODEL...]

Without --python it makes `.venv-check-4` and `.venv-check-5` in the repository (git ignores them)
and installs PyTorch, transformers and safetensors there; `--pip-arg` passes arguments to pip (an
index of CPU-only wheels saves a few gigabytes).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {"4": "transformers==4.57.6", "5": "transformers>=5,<6"}
TOLERANCE = 1e-4

# How an export is asked for, and whether it takes the Python module.
EXPORTS = {
    "s1": (["--stage", "1"], False),
    "s2": (["--stage", "2"], True),
    "s1-shifted": (["--stage", "1", "--shift", "0.2"], True),
    "s2-shifted": (["--stage", "2", "--shift", "-0.1"], True),
    "attention": (["--stage", "2", "--sites", "qkv,o"], True),
    "by-layer": (["--stage", "2"], True),
}
# One operation a layer, as `relufy surgery --shift-quantile` and training configurations write them,
# put into the record of a stage 2 export by hand.
BY_LAYER = {
    "activation": [{"kind": "shifted_relu", "shift": 0.3}, {"kind": "swish", "beta": 2.5}],
    "qkv_in": [{"op": "fat_relu", "threshold": 0.1}, {"op": "identity"}],
    "up_in": [{"op": "fat_relu", "threshold": 0.1}, {"op": "identity"}],
    "o_in": [{"op": "identity"}, {"op": "shifted_relu", "shift": -0.2}],
    "down_in": {"op": "fat_relu", "threshold": 0.05},
}


def tiny_models():
    """Config class, causal class and settings of each family and block form."""
    llama = dict(
        vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )
    falcon = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    small = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    return {
        "llama": ("LlamaConfig", "LlamaForCausalLM", llama),
        "mistral": ("MistralConfig", "MistralForCausalLM", {**llama, "sliding_window": 8}),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**llama, "tie_word_embeddings": True}),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**llama, "head_dim": 8}),
        "opt": ("OPTConfig", "OPTForCausalLM", {**small, "ffn_dim": 56, "word_embed_proj_dim": 32}),
        "falcon-7b": ("FalconConfig", "FalconForCausalLM", {**falcon, "multi_query": True, "parallel_attn": True}),
        "falcon-40b": ("FalconConfig", "FalconForCausalLM", {**falcon, "new_decoder_architecture": True, "num_kv_heads": 2}),
        "falcon-11b": (
            "FalconConfig",
            "FalconForCausalLM",
            {**falcon, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        ),
        "falcon-rw": (
            "FalconConfig",
            "FalconForCausalLM",
            {**falcon, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
        ),
        "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**small, "intermediate_size": 56}),
        "gpt_neox-sequential": (
            "GPTNeoXConfig",
            "GPTNeoXForCausalLM",
            {**small, "intermediate_size": 56, "use_parallel_residual": False},
        ),
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    }


def make_tiny(name, folder):
    """Saves a random model whose weights are far from zero, so that no mistake can hide."""
    import torch
    import transformers

    config_class, model_class, settings = tiny_models()[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = getattr(transformers, model_class)(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and parameter_name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.25 if norm else 0.2)
    model.save_pretrained(folder)


def run(command):
    """Runs a program; its output is shown if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def relufy_logits(relufy, model, ids, folder):
    from safetensors.numpy import load_file

    ids_file, out = folder / "ids.json", folder / "probe.safetensors"
    ids_file.write_text(json.dumps(ids))
    run([relufy, "probe", model, "--input-ids", ids_file, "-o", out])
    logits = load_file(out)["logits"]
    out.unlink()
    return logits


def load(model, alibi, trust):
    import torch
    from transformers import AutoModelForCausalLM

    # transformers' eager attention adds Falcon's ALiBi twice; its sdpa is the reference.
    attention = "sdpa" if alibi else "eager"
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust
    ).eval()


def check_refusal(model):
    """Stock transformers must say no, rather than run without the ReLUs."""
    try:
        load(model, False, False)
    except (ValueError, KeyError):
        return
    sys.exit(f"{model}: loaded without trust_remote_code")


def check_model(name, model, relufy, folder):
    """Exports one model in every way and compares."""
    import torch

    config = json.loads((model / "config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config["vocab_size"], (2, 24), generator=generator)
    dense = relufy_logits(relufy, model, ids.tolist(), folder)
    worst = 0.0
    for kind, (options, remote) in {"dense": ([], False), **EXPORTS}.items():
        if kind == "attention" and config["model_type"] == "falcon":
            options = ["--stage", "2", "--sites", "qkv,up,o"]  # `qkv` and `up` may share a norm
        export = model
        if kind != "dense":
            export = folder / f"{name}-{kind}"
            run([relufy, "surgery", model, *options, "-o", export])
            if kind == "by-layer":
                write_plan(export, config)
        ours = relufy_logits(relufy, export, ids.tolist(), folder)
        with torch.no_grad():
            theirs = load(export, config.get("alibi", False), remote)(ids).logits
        if remote:
            check_refusal(export)
        difference = (theirs - torch.from_numpy(ours)).abs().max().item()
        moved = abs(ours - dense).max().item()
        # What was asked for must show: only OPT is born with stage 1's ReLU.
        if kind != "dense" and moved < 1e-2 and not (kind == "s1" and config["model_type"] == "opt"):
            sys.exit(f"{name} {kind}: surgery moved the logits by {moved} only")
        verdict = "ok" if difference < TOLERANCE else "DIFFERS"
        loaded = "remote code" if remote else "stock"
        print(f"  {name:20} {kind:11} {loaded:12} max |difference| {difference:.1e}   (surgery moved {moved:.1e})  {verdict}")
        worst = max(worst, difference)
        if kind == "s2":
            check_saved_again(export, config, ids, theirs, folder / f"{name}-again")
    return worst


def write_plan(export, config):
    """Puts BY_LAYER into an export's record, for as many layers as the model has."""
    layers = next(config[key] for key in ("num_hidden_layers", "n_layer") if key in config)
    file = export / "config.json"
    written = json.loads(file.read_text())
    spread = {site: [ops[n % 2] for n in range(layers)] if isinstance(ops, list) else ops for site, ops in BY_LAYER.items()}
    written["relufication"]["plan"] = spread
    file.write_text(json.dumps(written))


def check_saved_again(export, config, ids, expected, folder):
    """A model that transformers itself saved again still carries its ReLUs."""
    import torch

    load(export, False, True).save_pretrained(folder)
    with torch.no_grad():
        logits = load(folder, config.get("alibi", False), True)(ids).logits
    if not torch.equal(logits, expected):
        sys.exit(f"{folder.name}: differs after save_pretrained")


def check(args):
    """Runs inside the Python that has transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}")
    chosen = {name: None for name in tiny_models() if not args.family or name.split("-")[0] in args.family}
    with tempfile.TemporaryDirectory(prefix="relufy-check-") as temporary:
        folder = Path(temporary)
        worst = 0.0
        for name in chosen if not args.models else []:
            make_tiny(name, folder / name)
            worst = max(worst, check_model(name, folder / name, args.relufy, folder))
        for model in map(Path, args.models):
            worst = max(worst, check_model(model.name, model, args.relufy, folder))
    print(f"largest difference {worst:.1e}, allowed {TOLERANCE:.0e}")
    return 0 if worst < TOLERANCE else 1


def venv(version, pip_args):
    """The Python of a virtual environment with one version of transformers; made if missing."""
    folder = ROOT / f".venv-check-{version}"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        print(f"making {folder.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    probe = subprocess.run([python, "-c", "import torch, transformers, safetensors"], capture_output=True)
    if probe.returncode != 0:
        subprocess.run([*pip, *pip_args, "torch", "numpy", "safetensors", VERSIONS[version]], check=True)
    return python


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="model folders to check instead of tiny random ones")
    parser.add_argument("--relufy", type=Path, default=ROOT / "target/release/relufy", help="the program")
    parser.add_argument("--python", help="a Python that has torch, transformers and safetensors")
    parser.add_argument("--transformers", choices=VERSIONS, action="append", help="which version to check (default: both)")
    parser.add_argument("--family", action="append", help="only these families")
    parser.add_argument("--pip-arg", action="append", default=[], help="an argument for pip, such as --index-url=...")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return check(args)
    if not args.relufy.exists():
        sys.exit(f"{args.relufy} is not there: run `cargo build --release` first, or name it with --relufy")
    pythons = [args.python] if args.python else [venv(version, args.pip_arg) for version in args.transformers or VERSIONS]
    status = 0
    for python in pythons:
        with tempfile.TemporaryDirectory(prefix="relufy-modules-") as cache:
            # transformers copies remote code into a cache: not into the user's own.
            environment = {**os.environ, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1"}
            command = [python, __file__, "--inside", *sys.argv[1:]]
            status |= subprocess.run(command, env=environment).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
