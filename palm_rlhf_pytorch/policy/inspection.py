"""Rollouts that are kept to be looked at, token by token: of an update the responses that scored best and worst.

    run_dir/rollouts/update-00000012.safetensors        what `palm-rlhf inspect` shows

Beside what was recorded when they were sampled stands what learning made of each token, and what the policy says of it
after the update. Knows no trainer's files but its own.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.judging import evaluating
from palm_rlhf_pytorch.policy.learning import Learner
from palm_rlhf_pytorch.policy.rollout import Rollout, row_batches
from palm_rlhf_pytorch.policy.samples import picked
from palm_rlhf_pytorch.policy.settings import PolicySettings
from palm_rlhf_pytorch.policy.targets import Lesson
from palm_rlhf_pytorch.text.tokenizer import NUM_BYTES, ByteTokenizer
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.tensor_file import load_tensors, save_tensors

KIND = "inspected rollouts"
NAME = re.compile(r"update-(\d{8})\.safetensors")
# of each response token: nats, nats, reward, reward, whitened, reward, ratio of probabilities, 0 or 1
NUMBERS = ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "ratios", "clipped")
PER_ROW = ("prompt_lengths", "lengths", "scores", "held_out_scores", "ended", "prompt_rows", "best")


class Inspected(NamedTuple):
    """One response.

    best: whether it is one of the best, not of the worst.
    score: the judge's, raw; held_out_score: that of a judge that is not learnt from, None without one.
    ended: whether it ended with EOS. prompt_row: which of the trainer's prompts it answers, -1 where not known.
    prompt: ids (p,). response: ids (t,).
    numbers: of each response token, (t,), by name: `logprobs` (nats, when it was sampled), `ref_logprobs`, `values`,
        `rewards` (score and KL penalty), `advantages` (as learnt from: whitened, or the group's), `returns`, `ratios`
        (probability after the update over that before; of group methods at the level they clip at) and `clipped` (1
        where the ratio has left the trust region on the side that earns, so that the token teaches no more).
        Without a critic there are no values and returns.
    """

    best: bool
    score: float
    held_out_score: float | None
    ended: bool
    prompt_row: int
    prompt: list[int]
    response: list[int]
    numbers: dict[str, Tensor]


class InspectedUpdate(NamedTuple):
    """Responses of one update, the best first, then the worst; texts of their tokens by id, as far as they are known.

    trainer: of which kind. step: updates done, this one included.
    """

    trainer: str
    step: int
    rows: list[Inspected]
    texts: dict[int, str]


class Trainer(Protocol):
    """What of a trainer is looked at."""

    accelerator: Accelerator
    ranks: Ranks
    actor_critic: ActorCritic
    learner: Learner
    settings: PolicySettings
    tokenizer: Any
    updates: int
    taught: Lesson | None

    @property
    def kind(self) -> str: ...  # noqa: D102


class RolloutFiles:
    """The files of a run, of its last `keep` updates; without a folder, or with 0, there are none."""

    def __init__(self, folder: Path | None, *, keep: int) -> None:
        self.folder, self.keep = folder if keep else None, keep

    def add(self, trainer: Trainer, *, held_out_scores: Tensor | None) -> None:
        """Keep the best and the worst responses of the update just made; every process must call it.

        Args:
            trainer: what it was made with; it keeps `keep_samples` of each.
            held_out_scores: of the responses sampled in this update, (n,), or None.
        """
        lesson, count = trainer.taught, trainer.settings.keep_samples
        trainer.taught = None
        if self.folder is None or lesson is None or not count:
            return
        with trainer.learner.whole(), trainer.accelerator.autocast(), trainer.ranks.together():
            own = inspected(trainer, lesson, count, held_out_scores)
        found = [row for rows in trainer.ranks.gather_values(own) for row in rows]
        with trainer.ranks.together():
            if trainer.accelerator.is_main_process:
                best, worst = picked([row.score for row in found], count)
                rows = [found[place]._replace(best=True) for place in best]
                rows += [found[place]._replace(best=False) for place in worst]
                texts = token_texts(trainer.tokenizer, {token for row in rows for token in row.prompt + row.response})
                self._write(InspectedUpdate(trainer.kind, trainer.updates, rows, texts))

    def rewind(self, step: int, *, main: bool) -> None:
        """Delete the files of later updates, which a run that goes on from there will make again."""
        for number, path in list_rollouts(self.folder).items() if main else ():
            if number > step:
                path.unlink(missing_ok=True)

    def _write(self, update: InspectedUpdate) -> None:
        assert self.folder is not None, "asked for with one"
        write_rollouts(self.folder / f"update-{update.step:08d}.safetensors", update)
        for number, path in list_rollouts(self.folder).items():
            if number <= update.step - self.keep:
                path.unlink(missing_ok=True)


@torch.no_grad()
def inspected(trainer: Trainer, lesson: Lesson, count: int, held_out_scores: Tensor | None) -> list[Inspected]:
    """The best and the worst responses of a lesson that this update has sampled and learnt from, of this process.

    One more pass of the policy over these few rows tells how far each token's probability has moved.

    Args:
        trainer: after the update.
        lesson: what it has learnt from.
        count: how many of the best, and of the worst.
        held_out_scores: of the rows sampled in this update, (n,): the last ones of the lesson.
    """
    source, device = lesson.source, trainer.accelerator.device
    assert source.scores is not None, "a lesson is made of scored rows"
    own = lesson.counted & lesson.fresh
    best, worst = picked(source.scores.masked_fill(~own, math.nan).tolist(), count)
    if not best:
        return []
    rows = next(row_batches(lesson.spans, best + worst, device=torch.device("cpu")))
    rollout, targets = lesson.read(rows)
    mask, new = rollout.response_mask, torch.zeros_like(rollout.logprobs)
    spans = rollout.spans()
    limit = trainer.settings.max_batch_tokens
    with evaluating(trainer.actor_critic):
        for part in row_batches(spans, range(len(spans)), device=torch.device("cpu"), max_tokens=limit):
            some = part.numbers
            sequences, prompts, lengths = (
                tensor[some].to(device) for tensor in (rollout.sequences, rollout.prompt_lengths, rollout.lengths)
            )
            now = trainer.actor_critic.logprobs(
                sequences[:, : part.total], prompts, part.steps, temperature=rollout.temperature, lengths=lengths
            )
            new[some, : part.steps] = now.float().cpu()
    ratios, clipped = trainer.learner.loss.clipping(new, rollout.logprobs, targets.advantages, mask)
    known = {"rewards": targets.rewards, "advantages": targets.advantages, "ratios": ratios, "clipped": clipped}
    known |= {"values": rollout.values, "returns": targets.returns} if lesson.values else {}
    held_out = None
    if held_out_scores is not None:
        held_out = held_out_scores[rows.numbers - (len(lesson.spans) - len(held_out_scores))].tolist()
    return _rows(rollout, source.scores[rows.numbers].tolist(), held_out, known, num_best=len(best))


def _rows(
    rollout: Rollout, scores: list[float], held_out: list[float] | None, known: Mapping[str, Tensor], *, num_best: int
) -> list[Inspected]:
    """Each row by itself, without padding."""
    known = {"logprobs": rollout.logprobs, "ref_logprobs": rollout.ref_logprobs, **known}
    found = []
    for place, (start, length) in enumerate(rollout.spans()):
        ids = rollout.sequences[place, : start + length].tolist()
        other = math.nan if held_out is None else held_out[place]
        found.append(
            Inspected(
                best=place < num_best, score=scores[place], held_out_score=other if math.isfinite(other) else None,
                ended=bool(rollout.ended[place]), prompt_row=int(rollout.prompt_rows[place]), prompt=ids[:start],
                response=ids[start:],
                numbers={name: known[name][place, :length].float().clone() for name in NUMBERS if name in known},
            )
        )  # fmt: skip
    return found


def token_texts(tokenizer: Any, ids: set[int]) -> dict[int, str]:
    r"""The text of each token by itself; empty where the tokenizer cannot decode.

    A byte that is no character by itself is written as \xNN, a special token by its name or its number in <>.
    """
    if not hasattr(tokenizer, "decode"):
        return {}
    named = {getattr(tokenizer, f"{name}_token", None): f"<{name}>" for name in ("pad", "bos", "eos")}
    found = {}
    for token in sorted(ids):
        text = str(tokenizer.decode([token]))
        if token in named or not text:
            text = named.get(token, f"<{token}>")
        elif "\ufffd" in text:
            is_byte = isinstance(tokenizer, ByteTokenizer) and token < NUM_BYTES
            text = f"\\x{token:02X}" if is_byte else f"<{token}>"
        found[token] = text
    return found


def token_text(update: InspectedUpdate, token: int) -> str:
    """The text of a token, or its number in <> where that is not known."""
    return update.texts.get(token, f"<{token}>")


def shown(text: str, *, alone: bool = False) -> str:
    """A token's text with what cannot be seen written in signs: ends of lines, tabs, control characters.

    Args:
        text: of a token.
        alone: whether it stands alone: then spaces are written too.
    """
    text = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣" if alone else " ")
    return "".join(c if c.isprintable() or c == " " else f"\\x{ord(c):02X}" for c in text)


# files


def write_rollouts(path: Path, update: InspectedUpdate) -> None:
    """Write a file of rollouts, whole or not at all."""
    rows = update.rows
    names = [name for name in NUMBERS if rows and name in rows[0].numbers]
    held_out = [math.nan if row.held_out_score is None else row.held_out_score for row in rows]
    tensors = {
        "ids": torch.tensor([token for row in rows for token in row.prompt + row.response], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(row.prompt) for row in rows]),
        "lengths": torch.tensor([len(row.response) for row in rows]),
        "scores": torch.tensor([row.score for row in rows], dtype=torch.float64),
        "held_out_scores": torch.tensor(held_out, dtype=torch.float64),
        "ended": torch.tensor([row.ended for row in rows]),
        "prompt_rows": torch.tensor([row.prompt_row for row in rows]),
        "best": torch.tensor([row.best for row in rows]),
        **{name: torch.cat([row.numbers[name] for row in rows]) for name in names},
    }
    texts = {str(token): text for token, text in update.texts.items()}
    save_tensors(
        path, tensors, kind=KIND, config={"trainer": update.trainer, "step": update.step, "numbers": names},
        extra={"texts": texts},
    )  # fmt: skip


def read_rollouts(path: str | Path) -> InspectedUpdate:
    """What `write_rollouts` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else, or is damaged.
    """
    file = load_tensors(path, kind=KIND)
    try:
        columns = [file.tensors[name].tolist() for name in PER_ROW]
        names, lengths = file.config["numbers"], columns[1]
        ids = file.tensors["ids"].split([sum(span) for span in zip(*columns[:2], strict=True)])
        numbers = {name: file.tensors[name].split(lengths) for name in names}
        rows = []
        for place, (start, _, score, other, ended, prompt_row, best) in enumerate(zip(*columns, strict=True)):
            tokens = ids[place].tolist()
            own = {name: parts[place] for name, parts in numbers.items()}
            other = other if math.isfinite(other) else None
            rows.append(Inspected(best, score, other, ended, prompt_row, tokens[:start], tokens[start:], own))
        texts = {int(token): text for token, text in file.extra["texts"].items()}
        return InspectedUpdate(file.config["trainer"], file.config["step"], rows, texts)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold {KIND} as this version writes them ({error})") from error


def list_rollouts(folder: Path | None) -> dict[int, Path]:
    """Files of a run's folder of rollouts, by the updates that were done, the earliest first."""
    paths = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
    return {int(match[1]): path for path in paths if (match := NAME.fullmatch(path.name))}


def find_rollouts(run: str | Path, update: int | None = None) -> Path:
    """The file of a run's newest update, or of one by its number; a path of a file is that file.

    Raises:
        FileNotFoundError: if there is no such run.
        ValueError: if it keeps no rollouts, or not those of that update.
    """
    run = Path(run)
    if not run.exists():
        raise FileNotFoundError(f"{run}: there is no such run")
    if run.is_file():
        return run
    kept = list_rollouts(run / "rollouts")
    if not kept:
        raise ValueError(
            f"{run} keeps no rollouts: a run of `palm-rlhf ppo` or `grpo` does after its first update, unless its"
            " keep_rollouts or keep_samples is 0"
        )
    if update is not None and update not in kept:
        raise ValueError(
            f"{run} keeps the rollouts of update {', '.join(map(str, kept))}, not of {update}; keep_rollouts says of"
            " how many"
        )
    return kept[max(kept) if update is None else update]


def summed_kl(row: Inspected) -> float:
    """Nats of the whole response, logprob - reference logprob summed over its tokens."""
    return float((row.numbers["logprobs"] - row.numbers["ref_logprobs"]).double().sum())


def column(row: Inspected, name: str) -> Sequence[float] | None:
    """Numbers of each token, by the names of NUMBERS or "kl"; None where there are none."""
    if name == "kl":
        return (row.numbers["logprobs"] - row.numbers["ref_logprobs"]).tolist()
    return row.numbers[name].tolist() if name in row.numbers else None
