"""Text: words become token ids."""

from palm_rlhf_pytorch.text.datasets import (
    BadRecord,
    Labels,
    TokenStream,
    read_labels,
    read_prompts,
    read_texts,
    skip_bad_record,
    split_by_group,
    stop_at_bad_record,
)
from palm_rlhf_pytorch.text.pydocs import prose_paragraphs, python_documentation
from palm_rlhf_pytorch.text.records import Label, Pair, Ranking, Rating, Text, Vote, even_bins, whole_bins
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer, encode_with

__all__ = [
    "BadRecord",
    "ByteTokenizer",
    "Label",
    "Labels",
    "Pair",
    "Ranking",
    "Rating",
    "Text",
    "TokenStream",
    "Vote",
    "encode_with",
    "even_bins",
    "prose_paragraphs",
    "python_documentation",
    "read_labels",
    "read_prompts",
    "read_texts",
    "skip_bad_record",
    "split_by_group",
    "stop_at_bad_record",
    "whole_bins",
]
