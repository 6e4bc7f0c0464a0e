"""Rejection-sampling fine-tuning: sample several responses, keep the one a judge likes best, learn it; again.

    sample: n responses to each prompt, from the policy as it is    (`best_of_n`)
    keep:   the best of each, where the judge told them apart
    learn:  next-token loss on the kept responses alone             (`training.supervised.fit`)

Touvron et al., "Llama 2", https://arxiv.org/abs/2307.09288; Dong et al., "RAFT", https://arxiv.org/abs/2304.06767
No reference holds the policy back: the bound of best of n, log n - (n - 1) / n nats a round, is all there is.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from palm_rlhf_pytorch.palm.copying import move_together
from palm_rlhf_pytorch.palm.generation import generate_responses
from palm_rlhf_pytorch.palm.inputs import check_length
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.arguments import check_judge
from palm_rlhf_pytorch.policy.best_of_n import Best, best_of_n
from palm_rlhf_pytorch.policy.direct_data import TokenTexts
from palm_rlhf_pytorch.policy.direct_model import DirectPolicy, Figures, check_whole, digest_of
from palm_rlhf_pytorch.policy.direct_settings import settings_from
from palm_rlhf_pytorch.policy.direct_steps import Steps
from palm_rlhf_pytorch.policy.judging import Judge
from palm_rlhf_pytorch.policy.kept import Kept, KeptExamples, read_kept
from palm_rlhf_pytorch.policy.prompts import prompts_from
from palm_rlhf_pytorch.training.checkpoint import Checkpoints
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.optimizers import OptimizerFactory
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.saves import Saves, clear
from palm_rlhf_pytorch.training.supervised import fit
from palm_rlhf_pytorch.training.trackers import tracked_accelerator
from palm_rlhf_pytorch.typecheck import typecheck


def response_loss(logprobs: Tensor, lengths: Tensor) -> tuple[Tensor, Figures]:
    """Next-token loss (nats) averaged over the tokens of responses, from sums (b,) and lengths (b,)."""
    tokens = lengths.sum()
    loss = -logprobs.sum() / tokens
    return loss, {"loss": (loss, tokens)}


class RejectionTrainer:
    """Improves a PaLM by its own best responses; the `palm` given stays as it is, see `export_palm()`."""

    @typecheck
    def __init__(
        self,
        *,
        palm: PaLM,
        reward_model: Judge,
        prompt_token_ids: Tensor | Sequence[Any] | None = None,
        prompts: Sequence[str] | None = None,
        prompts_path: str | Path | None = None,
        tokenizer: object | None = None,
        num_samples: int = 8,
        min_score: float | None = None,
        max_batch_size: int = 64,
        seed: int = 0,
        run_dir: str | Path | None = None,
        accelerate_kwargs: Mapping[str, Any] | None = None,
        optimizer: OptimizerFactory | None = None,
        log_with: object | None = None,
        **settings: Any,
    ) -> None:
        """Prepare training; nothing is sampled yet.

        Args:
            palm: a causal PaLM, the start of the policy; its scopes are left out.
            reward_model: a judge, as RLHFTrainer takes it.
            prompt_token_ids: prompts as ids, (m, p), or a list of 1-D tensors; or give `prompts` or `prompts_path`.
            prompts: prompts as text, with `tokenizer`.
            prompts_path: a UTF-8 file of prompts, one a line, with `tokenizer`.
            tokenizer: any callable from text to ids.
            num_samples: n, responses to each prompt, 2 at least.
            min_score: best responses that score less are not kept; None keeps the best whatever it scores. For a judge
                that says right or wrong, 1.
            max_batch_size: responses sampled together.
            seed: of adapter, order and sampling; 0 or above.
            run_dir: folder of the run: metrics.jsonl, a line for each round, and a folder for each round.
            accelerate_kwargs: passed to accelerate.Accelerator.
            optimizer: makes one of parameter groups, each with its lr and weight_decay, in place of fused AdamW.
            log_with: see RLHFTrainer; trackers get the line of each round.
            **settings: the fields of DirectSettings.

        Raises:
            TypeError: if an argument or a setting is unknown or of the wrong type.
            ValueError: if prompts, models or a number do not fit.
        """
        if num_samples < 2:
            raise ValueError(f"num_samples ({num_samples}) must be at least 2: of one response none is the better")
        if min_score is not None and not math.isfinite(min_score):
            raise ValueError(f"min_score ({min_score}) must be finite, or None")
        if seed < 0:
            raise ValueError(f"seed ({seed}) must be 0 or above")
        self.settings = settings_from(settings, trainer="RejectionTrainer")
        check_judge(reward_model, palm)
        self.prompts = prompts_from(
            num_tokens=palm.num_tokens, seed=seed, prompt_token_ids=prompt_token_ids, prompts=prompts,
            prompts_path=prompts_path, tokenizer=tokenizer,
        )  # fmt: skip
        self.judge, self.seed, self.max_batch_size = reward_model, seed, max_batch_size
        self.optimizer = optimizer
        self.num_samples, self.min_score = num_samples, min_score
        self.accelerator, self.trackers = tracked_accelerator(accelerate_kwargs, log_with, folder=run_dir)
        check_whole(self.accelerator)
        self.ranks = Ranks(self.accelerator)
        generator = torch.Generator().manual_seed(seed)
        self.policy = DirectPolicy(palm, response_loss, generator=generator, **self.settings.hat())
        judges = [reward_model] if isinstance(reward_model, nn.Module) else []
        move_together(self.policy, *judges, device=self.accelerator.device)
        self.folder = None if run_dir is None else Path(run_dir).resolve()
        metrics = None if self.folder is None else self.folder / "metrics.jsonl"
        self.metrics = MetricsLog(metrics, accelerator=self.accelerator)
        self._trunk = digest_of(self.policy.palm)
        self.stopped: str | None = None

    @typecheck
    def train(
        self,
        num_rounds: int = 4,
        *,
        prompts_per_round: int = 64,
        num_epochs: int = 1,
        max_new_tokens: int = 128,
        eos_token: int | None = None,
        temperature: float = 1.0,
        resume: Literal["auto"] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, float]]:
        """Sample, keep and learn, num_rounds times.

        With a `run_dir`, SIGTERM and Ctrl-C while learning end the call with all state saved; a round that was still
        sampling is sampled again, to the same responses. A run that goes on ends with the bits of one never stopped.

        Args:
            num_rounds: rounds in all; those before a resume count.
            prompts_per_round: prompts of a round, over all processes; each comes once before any comes again.
            num_epochs: passes over a round's kept responses.
            max_new_tokens: tokens of a response at most.
            eos_token: id that ends a response.
            temperature: of sampling, above 0.
            resume: "auto" goes on in run_dir, or begins if it holds no run.
            use_tqdm: show progress (main process only).

        Returns:
            The figures of each round of this call, `rejection/...`.

        Raises:
            ValueError: if a number is out of range, run_dir holds a run that is not resumed or does not fit, or the
                first round keeps no response.

        Warns:
            UserWarning: if a later round keeps none: all responses score alike, and the call ends there.
        """
        sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "eos_token": eos_token,
            "temperature": temperature,
        }
        self._check(num_rounds, prompts_per_round, num_epochs, **sampling)
        first = self._first_round(resume)
        if first > num_rounds:
            raise ValueError(f"num_rounds ({num_rounds}) is less than the {first} rounds that run_dir holds")
        told = f"palm {self._trunk[:16]}, prompts {self.prompts.digest()[:16]}, {prompts_per_round} a round, seed "
        told += f"{self.seed}, best of {self.num_samples}, min_score {self.min_score}, {sampling}"
        self.metrics.rewind(first - 1)
        self.stopped = None
        history: list[dict[str, float]] = []
        with self.trackers.running(self._configuration | sampling, step=first - 1):
            for number in range(first, num_rounds + 1):
                kept = self._kept(number, prompts_per_round, sampling, told, use_tqdm=use_tqdm)
                if len(kept.examples) == 0:
                    self._end_without_choice(number, kept.figures["rejection/score"])
                    break
                found, self.stopped = self._learn(number, kept, num_epochs, told, use_tqdm=use_tqdm)
                if self.stopped is not None:
                    break
                history.append(kept.figures | {"rejection/loss": found["train/loss"]})
                self.metrics.log(history[-1], number)
                self._forget(number - 1)
        return history

    def export_palm(self) -> PaLM:
        """The improved PaLM: a model of its own, the update merged into its weights, in eval mode."""
        return self.policy.export_palm()

    @property
    def _configuration(self) -> dict[str, Any]:
        """What the run is, for trackers."""
        own = {"trainer": type(self).__name__, "seed": self.seed, "num_samples": self.num_samples}
        own |= {"min_score": self.min_score, **asdict(self.settings), "palm": self.policy.palm.config}
        return own | {"processes": self.ranks.count}

    # a round

    def sample(self, number: int, count: int, **sampling: Any) -> Best:
        """This process's share of a round: the best response to each of its prompts, from the policy as it is.

        Args:
            number: of the round, from 1.
            count: prompts, over all processes.
            **sampling: max_new_tokens, eos_token, temperature, on_step.
        """
        share = -(-count // self.ranks.count)
        self.prompts.taken = (number - 1) * share * self.ranks.count
        rows = self.prompts.next_share(count, self.ranks.rank, of=self.ranks.count)
        ids, mask = (part.to(self.accelerator.device) for part in self.prompts.select(rows))
        state = np.random.SeedSequence([self.seed, number, self.ranks.rank]).generate_state(1, np.uint64)
        generator = torch.Generator(self.accelerator.device).manual_seed(int(state[0] >> 1))
        hat, trunk = self.policy.hat, self.policy.palm
        with self.accelerator.autocast():
            return best_of_n(
                partial(generate_responses, hat.model(trunk), adapter=hat.adapter), self.judge, ids, mask,
                num_samples=self.num_samples, max_batch_size=self.max_batch_size,
                max_batch_tokens=self.settings.max_batch_tokens, generator=generator, **sampling,
            )  # fmt: skip

    def _kept(self, number: int, count: int, sampling: Mapping[str, Any], told: str, *, use_tqdm: bool) -> Kept:
        """What a round learns from: from its file where it was sampled before, else sampled, and written there."""
        path = None if self.folder is None else self._round(number) / "kept.safetensors"
        with self.ranks.together():
            before = None if path is None or not path.exists() else read_kept(path, told=told)
        if not self.ranks.any(before is None) and before is not None:
            return before
        show = use_tqdm and self.accelerator.is_main_process
        with tqdm(disable=not show, desc=f"round {number}: sample", unit="token") as bar, self.ranks.together():
            best = self.sample(number, count, **sampling, on_step=bar.update)
        texts, figures = self._chosen(number, best)
        kept = Kept(KeptExamples(texts), figures)
        with self.ranks.together():
            if path is not None and len(texts) and self.accelerator.is_main_process:
                kept.save(path, told=told)
        return kept

    def _chosen(self, number: int, best: Best) -> tuple[TokenTexts, dict[str, float]]:
        """The best responses that are worth learning, of all processes, and the round's figures."""
        finite = best.all_scores.isfinite()
        lowest = best.all_scores.masked_fill(~finite, torch.inf).amin(dim=-1)
        worth = best.scores > lowest  # where all score alike, none was chosen
        if self.min_score is not None:
            worth &= best.scores >= self.min_score
        ids = [row[real].tolist() for row, real in zip(best.sequences[worth], best.mask[worth], strict=True)]
        everything = self.ranks.gather_values((ids, best.prompt_lengths[worth].tolist()))
        own = torch.tensor([best.all_scores[finite].sum(), finite.sum(), best.scores.sum(), len(best.scores)])
        total, count, total_best, prompts = self.ranks.sum(own).tolist()
        texts = TokenTexts(
            [torch.tensor(row) for rows, _ in everything for row in rows], [n for _, rows in everything for n in rows]
        )
        figures = {"score": total / max(count, 1), "best_score": total_best / prompts, "kept": float(len(texts))}
        return texts, {f"rejection/{name}": value for name, value in figures.items()}

    def _end_without_choice(self, number: int, score: float) -> None:
        """A round that keeps nothing is a fault in the first, and in a later one the end of what can be learnt so."""
        least = "" if self.min_score is None else f" and give one min_score ({self.min_score})"
        found = (
            f"round {number} keeps no response: to none of its prompts did the judge tell responses apart{least}; the"
            f" mean score is {score:.3g}"
        )
        if number == 1:
            raise ValueError(f"{found}: more samples, easier prompts or another judge would do")
        if self.accelerator.is_main_process:
            warnings.warn(f"{found}; the run ends here", stacklevel=4)

    def _learn(
        self, number: int, kept: Kept, num_epochs: int, told: str, *, use_tqdm: bool
    ) -> tuple[dict[str, float], str | None]:
        """Fit the policy to a round's responses; its last figures, and the signal that stopped it, if one did."""
        settings, examples = self.settings, kept.examples
        steps = Steps(
            examples, num_steps=num_epochs * -(-len(examples) // settings.minibatch_size), seed=self.seed + number,
            minibatch_size=settings.minibatch_size, max_batch_tokens=settings.max_batch_tokens, ranks=self.ranks,
        )  # fmt: skip
        saves, log = None, None
        if self.folder is not None:
            checkpoints = self._checkpoints(number)
            data = f"round {number} {examples.digest()[:16]}, {told}, minibatch_size {settings.minibatch_size}"
            saves = Saves(checkpoints, every=settings.save_every, resume=True, data=data)
            path = self._round(number) / "metrics.jsonl"
            log = MetricsLog(path, accelerator=self.accelerator, tracked=False)  # its steps begin anew in each round
        found = fit(
            self.policy, _batches(examples, steps), num_steps=steps.num_steps, accumulate=steps.accumulate,
            lr=settings.lr, weight_decay=settings.weight_decay, warmup_steps=int(settings.warmup * steps.num_steps),
            max_norm=settings.max_norm, accelerator=self.accelerator, metrics=log, progress=use_tqdm,
            description=f"round {number}: learn", saves=saves, optimizer=self.optimizer,
        )  # fmt: skip
        return found, None if saves is None else saves.stopped

    # files

    def _round(self, number: int) -> Path:
        assert self.folder is not None, "without run_dir there are no files"
        return self.folder / "rounds" / f"round-{number:08d}"

    def _checkpoints(self, number: int) -> Checkpoints:
        return Checkpoints(self._round(number) / "checkpoints", keep_last=1, accelerator=self.accelerator)

    def _first_round(self, resume: str | None) -> int:
        """Where to begin: the last round that has a checkpoint, which brings the policy's weights."""
        if self.folder is None:
            if resume is not None:
                raise ValueError("resume='auto' looks into run_dir: give the trainer one")
            return 1
        numbers = sorted(int(path.name.removeprefix("round-")) for path in self.folder.glob("rounds/round-*"))
        if numbers and resume is None:
            raise ValueError(
                f"run_dir ({self.folder}) holds a run already: resume='auto' goes on with it, another folder begins"
                " anew"
            )
        return max((number for number in numbers if self._checkpoints(number).steps()), default=1)

    def _forget(self, number: int) -> None:
        """Remove the checkpoints of a round that a later one has made needless."""
        if self.folder is not None and number >= 1 and self.accelerator.is_main_process:
            clear(Checkpoints(self._round(number) / "checkpoints"))

    def _check(
        self, num_rounds: int, prompts_per_round: int, num_epochs: int, *, max_new_tokens: int, eos_token: int | None,
        temperature: float,
    ) -> None:  # fmt: skip
        counts = {
            "num_rounds": num_rounds, "prompts_per_round": prompts_per_round, "num_epochs": num_epochs,
            "max_new_tokens": max_new_tokens,
        }  # fmt: skip
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} ({count}) must be at least 1")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature ({temperature}) must be above 0: greedy responses are all alike")
        palm = self.policy.palm
        if eos_token is not None and not 0 <= eos_token < palm.num_tokens:
            raise ValueError(f"eos_token ({eos_token}) must be from 0 to {palm.num_tokens - 1}, or None")
        check_length(int(self.prompts.lengths.max()) + max_new_tokens, palm.max_length, name="a prompt with a response")


def _batches(examples: KeptExamples, steps: Steps) -> Iterator[dict[str, Any]]:
    for _, passes in steps:
        for rows, share in passes:
            yield examples.texts.batch(rows) | {"share": share}
