"""The language model: PaLM, what it samples with, and the adapters it keeps under names."""

from palm_rlhf_pytorch.palm.generation import Generation, generate_responses
from palm_rlhf_pytorch.palm.sampling import sample_tokens
from palm_rlhf_pytorch.palm.transformer import PaLM

__all__ = ["Generation", "PaLM", "generate_responses", "sample_tokens"]
