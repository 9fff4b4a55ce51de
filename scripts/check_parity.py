#!/usr/bin/env python3
"""Compares relufy with Hugging Face transformers on tiny random models of every family.

For each architecture variant: a random checkpoint is saved, `relufy probe` runs it dense and
after both stages of surgery, and logits, loss, every gradient and all densities are compared
with what transformers computes in float32.

    python3 scripts/check_parity.py                       # makes .venv-check on first use
    python3 scripts/check_parity.py --python PY --only falcon

Needs `cargo build --release` first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=160,
             max_position_embeddings=128)
LLAMA = dict(SMALL, intermediate_size=112, num_key_value_heads=4)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}

# name: (config class, its arguments)
VARIANTS = {
    "llama": ("LlamaConfig", LLAMA),
    "llama-gqa-tied": ("LlamaConfig", dict(LLAMA, num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-biases": ("LlamaConfig", dict(LLAMA, attention_bias=True, mlp_bias=True)),
    "llama-linear-rope": ("LlamaConfig", dict(LLAMA, rope_scaling={"rope_type": "linear", "factor": 4.0})),
    "llama-llama3-rope": ("LlamaConfig", dict(LLAMA, rope_theta=500000.0, rope_scaling=LLAMA3)),
    "llama-head-dim": ("LlamaConfig", dict(LLAMA, head_dim=24, num_key_value_heads=1)),
    "mistral-window": ("MistralConfig", dict(LLAMA, num_key_value_heads=2, sliding_window=9)),
    "mistral": ("MistralConfig", dict(LLAMA, num_key_value_heads=2, sliding_window=None)),
    "qwen2": ("Qwen2Config", dict(LLAMA, num_key_value_heads=2)),
    "qwen2-window": ("Qwen2Config", dict(LLAMA, num_key_value_heads=2, use_sliding_window=True,
                                         sliding_window=7, max_window_layers=1)),
    "qwen3": ("Qwen3Config", dict(LLAMA, num_key_value_heads=2, head_dim=32)),
    "opt": ("OPTConfig", dict(SMALL, ffn_dim=144, word_embed_proj_dim=64, dropout=0.0)),
    "opt-gelu": ("OPTConfig", dict(SMALL, ffn_dim=144, word_embed_proj_dim=64, activation_function="gelu",
                                   enable_bias=False)),
    "falcon-7b": ("FalconConfig", dict(SMALL, multi_query=True, parallel_attn=True, bias=False,
                                       new_decoder_architecture=False, alibi=False)),
    "falcon-40b": ("FalconConfig", dict(SMALL, num_kv_heads=2, new_decoder_architecture=True, bias=False,
                                        parallel_attn=True, alibi=False)),
    "falcon-11b": ("FalconConfig", dict(SMALL, num_kv_heads=2, new_decoder_architecture=True, bias=False,
                                        parallel_attn=True, alibi=False, num_ln_in_parallel_attn=1)),
    "falcon-rw": ("FalconConfig", dict(SMALL, multi_query=False, parallel_attn=False, bias=True,
                                       new_decoder_architecture=False, alibi=True)),
    "falcon-rw-6-heads": ("FalconConfig", dict(SMALL, hidden_size=96, num_attention_heads=6, multi_query=False,
                                               parallel_attn=False, bias=True, alibi=True,
                                               new_decoder_architecture=False)),
    "neox-parallel": ("GPTNeoXConfig", dict(SMALL, intermediate_size=144, rotary_pct=0.25)),
    "neox-sequential": ("GPTNeoXConfig", dict(SMALL, intermediate_size=144, rotary_pct=0.5,
                                              use_parallel_residual=False)),
    "neox-tied-no-bias": ("GPTNeoXConfig", dict(SMALL, intermediate_size=144, rotary_pct=1.0,
                                                attention_bias=False, tie_word_embeddings=True)),
    "gpt2": ("GPT2Config", dict(n_embd=64, n_layer=2, n_head=4, vocab_size=160, n_positions=128)),
    "gpt2-inner-scale": ("GPT2Config", dict(n_embd=64, n_layer=3, n_head=4, vocab_size=160, n_positions=128,
                                            n_inner=100, scale_attn_by_inverse_layer_idx=True,
                                            activation_function="gelu")),
}

NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn_layer_norm", "final_layer_norm", "ln_1",
         "ln_2", "ln_attn", "ln_mlp")
UP = ("up_proj", "gate_proj", "fc1", "dense_h_to_4h", "c_fc")
QKV = ("q_proj", "query_key_value", "c_attn")
DOWN = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj")


def worker():
    """Runs inside the environment that has transformers."""
    import torch
    import transformers
    from safetensors.torch import load_file

    args = json.loads(sys.argv[2])
    torch.set_num_threads(2)
    failures = 0
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{'variant':20} {'stage':5} {'logits':>9} {'loss':>9} {'gradient':>9} {'density':>8}")
    for name, (kind, settings) in VARIANTS.items():
        if args["only"] and args["only"] not in name:
            continue
        torch.manual_seed(sum(map(ord, name)))
        config = getattr(transformers, kind)(**settings)
        # Falcon's eager attention adds ALiBi twice; sdpa is right.
        attention = "sdpa" if getattr(config, "alibi", False) else "eager"
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        model = model.float().eval()
        with torch.no_grad():
            for key, p in model.named_parameters():
                if p.dim() == 1:
                    p.copy_((1.0 if key.endswith("weight") else 0.0) + 0.2 * torch.randn_like(p))
                else:
                    p.copy_(0.2 * torch.randn_like(p))
        ids = torch.randint(3, config.vocab_size, (2, 40))
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            model.save_pretrained(folder / "model")
            stored = list(load_file(folder / "model" / "model.safetensors"))
            (folder / "ids.json").write_text(json.dumps(ids.tolist()))
            for stage in (0, 1, 2):
                out = folder / f"{stage}.safetensors"
                command = [args["relufy"], "probe", str(folder / "model"), "--input-ids",
                           str(folder / "ids.json"), "--stage", str(stage), "-o", str(out)]
                for key in stored:
                    command += ["--grad", key]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{name:20} s{stage}    {done.stderr.strip()}")
                    failures += 1
                    break
                failures += not compare(model, ids, stage, name, stored, load_file(out))
    sys.exit(1 if failures else 0)


def compare(model, ids, stage, name, stored, ours):
    """One variant at one stage; prints the row and says whether it agrees."""
    import torch

    handles, densities, swapped = [], {"qkv": [], "up": [], "down": []}, []

    def watch(site):
        def hook(_, inputs):
            densities[site].append((inputs[0] != 0).double().mean().item())
        return hook

    relu = lambda _, __, output: torch.relu(output)  # noqa: E731
    for key, module in model.named_modules():
        leaf = key.rsplit(".", 1)[-1]
        in_layer = any(part.isdigit() for part in key.split("."))
        if stage >= 1 and leaf in ("act_fn", "activation_fn", "act"):
            swapped.append((model.get_submodule(key.rsplit(".", 1)[0]), leaf, module))
        if stage >= 2 and in_layer and leaf in NORMS:
            handles.append(module.register_forward_hook(relu))
        sites = [(QKV, "qkv"), (UP[:1] + UP[2:], "up"), (DOWN, "down")]
        for ends, site in sites:
            if in_layer and any(key.endswith("." + end) for end in ends):
                handles.append(module.register_forward_pre_hook(watch(site)))
    for owner, leaf, _ in swapped:
        setattr(owner, leaf, torch.nn.ReLU())
    model.zero_grad()
    result = model(ids, labels=ids)
    result.loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    for owner, leaf, module in swapped:
        setattr(owner, leaf, module)
    for handle in handles:
        handle.remove()

    logits = (ours["logits"] - result.logits.detach()).abs().max().item()
    loss = abs(ours["loss"].item() - result.loss.item())
    worst = 0.0
    total = sum(g.double().pow(2).sum().item() for g in gradients.values() if g is not None) ** 0.5
    for key in stored:
        theirs = gradients.get(key)
        if theirs is None:  # saved under another name
            theirs = gradients["lm_head.weight" if key == "embed_out.weight" else key]
        difference = (ours[f"grad.{key}"] - theirs).double().norm().item()
        # Softmax does not see a key bias without rotary positions: its gradient is rounding
        # alone, so it is measured against the whole gradient.
        nothing = model.config.model_type == "opt" and key.endswith("k_proj.bias")
        size = total if nothing else theirs.double().norm().item()
        worst = max(worst, difference / size)
    width = {"qkv": 1, "up": 1, "down": 1}
    density = 0.0
    for site in width:
        theirs = torch.tensor(densities[site])
        density = max(density, (ours[f"density.{site}"].double() - theirs).abs().max().item())
    one = 1.01 / (ids.numel() * 64)
    good = logits < 1e-4 and loss < 1e-5 and worst < 1e-4 and density <= one
    print(f"{name:20} s{stage}    {logits:9.2e} {loss:9.2e} {worst:9.2e} {density:8.1e}"
          f"{'' if good else '   <- differs'}", flush=True)
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", help="an interpreter that has torch and transformers")
    parser.add_argument("--relufy", default=str(ROOT / "target/release/relufy"))
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    args = parser.parse_args()
    python = args.python
    if python is None:
        venv = ROOT / ".venv-check"
        python = venv / "bin/python"
        if not python.exists():
            print("making .venv-check (torch and transformers: some GB)")
            subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", "torch", "transformers", "safetensors"],
                           check=True)
    settings = json.dumps({"relufy": os.path.abspath(args.relufy), "only": args.only})
    sys.exit(subprocess.run([str(python), __file__, "--worker", settings]).returncode)


if __name__ == "__main__":
    worker() if sys.argv[1:2] == ["--worker"] else main()
