"""The plan of a run: memory and time of each phase, told before the run from one real piece of each."""

import copy
from typing import NamedTuple

from torch import nn

from palm_rlhf_pytorch.policy.arguments import check_train_arguments
from palm_rlhf_pytorch.policy.footprint import device_bytes_of, memory_in_use
from palm_rlhf_pytorch.policy.pieces import Phase, Pieces, Text, Texts, Trainer, left_as_found, trained_by
from palm_rlhf_pytorch.policy.records import CRC, FILE_START, MARKER, NUMBERS, RECORD_START, SCORES_HEADER

UPDATES = 64  # whose passes are counted; in a longer run they stand for the others
SHORT, FURTHER = 16, 64  # response tokens of the passes whose bytes are compared
# of experience on disk: a prompt's token, a response's, a response with its score beside that, a process's two files
PROMPT_BYTES, RESPONSE_BYTES = 4, 4 + 4 * len(NUMBERS)
ROW_BYTES, FILES_BYTES = RECORD_START + MARKER.size + 4, FILE_START + SCORES_HEADER.size + CRC.size


class Plan(NamedTuple):
    """What a run will take, in each process.

    phases: "models" (weights, adapters and the moments of AdamW, whatever `optimizer=` makes; no time), "generate",
        "observe" (old and reference log-probabilities, values), "score" (by both judges, if there are two) and "learn"
        (its bytes hold the gradients too; its time that of reading old responses anew, if such are learnt from).
    updates: of the run. seconds_per_update: of a whole one, on average; seconds: of the run.
    peak_bytes: most memory: of the whole process on a CPU, of tensors on a CUDA device.
    device_bytes: what the device has for this process; 0 where that cannot be asked.
    disk_bytes: experience of an update, of all processes; that of `keep_experience` updates stays.
    """

    phases: list[Phase]
    updates: int
    seconds_per_update: float
    seconds: float
    peak_bytes: int
    device_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The plan as a few lines of text."""
        cells = [("phase", "memory", "time an update")]
        cells += [(name, _size(held), _duration(spent) if spent else "") for name, held, spent in self.phases]
        fits = f" of {_size(self.device_bytes)}" if self.device_bytes else ""
        if 0 < self.device_bytes < self.peak_bytes:
            fits += ": it does not fit; lower max_batch_tokens, max_batch_size or max_seq_len"
        lines = [f"{name:<10}{held:>10}{spent:>17}".rstrip() for name, held, spent in cells]
        lines.append(f"peak memory: {_size(self.peak_bytes)}{fits}")
        lines.append(f"time: {_duration(self.seconds)}, {self.updates:,} x {_duration(self.seconds_per_update)}")
        return "\n".join([*lines, f"experience on disk: {_size(self.disk_bytes)} an update"])


def plan(
    trainer: Trainer,
    num_episodes: int = 50_000,
    *,
    max_seq_len: int = 2048,
    max_new_tokens: int | None = None,
    eos_token: int | None = None,
    temperature: float = 1.0,
    update_timesteps: int = 64,
) -> Plan:
    """Memory and time of a run of `train`, arguments as there; every process must call it.

    The judges are called with responses of random tokens. Where groups that teach nothing are sampled again, time and
    disk are those of one round: how many it takes, the judge alone knows. Only the phases are timed, not the little
    between them.

    Raises:
        ValueError: if `train` would refuse the arguments.
    """
    prompts, device = trainer.prompts, trainer.accelerator.device
    check_train_arguments(
        prompts, trainer.settings, palm=trainer.actor_critic.palm, num_episodes=num_episodes, max_seq_len=max_seq_len,
        max_new_tokens=max_new_tokens, eos_token=eos_token, temperature=temperature, update_timesteps=update_timesteps,
    )  # fmt: skip
    size = min(update_timesteps, num_episodes)
    updates, room = -(-num_episodes // size), max_new_tokens or max_seq_len
    texts = [Text(row, p, min(max_seq_len - p, room)) for row, p in enumerate(prompts.lengths.tolist())]
    order = copy.copy(prompts)  # which counts for itself what it hands out
    repeats = trainer.settings.responses_per_prompt
    drawn = [order.next_rows(-(-size // repeats)).repeat_interleave(repeats) for _ in range(min(updates, UPDATES))]
    upcoming = [[texts[row] for row in rows.tolist()] for rows in drawn]
    before, most = memory_in_use(device)
    with left_as_found(trainer):
        pieces = Pieces(trainer, texts, upcoming, temperature)
        phases = pieces.phases()
    after = memory_in_use(device)[1]
    weights, moments, to_come = _models(trainer)
    # where the process was larger before, its size between operators must do
    passing = max(phase.bytes for phase in phases)
    resident = max(max(before, weights) + passing, after if after > most else pieces.live.resident)
    seconds = sum(phase.seconds for phase in phases)
    return Plan(
        phases=[Phase("models", weights + moments, 0.0), *phases],
        updates=updates,
        seconds_per_update=seconds,
        seconds=seconds * num_episodes / size,
        peak_bytes=resident + to_come,
        device_bytes=device_bytes_of(device),
        disk_bytes=max(map(_stored, upcoming)) + FILES_BYTES * trainer.accelerator.num_processes,
    )


def memory_to_learn(
    trainer: Trainer, *, max_seq_len: int = 2048, max_new_tokens: int | None = None, temperature: float = 1.0
) -> tuple[float, float]:
    """Bytes that the largest step of a run needs, roughly, and those there are: from two short passes, a second or two.

    What a pass of learning holds is taken to grow evenly with its tokens; the cache of generating is counted exactly.

    Args:
        trainer: as for `plan`.
        max_seq_len: as in `train`, as for max_new_tokens.
        max_new_tokens: likewise.
        temperature: likewise.

    Returns:
        Bytes of the whole process on a CPU, of tensors on a CUDA device; and the device's, 0 where not known.
    """
    settings, palm, device = trainer.settings, trainer.actor_critic.palm, trainer.accelerator.device
    longest = int(trainer.prompts.lengths.max())
    longest = min(max_seq_len, longest + (max_new_tokens or max_seq_len))
    rows = min(settings.max_batch_size, settings.minibatch_size)
    tokens = max(longest, min(settings.max_batch_tokens, rows * longest))
    row = int(trainer.prompts.lengths.argmin())
    prompt = min(SHORT, int(trainer.prompts.lengths[row]))
    short, long = ([Text(row, prompt, answer)] for answer in (SHORT, SHORT + FURTHER))
    with left_as_found(trainer):
        pieces = Pieces(trainer, short + long, [short], temperature)
        pieces.learning_bytes(short)  # which makes the gradients
        first, second = pieces.learning_bytes(short), pieces.learning_bytes(long)
    learning = second + (second - first) / FURTHER * max(0, tokens - prompt - SHORT - FURTHER)
    size = palm.token_emb.weight.element_size()
    cache = 2 * settings.max_batch_size * longest * palm.config["dim_head"] * palm.depth * size
    _, _, to_come = _models(trainer)
    return memory_in_use(device)[0] + to_come + max(learning, cache), device_bytes_of(device)


def _models(trainer: Trainer) -> tuple[int, int, int]:
    """Bytes of all weights, of the optimizer's two moments, and of those it has yet to make."""
    parts = (trainer.actor_critic, trainer.reward_model, trainer.held_out_judge)
    modules = [part for part in parts if isinstance(part, nn.Module)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    new = [parameter.nbytes for parameter in trained_by(trainer) if not trainer.learner.optimizer.state.get(parameter)]
    return sum(storages.values()), 2 * sum(parameter.nbytes for parameter in trained_by(trainer)), 2 * sum(new)


def _stored(update: Texts) -> int:
    """Bytes of the records of an update, and of their scores."""
    return sum(ROW_BYTES + PROMPT_BYTES * text.prompt + RESPONSE_BYTES * text.response for text in update)


def _size(count: int) -> str:
    unit = min(3, (len(str(count)) - 1) // 3)
    return f"{count / 1000**unit:.3g} {('B', 'kB', 'MB', 'GB')[unit]}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
