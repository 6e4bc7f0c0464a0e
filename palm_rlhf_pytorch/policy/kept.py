"""Kept responses: what a round of rejection sampling learns from, and the file it stands in meanwhile.

Knows no model; how responses were chosen is the trainer's to say.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.policy.direct_data import TokenTexts
from palm_rlhf_pytorch.training.tensor_file import load_tensors, save_tensors

KIND = "kept responses"


class KeptExamples:
    """Responses that were kept, with their prompts; a token of a response is what counts."""

    def __init__(self, texts: TokenTexts) -> None:
        """Keep texts, each ending with its response."""
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, rows: Sequence[int]) -> list[int]:
        """The texts themselves."""
        return list(rows)

    def sizes(self) -> list[int]:
        """Tokens of each text."""
        return self.texts.lengths

    def counts(self) -> list[float]:
        """Tokens of each response."""
        return [float(length) for length in self.texts.response_lengths]

    def facts(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Nothing beside the texts."""
        return {}

    def digest(self) -> str:
        """SHA-256 of the texts."""
        return self.texts.digest()


class Kept(NamedTuple):
    """What a round has sampled and kept, over all processes, and its figures by their names in the log."""

    examples: KeptExamples
    figures: dict[str, float]

    def save(self, path: Path, *, told: str) -> None:
        """Write them to a file, whole or not at all, with what the run is told by."""
        texts = self.examples.texts
        tensors = {
            "ids": torch.cat(texts.ids),
            "lengths": torch.tensor(texts.lengths),
            "prompt_lengths": torch.tensor(texts.prompt_lengths),
        }
        save_tensors(path, tensors, kind=KIND, config={"told": told, "figures": self.figures})


def read_kept(path: Path, *, told: str) -> Kept:
    """What `Kept.save` wrote.

    Raises:
        ValueError: if it is no such file, or that of another run.
    """
    file = load_tensors(path, kind=KIND)
    if file.config.get("told") != told:
        raise ValueError(f"{path} was sampled by another run ({file.config.get('told')}; now {told})")
    lengths, prompt_lengths = (file.tensors[name].tolist() for name in ("lengths", "prompt_lengths"))
    texts = TokenTexts(file.tensors["ids"].split(lengths), prompt_lengths)
    return Kept(KeptExamples(texts), dict(file.config["figures"]))
