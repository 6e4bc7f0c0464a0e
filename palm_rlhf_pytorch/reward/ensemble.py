"""Several reward models as one judge, which also says where they disagree: adapters and heads on one trunk.

Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", https://arxiv.org/abs/2310.02743: where members
disagree, a policy has left what people judged, and a pessimistic score keeps it from going on.
Memory is that of one trunk; time that of one pass through it for each member. Knows no policy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.palm.hub import HubModel, locate, on_disk, write_folder
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.files import build_model, same_trunk
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.records import Label
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.training.tensor_file import TensorFile, save_tensors
from palm_rlhf_pytorch.training.tensor_reader import TensorReader
from palm_rlhf_pytorch.typecheck import typecheck

KIND = "RewardEnsemble"
Combine = Callable[[Tensor], Tensor]


class Verdict(NamedTuple):
    """What an ensemble says of texts: `scores` (b,), each member's (m, b), and their deviation (b,)."""

    scores: Tensor
    members: Tensor
    disagreement: Tensor


def mean(scores: Tensor) -> Tensor:
    """The members' mean; scores (m, b) in, (b,) out."""
    return scores.mean(dim=0)


def minimum(scores: Tensor) -> Tensor:
    """The lowest of the members' scores; (m, b) in, (b,) out."""
    return scores.amin(dim=0)


def lower_bound(c: float) -> Combine:
    """The members' mean minus c times their deviation, (m, b) in, (b,) out.

    Raises:
        ValueError: if c is below 0 or not finite.
    """
    if not 0 <= c < float("inf"):
        raise ValueError(f"c ({c}) must be 0 or above and finite: deviations that are taken off the mean")
    return lambda scores: scores.mean(dim=0) - c * scores.std(dim=0, correction=0)


class RewardEnsemble(HubModel, nn.Module):
    """A judge of several: token ids (b, n) in, one score of all members out, (b,).

    Scores are combined after each member's own normalisation (`normalize_scores`): what pairs teach leaves every
    member's zero free, and without it members would differ where they agree.
    """

    @typecheck
    def __init__(self, members: Sequence[RewardModel], *, combine: Combine = mean) -> None:
        """Make one judge of several.

        Args:
            members: reward models with LoRA, made from the same PaLM. They are kept, and read the first one's trunk
                from now on.
            combine: the members' scores (m, b) in, scores (b,) out: `mean`, `minimum`, `lower_bound(c)` or another. It
                is not saved.

        Raises:
            ValueError: if there are fewer than two, one trains its whole trunk, or their trunks differ.
        """
        super().__init__()
        if len(members) < 2:
            raise ValueError(f"members ({len(members)}) must be two or more: one alone cannot disagree")
        first = members[0]
        for number, member in enumerate(members):
            if member.adapter is None:
                raise ValueError(f"members[{number}] has use_lora=False, a trunk of its own: members share one")
            if member.palm is not first.palm and not same_trunk(first.palm, member.palm):
                raise ValueError(f"members[{number}] has another trunk than members[0]: make both from one PaLM")
        for member in members[1:]:
            member.palm = first.palm
        self.members = nn.ModuleList(members)
        self.combine = combine

    @classmethod
    def of(cls, palm: PaLM, count: int, *, seed: int, combine: Combine = mean, **settings: Any) -> Self:
        """An untrained ensemble over a language model; torch's global random state stays as it is.

        Args:
            palm: as in `RewardModel`.
            count: number of members.
            seed: of their adapters and heads, which all differ.
            combine: see the constructor.
            **settings: each member's own, as in `RewardModel`.
        """
        devices = [palm.device] if palm.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return cls([RewardModel(palm, **settings) for _ in range(count)], combine=combine)

    def forward(
        self, seq: Tensor, mask: Tensor | None = None, *, prompt_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Combined scores (b,) of texts; arguments as in `RewardModel.forward`."""
        return self.judge(seq, mask, prompt_mask=prompt_mask, prompt_lengths=prompt_lengths).scores

    def judge(
        self, seq: Tensor, mask: Tensor | None = None, *, prompt_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Verdict:  # fmt: skip
        """The same, with each member's scores and their deviation (population) beside them."""
        told = {"mask": mask, "prompt_mask": prompt_mask, "prompt_lengths": prompt_lengths}
        scores = torch.stack([member(seq, **told) for member in self.models])
        return Verdict(self.combine(scores), scores, scores.std(dim=0, correction=0))

    def read(
        self, seq: Tensor, mask: Tensor | None = None, *, prompt_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Each member's scores in the labels' unit, (m, b), of whose differences probabilities are made."""
        told = {"mask": mask, "prompt_mask": prompt_mask, "prompt_lengths": prompt_lengths}
        return torch.stack([member.read(seq, **told).scores for member in self.models])

    def normalize_scores(self, references: Iterable[Mapping[str, Any]]) -> Self:
        """Normalise each member's scores by itself, on the same texts; see `RewardModel.normalize_scores`."""
        batches = list(references)
        for member in self.models:
            member.normalize_scores(batches)
        return self

    @property
    def models(self) -> list[RewardModel]:
        """The members."""
        return [member for member in self.members if isinstance(member, RewardModel)]

    @property
    def palm(self) -> PaLM:
        """The one trunk."""
        return self.models[0].palm

    # files

    def save(self, path: str | Path) -> None:
        """Write the trunk once, and what is each member's own, to one file, atomically; see `PaLM.save`."""
        tensors, config = self._stored()
        save_tensors(path, tensors, kind=KIND, config=config)

    def save_pretrained(self, folder: str | Path, *, tokenizer: Tokenizer | None = None) -> None:
        """Write a folder for `from_pretrained` and the Hub; see `PaLM.save_pretrained`."""
        tensors, config = self._stored()
        write_folder(folder, tensors, kind=KIND, config=config, extra={}, tokenizer=tokenizer)

    def _stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"palm.{name}": tensor for name, tensor in self.palm.state_dict().items()}
        for number, member in enumerate(self.models):
            own = {name: tensor for name, tensor in member.state_dict().items() if not name.startswith("palm.")}
            tensors |= {f"members.{number}.{name}": tensor for name, tensor in own.items()}
        return tensors, {"palm": self.palm.config, "members": [asdict(member.settings) for member in self.models]}

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, combine: Combine = mean) -> Self:
        """Build the ensemble that a file, or a folder, holds, on the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is none, or damaged.
        """
        return cls._read(on_disk(path).weights, config={}, dtype=None, device="cpu", arguments={"combine": combine})

    @classmethod
    def _read(
        cls, path: Path, *, config: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str,
        arguments: Mapping[str, Any],
    ) -> Self:  # fmt: skip
        reader = TensorReader(path, kind=KIND)
        tensors = {
            name: reader.read(part, dtype=dtype if name.startswith("palm.") else None, device=device)
            for name, part in reader.whole().items()
        }
        return cls(_members(TensorFile(tensors, reader.kind, reader.config, reader.extra), path), **arguments)


