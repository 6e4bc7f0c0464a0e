"""Trackers: the same numbers that go into the JSONL also go to wandb, TensorBoard and their like, by accelerate.

A tracker is told once what the run is, and is closed when the run ends, whatever ends it. One that fails on the way
never ends the run. Knows no model.
"""

import json
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import ProjectConfiguration

from palm_rlhf_pytorch.extras import needs
from palm_rlhf_pytorch.training.atomic import replacing
from palm_rlhf_pytorch.training.metrics import joined_names
from palm_rlhf_pytorch.training.ranks import Ranks, new_accelerator

PROJECT = "palm-rlhf"
FAILURES = 3  # calls of a tracker in a row that may fail before it is left alone: each may wait for a network
EXTRAS = ("wandb", "tensorboard")  # trackers that an extra of their name brings
KEPT_ID = "wandb-id.txt"  # in the run's folder: what a resumed run is known by


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Which trackers a run has, and what it is called there.

    Attributes:
        log_with: "wandb", "tensorboard" or another name that accelerate knows, an `accelerate.tracking.GeneralTracker`,
            or several of them.
        project: what the runs are gathered under.
        name: of the run; None takes the name of its folder.
        init_kwargs: arguments of single trackers, by their names: {"wandb": {"mode": "offline", "tags": ["a"]}}.
    """

    log_with: Any
    project: str = PROJECT
    name: str | None = None
    init_kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Trackers:
    """The trackers of a run: started and closed by `running`; in between `MetricsLog` hands them its lines.

    Args:
        accelerator: made with `log_with`; None has no trackers.
        tracking: what the run is called.
        folder: of the run; None where it has none.
    """

    def __init__(
        self, accelerator: Accelerator | None, tracking: Tracking | None = None, folder: Path | None = None
    ) -> None:
        self.accelerator, self.folder = accelerator, folder
        self.tracking = tracking or Tracking(log_with=None)
        self._id: str | None = None

    @property
    def wanted(self) -> bool:
        """Whether there are any; the same on all processes."""
        return self.accelerator is not None and bool(self.accelerator.log_with)

    @contextmanager
    def running(self, config: Mapping[str, Any], *, step: int = 0) -> Iterator[None]:
        """A block in which the trackers run; they are closed after it, after an error too. On every process.

        Where they run already, by a block around this one or `accelerator.init_trackers`, it leaves them alone.

        Args:
            config: of the run; nested names are joined by dots.
            step: the last step that is done: a run that goes on from there will write the later ones again.

        Raises:
            ValueError: if a tracker does not start.
        """
        accelerator = self.accelerator
        if accelerator is None or not accelerator.log_with or accelerator.trackers:
            yield
            return
        try:
            with Ranks(accelerator).together():
                if accelerator.is_main_process:
                    self._start(accelerator, config, step)
            yield
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.trackers.clear()

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int) -> None:
        """A table of texts and numbers, for trackers that can show one: see `Guarded.log_table`."""
        for tracker in [] if self.accelerator is None else self.accelerator.trackers:
            if isinstance(tracker, Guarded):
                tracker.log_table(name, columns, rows, step=step)

    def _start(self, accelerator: Accelerator, config: Mapping[str, Any], step: int) -> None:
        names = [kind.name if isinstance(kind, GeneralTracker) else str(kind) for kind in accelerator.log_with]
        try:
            accelerator.init_trackers(
                self.tracking.project, config=flattened(config), init_kwargs=self._arguments(names, step)
            )
        except Exception as error:  # of any tracker's own kind
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"log_with ({', '.join(names)}): a tracker did not start ({reason})") from error
        accelerator.trackers[:] = [Guarded(tracker) for tracker in accelerator.trackers]

    def _arguments(self, names: Sequence[str], step: int) -> dict[str, dict[str, Any]]:
        """What each tracker is started with: the run's name as it calls it, the user's own arguments before ours."""
        name = self.tracking.name or (None if self.folder is None else self.folder.name)
        found: dict[str, dict[str, Any]] = {}
        if name is not None:
            found = {"wandb": {"name": name}, "trackio": {"name": name}, "mlflow": {"run_name": name}}
        if "wandb" in names:  # a run that goes on stays one run there
            found["wandb"] = found.get("wandb", {}) | {"id": self._run_id(), "resume": "allow"}
        if step:
            found["tensorboard"] = {"purge_step": step + 1}
        own = self.tracking.init_kwargs
        return {name: found.get(name, {}) | dict(own.get(name, {})) for name in {*found, *own}}

    def _run_id(self) -> str:
        """What the run is known by for good: kept in its folder."""
        path = None if self.folder is None else self.folder / KEPT_ID
        if self._id is None:
            kept = path is not None and path.is_file()
            self._id = path.read_text(encoding="ascii").strip() if path and kept else secrets.token_hex(4)
            if path is not None and not kept:
                with replacing(path) as file:
                    file.write(self._id.encode())
        return self._id


class Guarded(GeneralTracker):
    """A tracker whose failures are told of once and end nothing; after `FAILURES` in a row it is left alone."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.name = inner, inner.name
        self.requires_logging_directory = inner.requires_logging_directory
        self.failed, self.told = 0, False
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet: while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def tracker(self) -> Any:
        """What the tracker works with, a run of wandb say."""
        return self.inner.tracker

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """See GeneralTracker."""
        self._try(lambda: self.inner.store_init_configuration(values))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """See GeneralTracker."""
        self._try(lambda: self.inner.log(values, step=step, **kwargs))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int) -> None:
        """A table: as text for TensorBoard, by `log_table` where a tracker has that (wandb, ClearML); else nothing."""
        if self.name == "tensorboard":
            self.log({name: markdown_table(columns, rows)}, step=step)
        elif callable(getattr(self.inner, "log_table", None)):
            data = [list(row) for row in rows]
            self._try(lambda: self.inner.log_table(name, columns=list(columns), data=data, step=step))

    def finish(self) -> None:
        """See GeneralTracker."""
        self.failed = 0
        self._try(self.inner.finish)

    def _try(self, call: Callable[[], Any]) -> None:
        if self.failed >= FAILURES:
            return
        try:
            call()
            self.failed = 0
        except Exception as error:  # whatever a network does, the run goes on
            self.failed += 1
            if not self.told:
                self.told = True
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                warnings.warn(f"tracker {self.name}: {reason}; the run goes on, its JSONL is whole", stacklevel=5)


