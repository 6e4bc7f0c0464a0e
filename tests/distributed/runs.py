"""What the processes of these tests do: small trainers, faults on one rank, and what is left to compare."""

import hashlib
import os
import signal
import time
import warnings
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.policy.rollout_file import RolloutFile

PROMPTS = [torch.tensor(ids) for ids in ([3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5], [8, 9, 7, 9])]
EOS = 2


def count_sevens(sequences, *, prompt_mask, mask):
    """A judge."""
    return ((sequences == 7) & mask & ~prompt_mask).sum(dim=-1).float() - 0.1 * mask.sum(dim=-1)


def make_trainer(*, reward_model=count_sevens, palm_options=None, kind=RLHFTrainer, **options):
    """A trainer over a tiny palm, the same in every process."""
    torch.manual_seed(0)
    sizes = {"num_tokens": 13, "dim": 12, "depth": 2, "dim_head": 6, "heads": 3, "ff_mult": 2}
    palm = PaLM(**sizes, **(palm_options or {}))
    torch.nn.init.normal_(palm.token_emb.weight, std=0.4)
    settings = {"prompt_token_ids": PROMPTS, "actor_lr": 1e-3, "accelerate_kwargs": {"cpu": True}}
    settings |= {"critic_lr": 1e-3} if kind is RLHFTrainer else {}
    return kind(palm=palm, reward_model=reward_model, **{**settings, **options})


def rank():
    """Of this process."""
    return int(os.environ.get("RANK", 0))


def trained(trainer):
    """All trained weights, whole."""
    with trainer.learner.whole():
        learner = trainer.learner
        return {name: weight.detach().clone() for name, weight in (learner.actor | learner.critic).items()}


def digest(tensors):
    """SHA-256 of tensors by name."""
    value = hashlib.sha256()
    for name in sorted(tensors):
        value.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return value.hexdigest()


def without_time(metrics):
    """Metrics that do not depend on the clock."""
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def sampled(folder, *, rows=14):
    """A rollout with scores, one of them missing, its critic and actor already off the reference."""
    trainer = make_trainer(seed=3)
    batch = trainer.next_prompts(rows)
    rollout = trainer.rollout(batch.ids, batch.mask, batch.rows, max_seq_len=19, eos_token=EOS)
    generator = torch.Generator().manual_seed(5)
    noise = 0.3 * torch.randn(2, *rollout.logprobs.shape, generator=generator) * rollout.response_mask
    scores = trainer.score(rollout).scores
    scores[3] = torch.nan
    return rollout._replace(values=noise[0], ref_logprobs=rollout.logprobs + noise[1], scores=scores)._asdict()


def learnt(folder, *, rollout, alone=False, broken=False, **options):
    """Six epochs on this rank's share of the rows, every other one, all in one optimizer step unless options say else.

    Args:
        folder: not used.
        rollout: all rows, with scores.
        alone: leave out the others' gradients.
        broken: the last rank's second backward pass gives NaN.
        **options: of the trainer.

    Returns:
        A digest of the weights after each step, the weights at last, the metrics, how often the model's forward and
        backward were called, and what share of the trained numbers this process holds.
    """
    settings = {"minibatch_size": 64, "epochs": 6, "max_batch_tokens": 36, "max_dropped": 0.2}
    trainer = make_trainer(seed=4, **{**settings, **options})
    mine = torch.arange(rank(), len(rollout["lengths"]), trainer.ranks.count)
    if alone:
        trainer.learner.model = trainer.actor_critic  # not DDP's wrapper
    rollout = Rollout(**rollout).select(mine)
    calls = {"forward": 0, "backward": 0}
    trainer.learner.model.register_forward_hook(lambda *_: _count(calls, "forward"))
    backward = trainer.accelerator.backward

    def counted_backward(loss):
        _count(calls, "backward")
        backward(loss * torch.nan if broken and rank() == 1 and calls["backward"] == 2 else loss)

    trainer.accelerator.backward = counted_backward
    steps = []
    metrics = trainer.learn_from(
        rollout, num_fresh=len(mine), on_step=lambda progress: steps.append(digest(trained(trainer)))
    )
    learner = trainer.learner
    held = sum(_local(weight).numel() for weight in [*learner.actor.values(), *learner.critic.values()])
    return {
        "steps": steps, "weights": trained(trainer), "metrics": metrics, "calls": calls,
        "held": held / sum(weight.numel() for weight in trained(trainer).values()),
    }  # fmt: skip


def _count(calls, name):
    calls[name] += 1


def _local(weight):
    return weight.to_local() if isinstance(weight, DTensor) else weight.detach()


CALL = {"max_seq_len": 17, "eos_token": EOS, "update_timesteps": 10}
RUN = {
    "minibatch_size": 6, "epochs": 2, "max_batch_size": 4, "max_batch_tokens": 40, "save_rollouts": True,
    "save_every_steps": 2, "keep_experience": 8, "keep_last": 12, "judge_timeout": 3.0, "max_dropped": 0.3,
}  # fmt: skip


