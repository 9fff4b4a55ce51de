"""A relufied model: its family's own classes, with the plan's operations put in."""

from transformers import LlamaForCausalLM, LlamaModel

from .configuration_relu import ReluLlamaConfig
from .relu_sites import adopt_renamings, relufy


class ReluLlamaModel(LlamaModel):
    config_class = ReluLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        relufy(self, "llama")


class ReluLlamaForCausalLM(LlamaForCausalLM):
    config_class = ReluLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        relufy(self, "llama")


adopt_renamings(ReluLlamaModel)
adopt_renamings(ReluLlamaForCausalLM)
