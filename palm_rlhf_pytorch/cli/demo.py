"""`palm-rlhf demo`: the whole of RLHF, on text that is on every machine, in about six minutes on two cores.

1 pretrain a byte-level PaLM on the documentation of the Python installation
2 sample pairs of responses, let a gold judge label them, train a reward model on the labels
3 PPO against the reward model
4 compare before and after, on prompts that no stage has seen
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from palm_rlhf_pytorch.cli.demo_pairs import pair_accuracy, pair_batches, sample_pairs, split_pairs
from palm_rlhf_pytorch.cli.demo_report import Sampled, print_report, sample_responses, summarize, write_json
from palm_rlhf_pytorch.cli.demo_text import DemoText, demo_text, gold_score, prompts_of
from palm_rlhf_pytorch.cli.device import add_device_argument, device_of
from palm_rlhf_pytorch.cli.pretrain import bits_per_byte
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.datasets import TokenStream
from palm_rlhf_pytorch.text.pydocs import python_documentation
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.supervised import fit

TOKENIZER = ByteTokenizer()
METRICS = ("pretrain.jsonl", "reward.jsonl", "metrics.jsonl")


@dataclass(frozen=True)
class Plan:
    """Sizes of the four stages; the defaults fill about six minutes on two cores."""

    max_bytes: int = 2_000_000
    held_out: float = 0.25
    dim: int = 128
    depth: int = 4
    heads: int = 4
    dim_head: int = 32
    length: int = 128
    batch_size: int = 32
    pretrain_steps: int = 600
    pretrain_lr: float = 3e-3
    num_eval_prompts: int = 512
    num_pairs: int = 1200
    held_out_pairs: int = 256
    reward_epochs: int = 2
    reward_batch_size: int = 32
    reward_lr: float = 1e-3
    max_new_tokens: int = 64
    ppo_episodes: int = 3_072
    ppo_update: int = 128

    def quick(self) -> "Plan":
        """The same in under a minute: it shows that everything runs, not how well."""
        return replace(
            self, max_bytes=200_000, dim=64, depth=2, heads=2, length=64, batch_size=16, pretrain_steps=60,
            num_eval_prompts=256, num_pairs=160, held_out_pairs=48, max_new_tokens=24, ppo_episodes=192, ppo_update=64,
        )  # fmt: skip


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "demo",
        help="the whole of RLHF on the documentation of your Python installation, about six minutes",
        description=(
            "Pretrain a small PaLM on the documentation of this Python installation, train a reward model on labelled "
            "pairs of its responses, improve it with PPO, and compare before and after. Nothing is downloaded."
        ),
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("palm-demo"), metavar="FOLDER", help="what is written (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: shows that all runs, not how well")
    add_device_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the four stages."""
    started = time.perf_counter()
    device, plan, out = device_of(args), Plan().quick() if args.quick else Plan(), args.out
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: a seed is a whole number from 0 to {2**63 - 1}")
    prepare_folder(out, plan, seed=args.seed)
    torch.manual_seed(args.seed)

    text = demo_text(python_documentation(max_bytes=plan.max_bytes), held_out=plan.held_out, seed=args.seed)
    prompts = split_prompts(text, plan, seed=args.seed)
    print(
        f"text: {len(text.train)} documents to train on, {len(text.held_out)} held out, {len(text.words)} known words;"
        f" {len(prompts.learn)} prompts to learn from, {len(prompts.test)} to compare on"
    )
    palm, bpb = pretrain(text, plan, device=device, seed=args.seed, out=out)
    reward_model, accuracy = train_reward_model(palm, text, prompts.learn, plan, seed=args.seed, out=out)
    print(f"3/4 ppo: {plan.ppo_episodes} responses, learnt from {plan.ppo_update} at a time")
    improved = improve(palm, reward_model, prompts.learn, plan, seed=args.seed, out=out)
    print("4/4 compare: sampling before and after")
    before, after = (
        _judged(model, reward_model, palm, text, prompts.test, plan, seed=args.seed) for model in (palm, improved)
    )
    summary = summarize(before, after, rm_accuracy=accuracy, bits_per_byte=bpb, seed=args.seed)
    print_report(prompts.test, before, after, summary)
    write_json(out / "summary.json", summary)
    files = ("palm.pt", "reward_model.pt", "improved_palm.pt", "metrics.jsonl", "summary.json")
    print(f"{time.perf_counter() - started:.0f} seconds; in {out}: {', '.join(files)}")
    print(f'try: palm-rlhf generate {out / "improved_palm.pt"} "Return the " --max-new-tokens 64')
    return 0


