"""Text: words become token ids."""

from palm_rlhf_pytorch.text.chats import ChatTokenizer, chat_example, chat_prompt, end_token, stop_strings
from palm_rlhf_pytorch.text.corpus import Corpus, open_or_write, write_tokens
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
from palm_rlhf_pytorch.text.demonstrations import Demonstration, Demonstrations, read_demonstrations
from palm_rlhf_pytorch.text.dialogues import Turn
from palm_rlhf_pytorch.text.excerpts import Excerpt, split_corpus
from palm_rlhf_pytorch.text.hf_tokenizer import HFTokenizer
from palm_rlhf_pytorch.text.pydocs import prose_paragraphs, python_documentation
from palm_rlhf_pytorch.text.records import Label, Pair, Ranking, Rating, Text, Vote, even_bins, whole_bins
from palm_rlhf_pytorch.text.streaming import TextStream
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer, Tokenizer, encode_with
from palm_rlhf_pytorch.text.tokenizer_files import load_tokenizer, save_tokenizer, tokenizer_of

__all__ = [
    "BadRecord",
    "ByteTokenizer",
    "ChatTokenizer",
    "Corpus",
    "Demonstration",
    "Demonstrations",
    "Excerpt",
    "HFTokenizer",
    "Label",
    "Labels",
    "Pair",
    "Ranking",
    "Rating",
    "Text",
    "TextStream",
    "TokenStream",
    "Tokenizer",
    "Turn",
    "Vote",
    "chat_example",
    "chat_prompt",
    "encode_with",
    "end_token",
    "even_bins",
    "load_tokenizer",
    "open_or_write",
    "prose_paragraphs",
    "python_documentation",
    "read_demonstrations",
    "read_labels",
    "read_prompts",
    "read_texts",
    "save_tokenizer",
    "skip_bad_record",
    "split_by_group",
    "split_corpus",
    "stop_at_bad_record",
    "stop_strings",
    "tokenizer_of",
    "whole_bins",
    "write_tokens",
]
