"""A run on disk: the folder that holds its metrics, its experience and its checkpoints; and the update in hand.

    run_dir/metrics.jsonl
    run_dir/experience/update-00000012.rank-0.rollouts       responses, one file an update and process
    run_dir/checkpoints/step-00000012/                       see training/checkpoint.py

Knows no model.
"""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from palm_rlhf_pytorch.policy.experience import Experience, RolloutFile
from palm_rlhf_pytorch.policy.learning import Progress
from palm_rlhf_pytorch.training.checkpoint import Checkpoint, Checkpoints
from palm_rlhf_pytorch.training.ranks import Ranks


@dataclass
class Flight:
    """An update in hand: what was done of it, and where the trainer stood before.

    Attributes:
        taken: prompts handed out before it.
        file: its responses, as far as they are sampled; their scores, once there are some.
        refreshed: older responses as the policy sees them at the beginning of the update, where such are learnt from.
        progress: how far learning has come; None before it.
        held_out: what the held-out judge says of the responses, as metrics; None before it was asked.
    """

    taken: int
    file: RolloutFile
    refreshed: RolloutFile | None = None
    progress: Progress | None = None
    held_out: dict[str, float] | None = None

    @property
    def experience(self) -> Experience:
        """All responses to learn from, the oldest first."""
        files = [self.file] if self.refreshed is None else [self.refreshed, self.file]
        return Experience([file for file in files if len(file)])

    @property
    def files(self) -> list[Path]:
        """What of it is on disk."""
        return self.file.files() + ([] if self.refreshed is None else self.refreshed.files())


class Run:
    """The folder of a run; a temporary one, without checkpoints, where none is named.

    Args:
        folder: made if it is not there; shared by all processes.
        ranks: all processes.
        keep_last: see PPOSettings, as for keep_best and keep_experience.
        keep_best: likewise.
        keep_experience: likewise.
    """

    def __init__(
        self, folder: str | Path | None, ranks: Ranks, *, keep_last: int, keep_best: str | None, keep_experience: int
    ) -> None:
        self.ranks, self.keep_experience = ranks, keep_experience
        self.checkpoints: Checkpoints | None = None
        self.folder: Path | None = None
        if folder is not None:
            self.folder = Path(folder)
            if self.folder.exists() and not self.folder.is_dir():
                raise ValueError(f"run_dir ({folder}) is not a folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints = Checkpoints(
                self.folder / "checkpoints", keep_last=keep_last, keep_best=keep_best, accelerator=ranks.accelerator
            )

    @property
    def metrics_path(self) -> Path | None:
        """Where the metrics of each update go."""
        return None if self.folder is None else self.folder / "metrics.jsonl"

    @property
    def experience_folder(self) -> Path:
        """Where responses are kept; a temporary folder goes when the run is let go of."""
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="palm-rlhf-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        folder = self.folder / "experience"
        folder.mkdir(exist_ok=True)
        return folder

    def file(self, name: str, number: int, *, fresh: bool = True) -> RolloutFile:
        """This process's file of an update, emptied unless it is to be gone on with."""
        path = self.experience_folder / f"{name}-{number:08d}.rank-{self.ranks.rank}.rollouts"
        if fresh:
            for old in (path, path.with_name(f"{path.name}.scores")):
                old.unlink(missing_ok=True)
        return RolloutFile(path)

    def kept(self, before: int, count: int) -> list[RolloutFile]:
        """Files of the `count` updates before one, as far as they are there, the oldest first."""
        numbers = range(max(before - count, 0), before)
        paths = [self.experience_folder / f"update-{number:08d}.rank-{self.ranks.rank}.rollouts" for number in numbers]
        return [RolloutFile(path, verify=False) for path in paths if path.exists()]

    def prune(self, updates: int) -> None:
        """Delete this process's responses that are no longer to be kept, now that so many updates are done."""
        for path in self._own():
            number = int(path.name.split("-")[1].split(".")[0])
            if path.name.startswith("refreshed-") or number < updates - self.keep_experience:
                path.unlink(missing_ok=True)

    def take_files(self, checkpoint: Checkpoint | None) -> None:
        """Make this process's experience what a checkpoint holds of it; None for nothing."""
        for path in self._own():
            path.unlink(missing_ok=True)
        held: Mapping[str, Path] = {} if checkpoint is None else checkpoint.files
        for name, source in held.items():
            if f".rank-{self.ranks.rank}." in name:
                shutil.copyfile(source, self.experience_folder / name)

    def _own(self) -> list[Path]:
        mark = f".rank-{self.ranks.rank}."
        return [path for path in sorted(self.experience_folder.iterdir()) if mark in path.name]
