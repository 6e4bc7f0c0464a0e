"""Tokenizers by name, and beside the checkpoint whose ids they make: `palm.tokenizer.json` beside `palm.pt`.

A folder's tokenizer is `tokenizer.json` and `tokenizer_config.json`, as transformers writes and reads them. The byte
tokenizer leaves a marker in place of a vocabulary, so that "bytes" is told from "nobody knows".
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from palm_rlhf_pytorch.text.hf_tokenizer import HFTokenizer, tokenizer_from_hub, tokenizer_from_json
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer, Tokenizer
from palm_rlhf_pytorch.training.atomic import replacing

BYTES = "bytes"
KIND = "palm_rlhf_pytorch tokenizer"
FILE, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
ROLES = ("bos_token", "eos_token", "pad_token")


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """A tokenizer from what a user may name.

    Args:
        name_or_path: "bytes"; a file, as `save_tokenizer` or `tokenizers` writes it, or the checkpoint it was saved
            beside; a folder with a tokenizer.json, whose tokenizer_config.json says what is special (a file of that
            name is read like its folder); or a name on the Hugging Face Hub, such as "EleutherAI/gpt-neox-20b".

    Raises:
        FileNotFoundError: if it is a path and nothing is there.
        ImportError: if tokenizers, or for the Hub transformers, is not installed.
        ValueError: if what is there is no tokenizer.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return _from_folder(path)
    if path.suffix != ".json" and path.is_file() and tokenizer_path(path).exists():  # a checkpoint's: its tokenizer
        return _from_file(tokenizer_path(path))
    if path.exists():
        return _from_folder(path.parent) if path.name == FILE else _from_file(path)
    if str(name_or_path) == BYTES:
        return ByteTokenizer()
    name = str(name_or_path)
    if path.suffix == ".json" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no such tokenizer: {name}")
    return tokenizer_from_hub(name)


def save_tokenizer(tokenizer: Tokenizer, checkpoint_path: str | Path) -> Path:
    """Save a tokenizer beside a checkpoint's file, or in a checkpoint's folder; gives the path of its file.

    Save it before the checkpoint: where that fails, a model is never found with an older tokenizer.

    Args:
        tokenizer: a ByteTokenizer or an HFTokenizer; no other kind can be written down.
        checkpoint_path: "palm.pt" (then palm.tokenizer.json, whether or not palm.pt is there yet), or a folder.

    Raises:
        TypeError: if it is another kind of tokenizer.
        OSError: if the disk refuses; earlier files are untouched.
    """
    if not isinstance(tokenizer, ByteTokenizer | HFTokenizer):
        raise TypeError(
            f"tokenizer ({type(tokenizer).__name__}) cannot be saved: give a ByteTokenizer or an HFTokenizer"
        )
    path = tokenizer_path(checkpoint_path)
    if isinstance(tokenizer, ByteTokenizer):
        _write(path, {"kind": KIND, "tokenizer": BYTES})
    elif Path(checkpoint_path).is_dir():
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if tokenizer.chat_template is not None:
            config["chat_template"] = tokenizer.chat_template
        _write(path.with_name(CONFIG), {**config, **{role: tokenizer.token_names.get(role) for role in ROLES}})
        path.with_name(TEMPLATE).unlink(missing_ok=True)  # of an earlier tokenizer, it would stand above the new one
        _write(path, json.loads(tokenizer.to_json()))
    else:
        _write(
            path,
            {
                "kind": KIND,
                "special_tokens": tokenizer.token_names,
                "chat_template": tokenizer.chat_template,
                "tokenizer": json.loads(tokenizer.to_json()),
            },
        )
    return path


