"""The language model: PaLM, what it samples with, the adapters it keeps under names, and how it learns from text."""

from palm_rlhf_pytorch.palm.finetuning import Finetuning, finetune
from palm_rlhf_pytorch.palm.generation import Generation, generate_responses
from palm_rlhf_pytorch.palm.pretraining import bits_per_byte, pretrain
from palm_rlhf_pytorch.palm.sampling import sample_tokens
from palm_rlhf_pytorch.palm.text_training import Samples, TextLoop, TextTraining
from palm_rlhf_pytorch.palm.transformer import PaLM

__all__ = [
    "Finetuning",
    "Generation",
    "PaLM",
    "Samples",
    "TextLoop",
    "TextTraining",
    "bits_per_byte",
    "finetune",
    "generate_responses",
    "pretrain",
    "sample_tokens",
]
