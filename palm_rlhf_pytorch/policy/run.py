"""A run on disk: the folder that holds its metrics, its experience and its checkpoints; and the update in hand.

    run_dir/metrics.jsonl
    run_dir/rollouts/                                        see policy/inspection.py
    run_dir/experience/update-00000012.rank-0.rollouts       responses, one file an update and process
    run_dir/checkpoints/step-00000012/                       see training/checkpoint.py

Knows no model.
"""

import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from palm_rlhf_pytorch.policy.experience import Experience
from palm_rlhf_pytorch.policy.progress import Progress
from palm_rlhf_pytorch.policy.rollout_file import RolloutFile
from palm_rlhf_pytorch.policy.watch import WatchSettings, nearest_step
from palm_rlhf_pytorch.training.checkpoint import Checkpoint, Checkpoints
from palm_rlhf_pytorch.training.manifest import CheckpointError, read_manifest, step_name, step_of
from palm_rlhf_pytorch.training.ranks import Ranks

MAX_ROUNDS = 64  # of one update
KINDS, PARTS = r"(?P<kind>update|refreshed|round\d+)", r"\.rollouts(\.scores|\.rewards)?"
NAME = re.compile(KINDS + r"-(?P<number>\d{8})\.rank-(?P<rank>\d+)" + PARTS)


@dataclass
class Flight:
    """An update in hand: what was done of it, and where the trainer stood before.

    Attributes:
        taken: prompts handed out before it.
        size: responses of it, over all processes.
        rounds: its responses and their scores, as far as there are some; more than one file where a method samples
            again what has taught it nothing.
        refreshed: older responses as the policy sees them at the beginning of the update, where such are learnt from.
        progress: how far learning has come; None before it.
        held_out: what the held-out judge says of the responses, as metrics; None before it was asked.
        parts: where several judges make one, the sum of each one's finite scores and their number, over all processes.
        held_out_scores: the same, of each response, (n,), as long as the process lives.
    """

    taken: int
    size: int
    rounds: list[RolloutFile]
    refreshed: RolloutFile | None = None
    progress: Progress | None = None
    held_out: dict[str, float] | None = None
    held_out_scores: Tensor | None = None
    parts: dict[str, list[float]] = field(default_factory=dict)

    def add_parts(self, parts: Mapping[str, Tensor], ranks: Ranks) -> None:
        """Take in what each of several judges gave in a round, (n,) by name; every process must call it."""
        for name, scores in parts.items():
            known = scores[scores.isfinite()].double()
            own = torch.stack([known.sum(), torch.tensor(len(known), dtype=torch.float64)])
            before = self.parts.get(name, [0.0, 0.0])
            self.parts[name] = [a + b for a, b in zip(before, ranks.sum(own).tolist(), strict=True)]

    def set_held_out(self, scores: Tensor | None, ranks: Ranks) -> None:
        """Take in the held-out judge's scores, (n,), if there is such a judge; every process must call it."""
        self.held_out_scores, self.held_out = scores, {}
        if scores is not None:
            known = scores[scores.isfinite()].double()
            own = torch.stack([known.sum(), torch.tensor(len(known), dtype=torch.float64)])
            total, count = ranks.sum(own).tolist()
            self.held_out = {"reward/held_out_score": total / count if count else float("nan")}

    @property
    def figures(self) -> dict[str, float]:
        """What the judges say beside the score, as metrics."""
        means = {f"reward/{name}": total / count for name, (total, count) in self.parts.items() if count}
        return means | (self.held_out or {})

    @property
    def experience(self) -> Experience:
        """All responses to learn from, the oldest first."""
        files = self.rounds if self.refreshed is None else [self.refreshed, *self.rounds]
        return Experience([file for file in files if len(file)])

    @property
    def sampled(self) -> Experience:
        """The responses of this update alone."""
        return Experience(self.rounds)

    @property
    def stream(self) -> tuple[int, ...]:
        """What tells the random states of a later round from those of the first."""
        return (1_000_000 + len(self.rounds),) if len(self.rounds) > 1 else ()

    @property
    def file(self) -> RolloutFile:
        """The round in hand."""
        return self.rounds[-1]

    @property
    def files(self) -> list[Path]:
        """What of it is on disk."""
        known = self.rounds if self.refreshed is None else [*self.rounds, self.refreshed]
        return [path for file in known for path in file.files()]