def tokenizer_of(checkpoint_path: str | Path, *, num_tokens: int) -> Tokenizer:
    """The tokenizer saved beside a checkpoint; bytes where there is none and the vocabulary is theirs.

    Args:
        checkpoint_path: the checkpoint's file or folder.
        num_tokens: of the model; a model may have more than its tokenizer, never fewer.

    Raises:
        ImportError: if tokenizers is not installed, and the file is one of its own.
        ValueError: if there is none and num_tokens is not that of bytes, it is damaged, or it does not fit the model.
    """
    path = tokenizer_path(checkpoint_path)
    if not path.exists():
        if num_tokens == ByteTokenizer.num_tokens:
            return ByteTokenizer()
        raise ValueError(
            f"{checkpoint_path} has num_tokens={num_tokens}, not the byte tokenizer's {ByteTokenizer.num_tokens}, and"
            f" no tokenizer was saved with it ({path.name}): name it, --tokenizer NAME_OR_PATH"
        )
    tokenizer = load_tokenizer(path)
    check_fits(tokenizer, num_tokens, tokenizer_name=str(path), model_name=str(checkpoint_path))
    return tokenizer


def tokenizer_path(checkpoint_path: str | Path) -> Path:
    """Where the tokenizer of a checkpoint is saved: palm.tokenizer.json beside palm.pt, tokenizer.json in a folder."""
    path = Path(checkpoint_path)
    return path / FILE if path.is_dir() else path.with_name(f"{path.stem}.{FILE}")


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what decides ids: equal for tokenizers that give every text the same ids.

    Raises:
        TypeError: if it is neither a ByteTokenizer nor an HFTokenizer.
    """
    if isinstance(tokenizer, ByteTokenizer):
        known = BYTES
    elif isinstance(tokenizer, HFTokenizer):
        ids = [tokenizer.bos_token, tokenizer.eos_token]
        parts = json.loads(tokenizer.to_json())
        del parts["post_processor"]  # adds the special tokens that are not asked for here; transformers rewrites it
        known = json.dumps([parts, ids], sort_keys=True)
    else:
        raise TypeError(f"tokenizer ({type(tokenizer).__name__}) must be a ByteTokenizer or an HFTokenizer")
    return hashlib.sha256(known.encode()).hexdigest()


def check_fits(tokenizer: Tokenizer, num_tokens: int, *, tokenizer_name: str, model_name: str) -> None:
    """Raise a ValueError if a tokenizer may give ids that a model does not have."""
    if tokenizer.num_tokens > num_tokens:
        raise ValueError(
            f"the tokenizer {tokenizer_name} has {tokenizer.num_tokens} tokens, the model {model_name} only"
            f" num_tokens={num_tokens}: it is the tokenizer of another model"
        )


def _from_file(path: Path) -> Tokenizer:
    found = _read(path)
    if found.get("kind") != KIND:
        return tokenizer_from_json(json.dumps(found), {}, None, where=path)
    if found.get("tokenizer") == BYTES:
        return ByteTokenizer()
    names, template = found.get("special_tokens"), found.get("chat_template")
    if not isinstance(names, dict) or not set(names) <= set(ROLES) or not isinstance(template, str | None):
        raise ValueError(f"{path} is damaged: its special_tokens or chat_template are not what this library writes")
    return tokenizer_from_json(json.dumps(found.get("tokenizer")), names, template, where=path)


def _from_folder(folder: Path) -> Tokenizer:
    path, config_path, template_path = (folder / name for name in (FILE, CONFIG, TEMPLATE))
    if not path.exists():
        if config_path.exists():  # files of an older kind, which transformers makes a fast tokenizer of
            return tokenizer_from_hub(str(folder))
        raise FileNotFoundError(f"{folder} holds no {FILE}: no tokenizer was saved there")
    content = _read(path)
    if content.get("kind") == KIND:
        return _from_file(path)
    config = _read(config_path) if config_path.exists() else {}
    template = template_path.read_text(encoding="utf-8") if template_path.exists() else config.get("chat_template")
    if isinstance(template, list):  # several, each with its name
        template = next((each.get("template") for each in template if each.get("name") == "default"), None)
    names = {role: _written(config[role]) for role in ROLES if config.get(role) is not None}
    return tokenizer_from_json(json.dumps(content), names, template, where=path)


def _written(token: Any) -> str:
    """How a token of tokenizer_config.json is written; there it may be text or a mapping."""
    return str(token["content"] if isinstance(token, dict) else token)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is no file of a tokenizer: it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no file of a tokenizer: it holds a {type(found).__name__}")
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())
