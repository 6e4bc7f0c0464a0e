"""Models as folders and as repositories of the Hugging Face Hub: weights in safetensors, config.json, a card.

`HubModel` is what language models and judges share. The Hub's own library (https://github.com/huggingface/
huggingface_hub, which comes with accelerate) downloads, caches, shows progress, writes the card and uploads; it is
imported when it is needed, since that takes longer than all of this package. Knows no class of model.
"""

import json
import re
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch

from palm_rlhf_pytorch.palm.pretrained import PUBLISHED
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.text.tokenizer_files import save_tokenizer
from palm_rlhf_pytorch.training.atomic import nature, replacing
from palm_rlhf_pytorch.training.folder import NewFolder
from palm_rlhf_pytorch.training.tensor_file import FORMAT_VERSION, save_tensors

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that a model computes in
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")  # of files that may hold weights
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
TIMEOUT = 10.0  # seconds until the Hub counts as out of reach
LIBRARY = "palm-rlhf-pytorch"
PAPER = "https://arxiv.org/abs/2204.02311"


class Found(NamedTuple):
    """The files of a model: its weights, and a config.json beside them if there is one."""

    weights: Path
    config: Path | None

    def arguments(self) -> dict[str, Any]:
        """What config.json says; nothing if there is none."""
        return {} if self.config is None else read_config(self.config)


class HubModel:
    """What can be read from, and written to, folders and the Hub."""

    _kind: ClassVar[str]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **arguments: Any,
    ) -> Self:
        """The model of a Hub repository, a folder or a file, in train mode as any new module is.

        Read are what `save_pretrained` and `save` write, and the layout of the published PaLMs (palm/pretrained.py),
        as `torch.save` or safetensors. Tensors are copied out of the memory-mapped file in pieces: loading takes
        little more memory than the model. Nothing is unpickled but tensors and plain values.

        Args:
            name_or_path: "owner/name" on the Hub, a folder, or a file. What exists on the disk goes first.
            revision: branch, tag or commit of the repository; None takes its main branch.
            cache_dir: where downloads are kept; None takes the Hub library's (HF_HOME).
            token: for private and gated repositories; None takes the one of `hf auth login`.
            local_files_only: take what the cache has, ask nobody.
            force_download: download again what the cache has.
            dtype: torch.float32, bfloat16, float16 or float64 for the language model's weights; None keeps the file's.
                Adapters and heads are float32 always. float16's range ends rows at 3,115 tokens (see `max_length`).
            device: where the model goes.
            arguments: of the constructor, for what a file leaves open (qk_scale, say) or what is to be otherwise than
                it says (causal, a dropout); sizes must be those of the tensors.

        Raises:
            FileNotFoundError: if there is no such file, folder or repository, or none with weights.
            ConnectionError: if the Hub cannot be reached and the cache has no copy.
            PermissionError: if the repository is gated or private.
            ValueError: if there are several files of weights, or they are no such model's; keys and shapes are named.
            TypeError: if dtype is none of these, or an argument is unknown.
        """
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype ({dtype!r}) must be {', '.join(map(str, DTYPES))} or None")
        found = locate(
            name_or_path, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only,
            force_download=force_download,
        )  # fmt: skip
        return cls._read(found.weights, config=found.arguments(), dtype=dtype, device=device, arguments=arguments)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a model of palm_rlhf_pytorch",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        **saving: Any,
    ) -> str:
        """Upload what `save_pretrained` writes, in one commit; the repository is made if there is none.

        Args:
            repo_id: "owner/name".
            commit_message: of the commit.
            private: whether a new repository is private; None takes the owner's default.
            token: to write with; None takes the one of `hf auth login`.
            branch: to commit to; None takes main.
            create_pr: open a pull request in place of a commit.
            saving: arguments of `save_pretrained`.

        Returns:
            The commit's address.
        """
        from huggingface_hub import HfApi

        if not REPOSITORY.fullmatch(repo_id):
            raise ValueError(f"repo_id ({repo_id!r}) must be 'owner/name'")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / repo_id.split("/")[1]
            self.save_pretrained(folder, **saving)
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=branch, create_pr=create_pr
            )
        return str(commit)

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` reads."""

    @classmethod
    @abstractmethod
    def _read(
        cls, path: Path, *, config: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str,
        arguments: Mapping[str, Any],
    ) -> Self:  # fmt: skip
        """Build the model of a file, with what config.json beside it says."""


# folders


def write_folder(
    folder: str | Path, tensors: Mapping[str, torch.Tensor], *, kind: str, config: Mapping[str, Any],
    extra: Mapping[str, Any], tokenizer: Tokenizer | None = None,
) -> None:  # fmt: skip
    """Write weights, config.json, a card and maybe a tokenizer.

    A new folder appears whole (training/folder.py), in an old one each file is replaced whole and all others stay.
    The weights carry their configuration too: after a kill between two files, `from_pretrained` takes theirs.

    Raises:
        ValueError: if folder is a file.
        OSError: if the disk refuses, or another process puts something there meanwhile.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.is_file() else nature(folder)}; give the path of a folder")
    with _appearing_whole(folder) as place:
        if tokenizer is not None:
            save_tokenizer(tokenizer, place)
        save_tensors(place / WEIGHTS, tensors, kind=kind, config=config, extra=extra)
        record = {"kind": kind, "format_version": FORMAT_VERSION, **config, **extra}
        _write_text(place / CONFIG, json.dumps(record, indent=2) + "\n")
        if not (place / CARD).exists():
            _write_text(place / CARD, card(kind))


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """Where to write a folder's files: in it if it is there, else in one that has its name once the block ends well."""
    if folder.exists():
        yield folder
        return
    new = NewFolder(folder)
    try:
        new.make(ours=lambda name: False)
        yield new.partial
        new.place(over_old=False)
    finally:
        new.close()


def card(kind: str) -> str:
    """The README of a saved model, with the fields by which the Hub finds and shows it."""
    from huggingface_hub import ModelCardData

    fields = ModelCardData(library_name=LIBRARY, tags=[LIBRARY, kind.lower(), "model_hub_mixin"]).to_yaml()
    return f"""---
{fields}
---

# {kind}

A model of the Python package palm_rlhf_pytorch (install it from its repository: on PyPI the name palm-rlhf-pytorch
belongs to the original project). Paper: {PAPER}

```python
from palm_rlhf_pytorch import {kind}