class Run:
    """The folder of a run; a temporary one, without checkpoints, where none is named.

    Args:
        folder: made if it is not there; shared by all processes.
        ranks: all processes.
        keep_last: see PolicySettings, as for keep_best and keep_experience.
        keep_best: likewise.
        keep_experience: likewise.
    """

    def __init__(
        self, folder: str | Path | None, ranks: Ranks, *, keep_last: int, keep_best: str | None, keep_experience: int
    ) -> None:
        self.ranks, self.keep_experience = ranks, keep_experience
        self.recent = 0  # checkpoints of the last updates that are kept beside the newest, for a watch
        self.begun = False  # whether this trainer goes on with what the folder holds
        self.checkpoints: Checkpoints | None = None
        self.folder: Path | None = None
        if folder is not None:
            self.folder = Path(folder).resolve()  # wherever the program goes meanwhile
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
    def samples_path(self) -> Path | None:
        """Where the best and worst responses of each update go."""
        return None if self.checkpoints is None or self.folder is None else self.folder / "samples.jsonl"

    @property
    def rollouts_folder(self) -> Path | None:
        """Where rollouts are kept to be looked at."""
        return None if self.checkpoints is None or self.folder is None else self.folder / "rollouts"

    def keep_for(self, watch: WatchSettings | None) -> None:
        """Keep so many checkpoints that the one which a watch will call the best is still there when it does.

        Raises:
            ValueError: if there is a watch and no folder.
        """
        if watch is None:
            return
        if self.checkpoints is None:
            raise ValueError("watch goes back to a checkpoint: give the trainer a run_dir")
        self.checkpoints.keep_last = max(self.checkpoints.keep_last, watch.window + 2)
        self.recent = watch.window + 2  # of whole updates, whatever was saved inside them

    def finished(self) -> dict[int, Path]:
        """The checkpoints that were taken at the end of an update, by how many updates the policy had had."""
        found: dict[int, Path] = {}
        for step in [] if self.checkpoints is None else self.checkpoints.steps():
            assert self.checkpoints is not None, "it has steps"
            path = self.checkpoints.folder / step_name(step)
            with suppress(CheckpointError):
                values = read_manifest(path).values
                if values["flight"] is None:
                    found[int(values["counters"]["updates"])] = path
        return found

    def pin(self, updates: int | None) -> None:
        """Keep the checkpoint nearest to the policy of so many updates, and the last updates', whatever comes after."""
        if self.checkpoints is not None:
            places = self.finished()
            nearest = None if updates is None else nearest_step(updates, list(places))
            kept = {*sorted(places)[-self.recent :], *(() if nearest is None else (nearest,))}
            self.checkpoints.pinned = {step for at in kept if (step := step_of(places[at].name)) is not None}

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
        path = self.path(name, number)
        if fresh:
            for old in (path, path.with_name(f"{path.name}.scores")):
                old.unlink(missing_ok=True)
        return RolloutFile(path)

    def kept(self, before: int, count: int) -> list[RolloutFile]:
        """Files of the `count` updates before one, as far as they are there, the oldest first."""
        numbers = range(max(before - count, 0), before)
        found: list[RolloutFile] = []
        for number in numbers:
            paths = [self.path(name, number) for name in round_names(MAX_ROUNDS)]
            found += [RolloutFile(path, verify=False) for path in paths if path.exists()]
        return found

    def path(self, kind: str, number: int) -> Path:
        """Where this process's responses of an update are."""
        return self.experience_folder / f"{kind}-{number:08d}.rank-{self.ranks.rank}.rollouts"

    def round(self, place: int, number: int, *, fresh: bool = True) -> RolloutFile:
        """This process's file of a round of an update, the first of which is 0."""
        if fresh and place == 0:  # an update that begins anew has none of the rounds that an abandoned one had
            for name in round_names(MAX_ROUNDS)[1:]:
                self.file(name, number).discard()
        return self.file(round_names(place + 1)[-1], number, fresh=fresh)

    def prune(self, updates: int) -> None:
        """Delete this process's responses that are no longer to be kept, now that so many updates are done."""
        for path, (kind, number) in self._own().items():
            if kind == "refreshed" or number < updates - self.keep_experience:
                path.unlink(missing_ok=True)

    def fetch(self, checkpoint: Checkpoint, *, num_tokens: int) -> dict[str, Path]:
        """Copies of this process's experience in a checkpoint, by name, beside the run's own, and whole.

        Raises:
            ValueError: if a file is damaged, or holds ids that the model has not.
            OSError: if the disk refuses; nothing is left behind then.
        """
        copies: dict[str, Path] = {}
        try:
            for name in sorted(checkpoint.files):
                if (match := NAME.fullmatch(name)) and int(match["rank"]) == self.ranks.rank:
                    copies[name] = self.experience_folder / f"fetched.{name}"
                    shutil.copyfile(checkpoint.files[name], copies[name])
            for name, path in copies.items():
                if name.endswith(".rollouts"):
                    _check_ids(RolloutFile(path), num_tokens, checkpoint.path)
        except BaseException:
            for path in copies.values():
                path.unlink(missing_ok=True)
            raise
        return copies

    def take_files(self, fetched: Mapping[str, Path], updates: int) -> None:
        """Put fetched files in place; responses of this update and later ones, which are to come again, go."""
        for path, (_, number) in self._own().items():
            if number >= updates:
                path.unlink(missing_ok=True)
        for name, path in fetched.items():
            path.replace(self.experience_folder / name)

    def _own(self) -> dict[Path, tuple[str, int]]:
        """This process's files: what they are of, and of which update."""
        found = {}
        for path in self.experience_folder.iterdir():
            match = NAME.fullmatch(path.name)
            if match and int(match["rank"]) == self.ranks.rank:
                found[path] = match["kind"], int(match["number"])
        return found


def round_names(count: int) -> list[str]:
    """The first of the names that the rounds of an update have in its folder."""
    return ["update", *(f"round{place}" for place in range(1, count))]


def _check_ids(file: RolloutFile, num_tokens: int, source: Path) -> None:
    """Raise unless all tokens are of the model's vocabulary: an id beyond it would end a CUDA process."""
    for row in range(len(file)):
        ids = file.read(row).ids
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < num_tokens:
            raise ValueError(
                f"{source} holds responses with ids outside the model's {num_tokens}; nothing was taken over"
            )
