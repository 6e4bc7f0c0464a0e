"""Models, judges and tokenizers that a command line names: a file, a folder, or a name on the Hugging Face Hub."""

import argparse
from pathlib import Path

import torch

from palm_rlhf_pytorch.palm.pretrained import PUBLISHED
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble, load_judge
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.chats import ChatTokenizer
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.text.tokenizer_files import (
    check_fits,
    load_tokenizer,
    tokenizer_digest,
    tokenizer_of,
    tokenizer_path,
)

PROMPTS = "UTF-8 text, one prompt a line; or a table (.jsonl, .csv ...) with a column `prompt`, text or turns"
MODEL = "the model: a file, as `palm-rlhf pretrain` saves it, a folder, or a name on the Hugging Face Hub"


def add_model_argument(parser: argparse.ArgumentParser, *, meaning: str = MODEL) -> None:
    """Add PALM, and the tokenizer that goes with it."""
    parser.add_argument("palm", metavar="PALM", help=meaning)
    add_tokenizer_argument(parser)


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    """Add --tokenizer, for a model that none was saved with."""
    parser.add_argument(
        "--tokenizer", metavar="NAME_OR_PATH", default=argparse.SUPPRESS,
        help="the model's tokenizer: bytes, a tokenizer.json, a folder, or a name on the Hugging Face Hub; by default"
        " the one saved with the model",
    )  # fmt: skip


def add_chat_argument(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add --chat, for prompts that are said to an assistant."""
    parser.add_argument(
        "--chat", action="store_true", default=argparse.SUPPRESS,
        help="say each prompt to the assistant as the user's turn, in the tokenizer's chat template or the plain one"
        " (Human:, Assistant:)",
    )  # fmt: skip


def tokenizer_name(args: argparse.Namespace) -> str | None:
    """What --tokenizer says; None where it is not given."""
    return getattr(args, "tokenizer", None)


def load_model(
    path_or_name: str | Path, device: torch.device | str = "cpu", *, tokenizer: str | None = None, ends: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[PaLM, Tokenizer]:  # fmt: skip
    """A model and its tokenizer.

    Args:
        path_or_name: a checkpoint's file, a folder, or a name on the Hub.
        device: where the model goes.
        tokenizer: of the model, as `load_tokenizer` takes it; None takes the one saved with it.
        ends: refuse a tokenizer without an eos_token, with which no response ends and no text is ended.
        dtype: of the weights; training keeps float32.

    Raises:
        FileNotFoundError: if there is no such model or tokenizer.
        ValueError: if it is none, or model and tokenizer do not fit.
    """
    palm = PaLM.from_pretrained(path_or_name, dtype=dtype)
    found = _tokenizer_of(path_or_name, palm.num_tokens, tokenizer)
    if ends:
        _check_ends(found, tokenizer or f"saved with {path_or_name}")
    return palm.to(device), found


def load_judge_for(
    path: str | Path, palm: PaLM, tokenizer: Tokenizer, *, palm_name: str | Path
) -> RewardModel | RewardEnsemble:
    """A reward model, or an ensemble, that reads what a model writes.

    Args:
        path: of the judge.
        palm: the model whose responses it is to judge.
        tokenizer: of that model.
        palm_name: what the model is called in errors.

    Raises:
        FileNotFoundError: if there is no such judge.
        ValueError: if it is none, or its vocabulary or tokenizer is not the model's.
    """
    judge = load_judge(path)
    if judge.palm.num_tokens != palm.num_tokens:
        raise ValueError(
            f"the reward model {path} has num_tokens={judge.palm.num_tokens}, the model {palm_name}"
            f" num_tokens={palm.num_tokens}: they must have the same tokenizer"
        )
    if tokenizer_path(path).exists():
        own = tokenizer_of(path, num_tokens=judge.palm.num_tokens)
        check_same(own, tokenizer, name=f"the reward model {path}", other_name=f"the model {palm_name}")
    return judge


def load_judge_tokenizer(
    path: str | Path, judge: RewardModel | RewardEnsemble, *, tokenizer: str | None = None
) -> Tokenizer:
    """The tokenizer of a judge that is used without the model: the one named, or the one saved with it.

    Raises:
        FileNotFoundError, ValueError: as in `load_model`.
    """
    found = _tokenizer_of(path, judge.palm.num_tokens, tokenizer)
    _check_ends(found, tokenizer or f"saved with {path}")
    return found


def check_same(tokenizer: Tokenizer, other: Tokenizer, *, name: str, other_name: str) -> None:
    """Raise a ValueError if two tokenizers give the same text other ids."""
    if tokenizer_digest(tokenizer) != tokenizer_digest(other):
        raise ValueError(
            f"{name} was trained with another tokenizer ({tokenizer.num_tokens} tokens) than that of {other_name}"
            f" ({other.num_tokens} tokens): they must have the same"
        )


def prompt_tokenizer(args: argparse.Namespace, tokenizer: Tokenizer) -> Tokenizer | ChatTokenizer:
    """What makes ids of prompts: the tokenizer, or with --chat one that says them to the assistant."""
    return ChatTokenizer(tokenizer) if hasattr(args, "chat") else tokenizer


def _tokenizer_of(path_or_name: str | Path, num_tokens: int, tokenizer: str | None) -> Tokenizer:
    name, path = str(path_or_name), Path(path_or_name).expanduser()
    if tokenizer is None and path.exists():
        return tokenizer_of(path, num_tokens=num_tokens)
    if tokenizer is None:  # on the Hub: the tokenizer in the model's repository, or the one it is known to have
        tokenizer = PUBLISHED[name].tokenizer if name in PUBLISHED else name
    found = load_tokenizer(tokenizer)
    check_fits(found, num_tokens, tokenizer_name=tokenizer, model_name=str(path_or_name))
    return found


def _check_ends(tokenizer: Tokenizer, name: str) -> None:
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer {name} does not say which token ends a text: name its eos_token in a tokenizer_config.json"
            " beside its tokenizer.json, and give that folder as --tokenizer"
        )