def load_judge(name_or_path: str | Path, *, combine: Combine = mean) -> RewardModel | RewardEnsemble:
    """The judge of a file, a folder or a Hub repository, on the CPU: one reward model, or an ensemble.

    Args:
        name_or_path: as `RewardModel.from_pretrained` takes it.
        combine: puts an ensemble's scores together.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds neither.
    """
    path = locate(name_or_path).weights
    if TensorReader(path).kind == KIND:
        return RewardEnsemble.from_checkpoint(path, combine=combine)
    return RewardModel.from_checkpoint(path)


def bootstrap(labels: Sequence[Label], *, seed: int) -> list[Label]:
    """Labels drawn with replacement, as many groups as there are: what one member learns from.

    Groups are drawn, not labels, where labels have one: those of a group belong together. What is drawn k times comes
    once with k times the weight.

    Args:
        labels: at least one.
        seed: of the draw.
    """
    groups: dict[object, list[Label]] = {}
    for number, label in enumerate(labels):
        groups.setdefault(number if label.group is None else label.group, []).append(label)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(len(groups), (len(groups),), generator=generator).bincount(minlength=len(groups)).tolist()
    drawn = zip(groups.values(), counts, strict=True)
    return [replace(label, weight=label.weight * count) for group, count in drawn if count for label in group]


def _members(found: TensorFile, path: str | Path) -> list[RewardModel]:
    """Members whose trunks are the file's tensors, not copies."""
    settings = found.config.get("members")
    if not isinstance(settings, list) or not all(isinstance(own, dict) for own in settings):
        raise ValueError(f"{path} is damaged: its configuration lacks the settings of the members")
    trunk = {name: tensor for name, tensor in found.tensors.items() if name.startswith("palm.")}
    strange = [
        name
        for name in found.tensors.keys() - trunk.keys()
        if not any(name.startswith(f"members.{number}.") for number in range(len(settings)))
    ]
    if strange:
        raise ValueError(f"{path} is damaged: it holds {sorted(strange)[:5]}, of no member of its configuration")
    members = []
    for number, own in enumerate(settings):
        prefix = f"members.{number}."
        tensors = {name.removeprefix(prefix): t for name, t in found.tensors.items() if name.startswith(prefix)}
        config = {"palm": found.config.get("palm"), **own}
        part = TensorFile(trunk | tensors, "RewardModel", config, {})
        members.append(build_model(RewardModel, part, path=path))
    return members