model = {kind}.from_pretrained("this repository's owner/name, or a folder")
```
"""


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        ValueError: if it is no JSON object, or was written by a newer version of this package.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object but a {type(config).__name__}")
    if "kind" in config and config.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {config['format_version']}; upgrade palm_rlhf_pytorch")
    return config


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


# where a model is


def locate(
    name_or_path: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None,
    token: str | bool | None = None, local_files_only: bool = False, force_download: bool = False,
) -> Found:  # fmt: skip
    """The files of a model: on the disk if they are there, else from the Hub; see `HubModel.from_pretrained`."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if not name:  # an unset variable of a shell; as a path it would be the folder one is in
        raise FileNotFoundError(
            "the model's name is empty: give a file, a folder, or a repository on the Hub (owner/name)"
        )
    if path.exists():
        return on_disk(path)
    if not REPOSITORY.fullmatch(name) or path.suffix in SUFFIXES:
        raise FileNotFoundError(f"{name}: no such file or folder, and no repository's name on the Hub (owner/name)")
    wanted = {"revision": revision, "cache_dir": cache_dir, "token": token}
    if local_files_only:
        return _cached(name, wanted, reason="local_files_only=True")
    return _download(name, wanted, force=force_download)


def on_disk(path: str | Path) -> Found:
    """The files of a model in a folder, or a file of weights, which need not exist, with what is beside it."""
    path = Path(path)
    if path.is_dir():
        path /= choose_weights((entry.name for entry in path.iterdir() if entry.is_file()), where=str(path))
    config = path.with_name(CONFIG)
    return Found(path, config if config.is_file() else None)


def choose_weights(names: Iterable[str], *, where: str) -> str:
    """The file of weights among a model's files.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if there are several and none is model.safetensors.
    """
    known = PUBLISHED.get(where)
    candidates = sorted(name for name in names if name.endswith(SUFFIXES) and not name.startswith("."))
    for preferred in (WEIGHTS, known.file if known is not None else None):
        if preferred in candidates:
            assert preferred is not None
            return preferred
    if not candidates:
        raise FileNotFoundError(f"{where} has no file of weights ({', '.join('*' + suffix for suffix in SUFFIXES)})")
    if len(candidates) > 1:
        listed = ", ".join(candidates[:8]) + (", ..." if len(candidates) > 8 else "")
        raise ValueError(f"{where} has several files of weights ({listed}); give the path of one of them")
    return candidates[0]


def _download(name: str, wanted: Mapping[str, Any], *, force: bool) -> Found:
    """The files in the Hub library's cache, downloaded where they are not there or not the newest."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    # what its HTTP client raises, whichever that is in this version, and OSError
    unreachable = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    try:
        api = HfApi(token=wanted["token"])  # list_repo_files would try for half a minute where there is no network
        listed = api.model_info(name, revision=wanted["revision"], timeout=TIMEOUT).siblings
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} on the Hub has no revision {wanted['revision']!r}") from error
    except HfHubHTTPError as error:
        raise _refusal(name, error) from error
    except unreachable as error:
        return _cached(name, wanted, reason=f"the Hub cannot be reached ({error})")
    names = [] if listed is None else [entry.rfilename for entry in listed]
    chosen = choose_weights(names, where=name)
    try:
        files = [file for file in (CONFIG, chosen) if file in names]
        weights = [Path(hf_hub_download(name, file, force_download=force, **wanted)) for file in files][-1]
    except HfHubHTTPError as error:
        raise _refusal(name, error) from error
    except unreachable as error:
        raise ConnectionError(f"{name}: the download failed ({error}); call again to go on with it") from error
    return on_disk(weights)


def _refusal(name: str, error: Any) -> OSError:
    """What the Hub's answer means, in a line."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"{name} is gated: ask for access at https://huggingface.co/{name}, then `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{name}: no such file or folder, and no such repository on the Hub (or a private one: give token=, or"
            " `hf auth login`)"
        )
    return ConnectionError(f"{name}: the Hub answers {str(error).splitlines()[0]}")


def _cached(name: str, wanted: Mapping[str, Any], *, reason: str) -> Found:
    """The files of a repository as far as the cache has them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True, **wanted))
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"{name}: no such file or folder, and not in the Hub's cache; {reason}") from error
    chosen = choose_weights((entry.name for entry in folder.iterdir() if entry.is_file()), where=name)
    return on_disk(folder / chosen)