def trained_run(
    folder, *, run_dir, num_episodes=30, judge=count_sevens, preflight=False, use_tqdm=False, resume=None, **options
):
    """A whole run, or what a checkpoint left of it: its weights, metrics and warnings, and how it ended."""
    trainer = make_trainer(reward_model=judge, run_dir=run_dir, **{**RUN, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            history = trainer.train(num_episodes, resume=resume, preflight=preflight, use_tqdm=use_tqdm, **CALL)
            error = None
        except Exception as raised:
            history, error = [], f"{type(raised).__name__}: {raised}"
    return {
        "weights": digest(trained(trainer)), "history": [without_time(line) for line in history], "error": error,
        "stopped": trainer.stopped, "updates": trainer.updates, "warned": [str(warning.message) for warning in caught],
        "steps": trainer.learner.steps,
    }  # fmt: skip


def run_twice(folder, *, run_dir):
    """The same run two times, the first time with all that is shown; and answers to one prompt."""
    runs = [
        trained_run(folder, run_dir=f"{run_dir}-{number}", preflight=number == 0, use_tqdm=number == 0)
        for number in range(2)
    ]
    trainer = make_trainer(prompt_token_ids=PROMPTS[:1])
    batch = trainer.next_prompts(8)
    return runs, trainer.rollout(batch.ids, batch.mask, max_seq_len=17).sequences.tolist()


def run_and_resume(folder, *, run_dir, fault, **options):
    """A run that goes wrong on one rank, and the rest of it, all well again."""
    if fault == "disk":
        append = RolloutFile.append
        RolloutFile.append = _append_on_a_full_disk
        ended = trained_run(folder, run_dir=run_dir, **options)
        RolloutFile.append = append
    else:
        ended = trained_run(folder, run_dir=run_dir, judge=OnOneRank(fault), **options)
    return ended, trained_run(folder, run_dir=run_dir, resume="auto", **options)


def _append_on_a_full_disk(file, rollout, append=RolloutFile.append):
    if rank() == 1 and "update-00000001" in file.path.name:
        raise OSError("no space left")
    append(file, rollout)


class OnOneRank:
    """A judge that does something else on the last rank, in its second update."""

    def __init__(self, fault):
        self.fault, self.rows = fault, 0

    def __call__(self, sequences, *, prompt_mask, mask):
        scores = count_sevens(sequences, prompt_mask=prompt_mask, mask=mask)
        judged_before, self.rows = self.rows, self.rows + len(sequences)
        if rank() == 0 or judged_before < SHARE or (self.fault == "sigterm" and judged_before > SHARE):
            return scores  # a second SIGTERM would be obeyed at once
        return FAULTS[self.fault](scores)


SHARE = CALL["update_timesteps"] // 2  # rows that a rank judges in an update


def _raise(scores):
    raise OSError("the judge's server is gone")


def _hang(scores):
    time.sleep(60)
    return scores


def _terminate(scores):
    os.kill(os.getpid(), signal.SIGTERM)
    return scores


FAULTS = {"raises": _raise, "hangs": _hang, "nan": lambda scores: scores * torch.nan, "sigterm": _terminate}


def sharded_run(folder, *, run_dir, palm_options=None, **options):
    """Two updates that also learn from older responses, an answer, the whole model, and a checkpoint of it all."""
    trainer = make_trainer(run_dir=run_dir, palm_options=palm_options, max_staleness=1, **{**RUN, **options})
    history = trainer.train(20, use_tqdm=False, **CALL)
    outside = [weight.isnan().all().item() for weight in trainer.actor_critic.parameters()]
    answer = trainer.generate(17, PROMPTS[0], num_samples=3, eos_token=EOS)
    saved = Path(run_dir) / "saved"
    trainer.save(saved)
    try:
        trainer.plan(20, **CALL)
        refused = None
    except ValueError as error:
        refused = str(error)
    return {
        "history": [without_time(line) for line in history], "weights": digest(trained(trainer)),
        "model": digest(dict(trainer.export_palm().named_parameters())), "answer": answer.tolist(),
        "sharded": [type(weight).__name__ for weight in trainer.learner.actor.values()], "empty": outside,
        "refused": refused,
    }  # fmt: skip


def taken_up(folder, *, saved, palm_options=None, **options):
    """One process that takes up a checkpoint, and goes on with it."""
    trainer = make_trainer(palm_options=palm_options, max_staleness=1, **{**RUN, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.load(saved)
    found = {"weights": digest(trained(trainer)), "model": digest(dict(trainer.export_palm().named_parameters()))}
    steps = trainer.learner.steps
    history = trainer.train(10, use_tqdm=False, **CALL)
    return found | {"steps": trainer.learner.steps - steps, "history": history}
