"""Text: words become token ids."""

from palm_rlhf_pytorch.text.datasets import TokenStream, read_prompts, read_texts
from palm_rlhf_pytorch.text.pydocs import prose_paragraphs, python_documentation
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer, encode_with

__all__ = [
    "ByteTokenizer",
    "TokenStream",
    "encode_with",
    "prose_paragraphs",
    "python_documentation",
    "read_prompts",
    "read_texts",
]
