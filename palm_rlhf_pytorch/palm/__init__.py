"""The language model: PaLM, its generation and its sampling."""

from palm_rlhf_pytorch.palm.transformer import PaLM

__all__ = ["PaLM"]