def tracked_accelerator(
    arguments: Mapping[str, Any] | None, log_with: Any = None, *, folder: str | Path | None = None
) -> tuple[Accelerator, Trackers]:
    """An Accelerator of these arguments, and its trackers, which are not started yet.

    Args:
        arguments: of `accelerate.Accelerator`; they may name trackers, too.
        log_with: a `Tracking`, or what `Tracking.log_with` may be; None leaves it to the arguments.
        folder: of the run: trackers that write files get `trackers` in it, unless the arguments say where.

    Raises:
        ImportError: if a tracker is not installed; the extra is named.
        ValueError: if there is no such tracker, it writes files and there is no folder, or both name trackers.
    """
    arguments = dict(arguments or {})
    given = arguments.get("log_with")
    if log_with is not None and given is not None:
        raise ValueError(
            f"log_with ({log_with}) and accelerate_kwargs' log_with ({given}) both name trackers: give one"
        )
    tracking = log_with if isinstance(log_with, Tracking) else Tracking(log_with=log_with or given)
    check_trackers(tracking.log_with)
    if tracking.log_with is not None:
        arguments["log_with"] = tracking.log_with
        named = [arguments.get("project_dir"), getattr(arguments.get("project_config"), "logging_dir", None)]
        if not any(named) and folder is not None:
            config = copy(arguments.get("project_config") or ProjectConfiguration())
            config.logging_dir = str(Path(folder).resolve() / "trackers")
            arguments["project_config"] = config
        elif not any(named):
            _check_no_files(tracking.log_with)
    path = None if folder is None else Path(folder).resolve()
    return (accelerator := new_accelerator(arguments)), Trackers(accelerator, tracking, path)


def check_trackers(log_with: object) -> None:
    """Raise for a tracker that accelerate does not know (ValueError) or that is not installed (ImportError)."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in _listed(log_with):
        if isinstance(name, GeneralTracker) or name == "all":
            continue
        if str(name) not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))
            raise ValueError(f"log_with names {name!r}, which is no tracker: choose from {known}")
        if str(name) not in available:
            extra = str(name) if str(name) in EXTRAS else None
            raise ImportError(needs(f"log_with={str(name)!r}", str(name), extra=extra))


def flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as trackers take it: nested names joined by dots, values bool, int, float or str."""
    return {name: _plain(value) for name, value in joined_names(config).items()}


def _plain(value: Any) -> bool | int | float | str:
    if isinstance(value, bool | int | float | str):
        return value
    return "None" if value is None else json.dumps(value, default=str)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in markdown; what would break it in a text is written another way."""

    def cell(value: Any) -> str:
        text = f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
        for mark, written in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\r", ""), ("\n", "<br>")):
            text = text.replace(mark, written)
        return text

    lines = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(log_with: object) -> Sequence[Any]:
    if log_with is None:
        return []
    return log_with if isinstance(log_with, list | tuple) else [log_with]


def _check_no_files(log_with: object) -> None:
    """Raise a ValueError for a tracker that needs a folder, where there is none."""
    for name in _listed(log_with):
        kind = LOGGER_TYPE_TO_CLASS.get(str(name))
        if not isinstance(name, GeneralTracker) and kind is not None and kind.requires_logging_directory:
            raise ValueError(
                f"log_with names {str(name)!r}, which writes files: give the trainer a run_dir, or"
                " accelerate_kwargs={'project_dir': ...}"
            )
