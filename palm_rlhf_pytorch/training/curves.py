"""Curves of runs, from their metrics files: what is drawn, smoothed, summed up. Knows no plot and no page.

A run is a folder that holds metrics.jsonl, or a metrics file; one that is still being written will do.
"""

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from palm_rlhf_pytorch.training.checkpoint import Checkpoints
from palm_rlhf_pytorch.training.manifest import CheckpointError, read_manifest, step_name
from palm_rlhf_pytorch.training.metrics import GLOSSARY, joined_names, read_metrics

METRICS = "metrics.jsonl"
SETTINGS = ("settings", "plan", "call")  # where checkpoints of our trainers keep what a run was asked for
PROGRESS = ("done", "updates")  # what is no setting of a call


class Panel(NamedTuple):
    """What one plot shows: the first metric as solid lines, the others dashed, of runs that have the first."""

    title: str
    names: tuple[str, ...]


PANELS = tuple(
    Panel(title, tuple(names.split()))
    for title, names in (
        ("Score", "reward/score reward/held_out_score"),
        ("KL to the reference, nats a response", "objective/kl"),
        ("Response length, tokens", "response/length_mean"),
        ("Entropy, nats a token", "policy/entropy"),
        ("Policy loss", "policy/loss"),
        ("Value loss", "value/loss"),
        ("KL of an update, nats a token", "policy/approx_kl"),
        ("Clipped tokens, share", "policy/clipped_fraction"),
        ("Explained variance of the critic", "value/explained_variance"),
        ("Groups that teach, share", "rollout/informative_groups"),
        ("Learning rate", "policy/lr value/lr"),
        ("Preference loss", "dpo/loss eval/loss"),
        ("Preference accuracy", "dpo/accuracy eval/accuracy"),
        ("Rewards, chosen and rejected", "dpo/reward_chosen dpo/reward_rejected"),
        ("Reward margin", "dpo/margin eval/margin"),
        ("Loss of votes", "kto/loss eval/loss"),
        ("Accuracy on votes", "kto/accuracy eval/accuracy"),
        ("Rewards, up and down", "kto/reward_up kto/reward_down"),
        ("Score, all samples and the best", "rejection/score rejection/best_score"),
        ("Responses learnt from", "rejection/kept"),
        ("Loss on the best samples", "rejection/loss"),
        ("Loss", "train/loss eval/loss"),
        ("Bits per byte, held out", "eval/bits_per_byte"),
        ("Accuracy, held out", "eval/accuracy"),
        ("Gradient norm", "train/grad_norm"),
        ("Learning rate", "train/lr"),
    )
)