def prepare_folder(out: Path, plan: Plan, *, seed: int) -> None:
    """Make the folder, or clear an earlier demo out of it, and write down the settings of this run.

    Raises:
        ValueError: if it holds files that no demo has written.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = out / "settings.json"
    if any(out.iterdir()) and not settings.exists():
        raise ValueError(f"--out {out} is in use: it holds files, but none of an earlier demo; name another folder")
    for name in METRICS:
        (out / name).unlink(missing_ok=True)
    write_json(settings, {"seed": seed, **asdict(plan)})


class PromptSplit(NamedTuple):
    """Beginnings of held-out paragraphs: to sample pairs and learn from, and to compare on."""

    learn: list[str]
    test: list[str]


def split_prompts(text: DemoText, plan: Plan, *, seed: int) -> PromptSplit:
    """Prompts from held-out paragraphs, those to compare on kept apart."""
    prompts = prompts_of(text.held_out, shortest=12, longest=32, seed=seed)
    if len(prompts) < plan.num_eval_prompts + 64:
        raise ValueError(
            f"the documentation of this Python installation gives {len(prompts)} prompts, too few for"
            f" {plan.num_eval_prompts} to compare on; it may be a stripped one, try another Python"
        )
    return PromptSplit(prompts[plan.num_eval_prompts :], prompts[: plan.num_eval_prompts])


def pretrain(text: DemoText, plan: Plan, *, device: torch.device, seed: int, out: Path) -> tuple[PaLM, float]:
    """Stage 1: a byte-level PaLM, and its bits per byte on held-out text."""
    palm = PaLM(
        num_tokens=TOKENIZER.num_tokens, dim=plan.dim, depth=plan.depth, heads=plan.heads, dim_head=plan.dim_head,
        flash_attn=True,
    ).to(device)  # fmt: skip
    train, held_out = (
        torch.cat([TOKENIZER.encode(document, eos=True) for document in documents])
        for documents in (text.train, text.held_out)
    )
    before = bits_per_byte(palm, held_out, length=plan.length)
    stream = TokenStream(train, length=plan.length, batch_size=plan.batch_size, seed=seed)
    fit(
        palm,
        ({"seq": batch["seq"], "return_loss": True} for batch in stream),
        num_steps=plan.pretrain_steps,
        lr=plan.pretrain_lr,
        warmup_steps=plan.pretrain_steps // 20,
        weight_decay=0.01,
        metrics=MetricsLog(out / "pretrain.jsonl"),
        description="1/4 pretrain",
    )
    after = bits_per_byte(palm, held_out, length=plan.length)
    print(f"1/4 pretrain: {before:.2f} -> {after:.2f} bits per byte on held-out text")
    palm.eval().save(out / "palm.pt")
    return palm, after


def train_reward_model(
    palm: PaLM, text: DemoText, prompts: Sequence[str], plan: Plan, *, seed: int, out: Path
) -> tuple[RewardModel, float]:
    """Stage 2: a reward model from pair labels alone, and its accuracy on held-out pairs of other prompts."""
    pairs = sample_pairs(
        palm, text.words, prompts, num_pairs=plan.num_pairs, max_new_tokens=plan.max_new_tokens, seed=seed
    )
    train, held_out = split_pairs(pairs, plan.held_out_pairs)
    model = RewardModel(palm, use_lora=False)
    batches = list(pair_batches(train, epochs=plan.reward_epochs, batch_size=plan.reward_batch_size, seed=seed))
    fit(
        model,
        batches,
        num_steps=len(batches),
        lr=plan.reward_lr,
        warmup_steps=len(batches) // 10,
        weight_decay=0.01,
        metrics=MetricsLog(out / "reward.jsonl"),
        description="2/4 reward model",
    )
    accuracy = pair_accuracy(model.eval(), held_out)
    print(
        f"2/4 reward model: {accuracy:.2f} of {len(held_out)} held-out pairs, of other prompts, in the judge's order"
        f" ({len(train)} pairs trained on)"
    )
    model.save(out / "reward_model.pt")
    return model, accuracy


def improve(palm: PaLM, reward_model: RewardModel, prompts: Sequence[str], plan: Plan, *, seed: int, out: Path) -> PaLM:
    """Stage 3: PPO; gives the improved PaLM."""
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=reward_model,
        prompts=prompts,
        tokenizer=TOKENIZER,
        seed=seed,
        metrics_path=out / "metrics.jsonl",
        accelerate_kwargs={"cpu": palm.token_emb.weight.device.type == "cpu"},
        actor_lr=1e-3,  # a model this small wants more than the default
        critic_lr=2e-3,
        actor_lora_r=16,
        critic_lora_r=16,
        epochs=2,
        minibatch_size=64,
        max_batch_size=128,
        kl_coef=0.1,  # twice the default: the judge has seen a thousand pairs, and holds only near what it has seen
        missing_eos_penalty=None,  # documents are longer than the limit: an answer need not end within it
    )
    trainer.train(
        plan.ppo_episodes,
        max_seq_len=plan.max_new_tokens + 64,
        max_new_tokens=plan.max_new_tokens,
        eos_token=TOKENIZER.eos_token,
        update_timesteps=plan.ppo_update,
    )
    improved = trainer.export_palm().to(palm.token_emb.weight.device)
    reward_model.to(palm.token_emb.weight.device)
    improved.save(out / "improved_palm.pt")
    return improved


def _judged(
    model: PaLM,
    reward_model: RewardModel,
    reference: PaLM,
    text: DemoText,
    prompts: Sequence[str],
    plan: Plan,
    *,
    seed: int,
) -> Sampled:
    """Responses of a model to the prompts to compare on, from one random state, with all scores."""
    generator = torch.Generator(model.token_emb.weight.device).manual_seed(seed + 1)
    found = sample_responses(model, prompts, max_new_tokens=plan.max_new_tokens, generator=generator)
    return found.judged(
        prompts,
        gold=lambda response, ended: gold_score(response, text.words, ended=ended),
        reward_model=reward_model,
        policy=model,
        reference=reference,
    )
