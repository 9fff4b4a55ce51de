"""Configuration of a relufied model: its family's own, and the plan of what was changed."""

from transformers import LlamaConfig


class ReluLlamaConfig(LlamaConfig):
    """`relufication["plan"]` says what stands at each activation site (see relu_sites.py)."""

    model_type = "relu_llama"