class RunCurves(NamedTuple):
    """A run: its name, path, lines by step (a step that was written twice counts as written last), and settings."""

    name: str
    path: Path
    lines: list[dict[str, float]]
    settings: dict[str, Any]

    @property
    def unit(self) -> str:
        """What a step is."""
        names = {name.partition("/")[0] for line in self.lines for name in line}
        return "update" if {"objective", "reward"} & names else "round" if "rejection" in names else "step"

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, (n,) each, where it was written; nan is a gap."""
        known = [line for line in self.lines if name in line]
        return [line["step"] for line in known], [line[name] for line in known]

    def last(self, name: str) -> float | None:
        """The last finite value of a metric."""
        return next((value for value in reversed(self.curve(name)[1]) if math.isfinite(value)), None)


def read_runs(paths: Sequence[str | Path]) -> list[RunCurves]:
    """Runs under names that tell them apart.

    Raises:
        FileNotFoundError: if there is no metrics file.
        ValueError: if a file holds no metrics, none yet, or is named twice.
    """
    files = [metrics_file(path) for path in paths]
    twice = next((path for place, path in enumerate(files) if path.resolve() in map(Path.resolve, files[:place])), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice; a run is drawn once")
    return [_read(path, name) for path, name in zip(files, _names(files), strict=True)]


def metrics_file(path: str | Path) -> Path:
    """The metrics file of a run.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    if path.is_dir():
        if (path / METRICS).is_file():
            return path / METRICS
        beside = sorted(found.name for found in path.glob("*.jsonl"))
        hint = f"; it holds {', '.join(beside)}: name one of these files" if beside else ""
        raise FileNotFoundError(f"{path} holds no {METRICS}{hint}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such run")
    return path


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, without the pull of its start: sum w^(i-j) x_j / sum w^(i-j) over j <= i.

    Args:
        values: nan is left out, and stays a gap.
        weight: w, of what came before, from 0 (nothing) to below 1.

    Raises:
        ValueError: if weight is out of range.
    """
    if not 0 <= weight < 1:
        raise ValueError(f"weight ({weight}) must be at least 0 and below 1")
    found, total, norm = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + value, weight * norm + 1.0
        found.append(total / norm if math.isfinite(value) else math.nan)
    return found


def panels_of(runs: Sequence[RunCurves], patterns: Sequence[str] | None = None) -> list[Panel]:
    """What to draw: the PANELS that runs have numbers for, or each metric that a pattern names.

    Args:
        runs: all of them.
        patterns: names of metrics, or patterns of names, `policy/*`; None for PANELS.

    Raises:
        ValueError: if no run has any number, or a pattern names no metric that one has.
    """
    known = {
        name
        for run in runs
        for line in run.lines
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
    if not known:
        raise ValueError(f"{', '.join(str(run.path) for run in runs)}: there is no number to draw")
    if patterns is None:
        found, drawn = [], set[tuple[Path, str]]()
        for panel in PANELS:
            own = [run for run in runs if run.last(panel.names[0]) is not None]
            if any((run.path, panel.names[0]) not in drawn for run in own):
                names = [name for name in panel.names if any(run.last(name) is not None for run in own)]
                found.append(Panel(panel.title, tuple(names)))
                drawn |= {(run.path, name) for run in own for name in names}
        return found or [Panel(name, (name,)) for name in sorted(known)]
    order = [name for name in GLOSSARY if name in known] + sorted(known - GLOSSARY.keys())
    chosen: dict[str, None] = {}
    for pattern in patterns:
        matching = [name for name in order if fnmatchcase(name, pattern)]
        if not matching:
            close = get_close_matches(pattern, order, n=1)
            hint = f"did you mean {close[0]}?" if close else f"they have {', '.join(order[:8])}, ..."
            raise ValueError(f"metrics: no run has {pattern!r}; {hint}")
        chosen |= dict.fromkeys(matching)
    return [Panel(name, (name,)) for name in chosen]


def caption(panel: Panel) -> str:
    """What the metrics of a panel mean."""
    told = [f"{name}: {GLOSSARY.get(name, 'a metric of the run')}" for name in panel.names]
    return "; dashed, ".join(told)


# tables: heads, and a line for each run


def summary(runs: Sequence[RunCurves]) -> tuple[list[str], list[list[Any]]]:
    """How far each run came, and where it stands; columns that no run has numbers for are left out."""
    shown = (
        ("last score", "reward/score"), ("last held-out score", "reward/held_out_score"), ("last KL", "objective/kl"),
        ("last length", "response/length_mean"), ("last entropy", "policy/entropy"), ("last loss", "train/loss"),
        ("held-out loss", "eval/loss"), ("held-out accuracy", "eval/accuracy"), ("bits per byte", "eval/bits_per_byte"),
        ("last score of the best", "rejection/best_score"),
    )  # fmt: skip
    columns: dict[str, list[Any]] = {"run": [run.name for run in runs]}
    columns["steps"] = [f"{int(run.lines[-1]['step']):,} {run.unit}s" for run in runs]
    episodes = [run.last("episodes") for run in runs]
    columns["episodes"] = [None if count is None else f"{int(count):,}" for count in episodes]
    columns["best score"] = [_best(run) for run in runs]
    columns |= {head: [run.last(name) for run in runs] for head, name in shown}
    kept = {head: values for head, values in columns.items() if any(value is not None for value in values)}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def differing_settings(runs: Sequence[RunCurves]) -> tuple[list[str], list[list[Any]]]:
    """A line for each setting in which runs differ: its name, then each run's; empty where a run has no such setting.

    Settings are those that the newest checkpoints tell; what runs of one method alone have is no difference.
    """
    names = {name: None for run in runs for name in run.settings}
    rows: list[list[Any]] = []
    for name in names:
        if len({str(run.settings[name]) for run in runs if name in run.settings}) > 1:
            rows.append([name, *(str(run.settings.get(name, "")) for run in runs)])
    return ["setting", *(run.name for run in runs)], rows


def _best(run: RunCurves) -> str | None:
    steps, values = run.curve("reward/score")
    found = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if not found:
        return None
    value, step = max(found, key=lambda pair: pair[0])
    return f"{value:.4g} ({run.unit} {int(step)})"


# reading


def _read(path: Path, name: str) -> RunCurves:
    lines: dict[float, dict[str, float]] = {}
    for line in read_metrics(path):
        if not isinstance(line.get("step"), int):
            raise ValueError(f"{path} has a line without a step: it is no metrics file")
        lines[line["step"]] = {name: value for name, value in line.items() if isinstance(value, int | float)}
    if not lines:
        raise ValueError(f"{path} holds no whole line yet: there is nothing to draw")
    own = _settings(path.parent) if path.name == METRICS else {}
    return RunCurves(name, path, [lines[step] for step in sorted(lines)], own or _options(path))


def _names(files: Sequence[Path]) -> list[str]:
    """Names as short as may be: a folder's, or a file's without endings; with folders above where they are alike."""
    parts = [
        (*path.resolve().parts[1:-1], *(() if path.name == METRICS else (path.name.split(".")[0],))) for path in files
    ]
    count = 1
    while len({own[-count:] for own in parts}) < len({*parts}):
        count += 1
    names = ["/".join(own[-count:]) for own in parts]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, files, strict=True)]


def _settings(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run says that it was asked for; nothing where there is none, or it is broken."""
    checkpoints = folder / "checkpoints"
    for step in reversed(Checkpoints(checkpoints).steps()) if checkpoints.is_dir() else ():
        try:
            kind, _, values, *_ = read_manifest(checkpoints / step_name(step))
        except (CheckpointError, OSError):  # being written or removed by the run
            continue
        found = {"trainer": kind} | ({"seed": values["seed"]} if "seed" in values else {})
        for group in SETTINGS:
            known = values.get(group)
            found |= joined_names(known) if isinstance(known, Mapping) else {}
        return {name: value for name, value in found.items() if name not in PROGRESS}
    return {}


def _options(metrics: Path) -> dict[str, Any]:
    """The options of the command that made a run, where it has left them beside the metrics."""
    path = metrics.with_name(metrics.name.removesuffix(METRICS) + "config.yaml")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError):  # someone else's file
        return {}
    return joined_names(found) if isinstance(found, Mapping) else {}
