"""Activation sites: where a relufied model differs from the stock model of its family.

`config.relufication["plan"]` names an operation for some of these places, one for all layers
or a list with one per layer; what it does not name stays as it is in the stock model.

    activation   the feed-forward network's activation
    qkv_in       output of the norm that feeds queries, keys and values
    o_in         input of the attention's output projection
    up_in        output of the norm that feeds the up (and gate) projection
    down_in      input of the down projection, behind the activation

Modules keep their names and weights, so the checkpoint is that of the stock model.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Sites(NamedTuple):
    """Names inside the base model: its list of layers, and in a layer the modules at the sites."""

    layers: str
    qkv_norms: tuple  # whichever of these exists
    up_norms: tuple
    activation: str
    o_proj: str
    down_proj: str


LLAMA = Sites(
    "layers",
    ("input_layernorm",),
    ("post_attention_layernorm",),
    "mlp.act_fn",
    "self_attn.o_proj",
    "mlp.down_proj",
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "opt": Sites(
        "decoder.layers",
        ("self_attn_layer_norm",),
        ("final_layer_norm",),
        "activation_fn",
        "self_attn.out_proj",
        "fc2",
    ),
    # A block with one norm for both branches has no norm of its own for `up`.
    "falcon": Sites(
        "h",
        ("ln_attn", "input_layernorm"),
        ("ln_mlp", "post_attention_layernorm"),
        "mlp.act",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
    ),
    "gpt_neox": Sites(
        "layers",
        ("input_layernorm",),
        ("post_attention_layernorm",),
        "mlp.act",
        "attention.dense",
        "mlp.dense_4h_to_h",
    ),
    "gpt2": Sites("h", ("ln_1",), ("ln_2",), "mlp.act", "attn.c_proj", "mlp.c_proj"),
}


class Pointwise(nn.Module):
    """One operation of a plan, applied element by element."""

    def __init__(self, entry):
        super().__init__()
        entry = dict(entry)
        self.name = entry.pop("op", None) or entry.pop("kind")
        self.value = next(iter(entry.values()), None)  # shift, threshold or beta
        if self.name not in OPERATIONS:
            raise ValueError(f"relufication: this module does not know the operation `{self.name}`")

    def forward(self, x):
        return OPERATIONS[self.name](x, self.value)

    def extra_repr(self):
        return self.name if self.value is None else f"{self.name}, {self.value}"


OPERATIONS = {
    "identity": lambda x, _: x,
    "relu": lambda x, _: F.relu(x),
    "shifted_relu": lambda x, shift: F.relu(x - shift),
    "fat_relu": lambda x, threshold: torch.where(x >= threshold, x, 0.0),
    "silu": lambda x, _: F.silu(x),
    "gelu": lambda x, _: F.gelu(x),
    "gelu_tanh": lambda x, _: F.gelu(x, approximate="tanh"),
    "swish": lambda x, beta: x * torch.sigmoid(beta * x),
}


@functools.lru_cache(maxsize=None)
def with_operation(base, behind):
    """A subclass of a module's class that applies `site_op` to its output, or to its input."""

    def on_output(self, x):
        return self.site_op(base.forward(self, x))

    def on_input(self, x):
        return base.forward(self, self.site_op(x))

    forward = on_output if behind else on_input
    return type(f"{base.__name__}WithOperation", (base,), {"forward": forward})


def put(module, entry, behind):
    """Gives `module` an operation; its parameters keep their names and their memory."""
    operation = Pointwise(entry)
    if operation.name != "identity":
        module.site_op = operation
        module.__class__ = with_operation(type(module), behind)


def relufy(model, family):
    """Puts the plan of `model.config` into a freshly built model of the family's own class."""
    config, sites = model.config, FAMILIES[family]
    plan = config.relufication["plan"]
    inputs = {"o_in": sites.o_proj, "down_in": sites.down_proj}
    if getattr(config, "quantization_config", None) and any(site in plan for site in inputs):
        # Quantisers replace linear modules, and would drop the operation without a word.
        raise NotImplementedError("relufication: no quantised loading with operations at o_in or down_in")
    for n, layer in enumerate(model.base_model.get_submodule(sites.layers)):

        def planned(site, n=n):
            entry = plan.get(site)
            return entry[n] if isinstance(entry, list) else entry

        if planned("activation"):
            parent, _, name = sites.activation.rpartition(".")
            setattr(layer.get_submodule(parent), name, Pointwise(planned("activation")))
        for site, norms in (("qkv_in", sites.qkv_norms), ("up_in", sites.up_norms)):
            norm = next((getattr(layer, name) for name in norms if hasattr(layer, name)), None)
            if planned(site) and norm is not None:
                put(norm, planned(site), behind=True)
        for site, name in inputs.items():
            if planned(site):
                put(layer.get_submodule(name), planned(site), behind=False)


def adopt_renamings(ours):
    """Lets transformers 5, which renames some tensors as it loads, do so for our class as well.

    Its table knows a model by the name of its class or by its `model_type`; ours are new.
    """
    try:
        from transformers import conversion_mapping as known
    except ImportError:  # transformers 4 renames nothing
        return
    stock, config = ours.__base__, ours.config_class
    pairs = {stock.__name__: ours.__name__, config.__base__.model_type: config.model_type}
    for theirs, name in pairs.items():
        renamings = known.get_checkpoint_conversion_mapping(theirs)
        if renamings is not None:
            known.register_checkpoint_conversion_mapping(name, renamings, overwrite=True)
