"""`palm-rlhf feedback sample | status`: what a model writes goes into the queue, and how people's votes stand."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from palm_rlhf_pytorch.cli.device import add_device_argument, device_of
from palm_rlhf_pytorch.cli.feedback_data import (
    Add,
    add_project,
    add_settings,
    asked_kind,
    figure,
    project_asked_for,
    project_of,
)
from palm_rlhf_pytorch.cli.generate import add_sampling_arguments, sampling_of, stops_of
from palm_rlhf_pytorch.cli.models import (
    PROMPTS,
    add_chat_argument,
    add_tokenizer_argument,
    check_same,
    load_judge_for,
    load_model,
    prompt_tokenizer,
    tokenizer_name,
)
from palm_rlhf_pytorch.policy.comparison import Estimate, cluster_numbers, win_rate
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble
from palm_rlhf_pytorch.text.chats import ChatTokenizer
from palm_rlhf_pytorch.text.datasets import read_prompts

if TYPE_CHECKING:
    from palm_rlhf_pytorch.feedback.live import Writer
    from palm_rlhf_pytorch.feedback.rounds import Outcome, Round
    from palm_rlhf_pytorch.feedback.sampling import Author, Reader


def add_loop_actions(add: Add) -> None:
    """Add the commands.

    Args:
        add: makes a parser out of a name, what it runs and what it is for.
    """
    parser = add("sample", run_sample, "put a model's responses to prompts into the queue, in a new round")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model: a file, a folder, or a name on the Hub")
    parser.add_argument("--prompts", required=True, metavar="FILE", default=argparse.SUPPRESS, help=PROMPTS)
    parser.add_argument(
        "--against", metavar="CHECKPOINT", default=argparse.SUPPRESS,
        help="an older model, to whose responses the new one's are compared; `status` then says how often it wins",
    )  # fmt: skip
    add_writing_arguments(parser)
    parser.add_argument(
        "--per-prompt", type=int, metavar="N", default=argparse.SUPPRESS,
        help="items of one prompt at most; else all pairs of its responses, once each",
    )  # fmt: skip
    parser.add_argument("--count", type=int, metavar="N", default=argparse.SUPPRESS, help="items at most, the best")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the samples")
    add_project(parser)
    add_settings(parser)
    parser = add("status", run_status, "a round: judged, agreement, reward model against votes, new model against old")
    add_project(parser)
    parser.add_argument("--round", type=int, metavar="N", default=argparse.SUPPRESS, help="else the newest")
    parser.add_argument("--json", action="store_true", help="for programs")


def add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how responses are written and scored."""
    parser.add_argument(
        "--reward-model", metavar="FILE", default=argparse.SUPPRESS,
        help="scores the responses; of an ensemble (`palm-rlhf reward --members 5`), what its members disagree on most"
        " is asked first",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=argparse.SUPPRESS, metavar="N",
                        help="responses of each model to each prompt, up to 4; 2, or 1 of each of two")  # fmt: skip
    parser.add_argument("--max-length", type=int, default=1024, metavar="N", help="tokens the reward model reads")
    add_sampling_arguments(parser, temperature=1.0, max_new_tokens=128)
    add_tokenizer_argument(parser)
    add_chat_argument(parser)
    add_device_argument(parser)


def add_live_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model of `serve` that writes while people wait, and how."""
    parser.add_argument(
        "--live", metavar="CHECKPOINT", default=argparse.SUPPRESS,
        help="model that answers prompts imported without responses, each when somebody is given it; what follows is"
        " about this model",
    )  # fmt: skip
    add_writing_arguments(parser)


def start_writer(args: argparse.Namespace) -> "Writer | None":
    """The thread that writes for `serve --live`, which the pages ask from now on; None without the option.

    Raises:
        FileNotFoundError, ValueError: if there is no such model, or an option is out of range.
    """
    if not hasattr(args, "live"):
        return None
    from palm_rlhf_pytorch.feedback.live import Writer, responder, set_writer

    authors = load_authors(args, [args.live])
    respond = responder(authors, samples=getattr(args, "samples", 2), reader=load_reader(args, authors[0]))
    authors[0].write(["?"], generator=torch.Generator(authors[0].palm.device))  # what is wrong with it is said now
    writer = Writer(respond)
    set_writer(writer)
    return writer


def run_sample(args: argparse.Namespace) -> int:
    """Write responses, score them, queue them.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file or an option is not what it should be, or nothing is new.
    """
    from palm_rlhf_pytorch.feedback.rounds import add_round
    from palm_rlhf_pytorch.feedback.sampling import check_request, sample_items

    prompts, kind = read_prompts(args.prompts), asked_kind(args)
    names = [args.checkpoint, *([args.against] if hasattr(args, "against") else [])]
    authors = load_authors(args, names)
    options: dict[str, Any] = {
        "kind": kind, "samples": getattr(args, "samples", 2 if len(authors) == 1 else 1),
        "per_prompt": getattr(args, "per_prompt", None), "count": getattr(args, "count", None),
    }  # fmt: skip
    check_request(authors, **options)  # before a project is made
    reader = load_reader(args, authors[0])
    project = project_asked_for(args)
    found = sample_items(authors, prompts, seed=args.seed, reader=reader, use_tqdm=True, **options)
    if not found.items:
        raise ValueError(f"{args.checkpoint} wrote nothing that can be judged: its responses are empty or all the same")
    told = {"old": getattr(args, "against", ""), "reward_model": getattr(args, "reward_model", "")}
    number = add_round(project, found.items, new=args.checkpoint, **told)
    added = project.items.filter(round=number).count()
    print(f"project {project.name}, round {number}: {added:,} items of {len(set(prompts)):,} prompts in the queue")
    if found.passed_over:
        print(f"{found.passed_over:,} prompts had no two responses that differ, and are left out")
    if reader is not None and not isinstance(reader.judge, RewardEnsemble):
        print("one reward model cannot disagree with itself: what it is least sure of comes first")
    print("people judge: palm-rlhf feedback serve")
    return 0


def load_authors(args: argparse.Namespace, names: Sequence[str]) -> "list[Author]":
    """The models that write, on the device.

    Raises:
        FileNotFoundError, ValueError: if one is no model, or they have different tokenizers.
    """
    from palm_rlhf_pytorch.feedback.sampling import Author

    settings = {**sampling_of(args), "stop": stops_of(args)}
    loaded = [load_model(name, device_of(args), tokenizer=tokenizer_name(args)) for name in names]
    for name, (_, tokenizer) in zip(names[1:], loaded[1:], strict=True):
        check_same(tokenizer, loaded[0][1], name=f"the model {name}", other_name=f"the model {names[0]}")
    return [
        Author(name=str(name), palm=palm.eval(), asking=prompt_tokenizer(args, tokenizer), settings=settings)
        for name, (palm, tokenizer) in zip(names, loaded, strict=True)
    ]


def load_reader(args: argparse.Namespace, author: "Author") -> "Reader | None":
    """The reward model that scores, if one is named.

    Raises:
        FileNotFoundError, ValueError: if it is none, or not one for this model.
    """
    from palm_rlhf_pytorch.feedback.sampling import Reader

    path = getattr(args, "reward_model", None)
    if path is None:
        return None
    tokenizer = author.asking.tokenizer if isinstance(author.asking, ChatTokenizer) else author.asking
    judge = load_judge_for(path, author.palm, tokenizer, palm_name=author.name)
    return Reader(judge=judge.to(device_of(args)).eval(), asking=author.asking, max_length=args.max_length)


def run_status(args: argparse.Namespace) -> int:
    """Print how a round stands, and a line for each.

    Raises:
        ValueError: if there is no such project or round.
    """
    from palm_rlhf_pytorch.feedback.rounds import last_round, round_of

    project = project_of(args.project)
    last = last_round(project)
    shown = round_of(project, getattr(args, "round", last))
    if args.json:
        print(json.dumps(_summary(shown), indent=2))
        return 0
    print(
        f"project {project.name}, round {shown.number} of {last}"
        + (f", {shown.at:%Y-%m-%d %H:%M} UTC" if shown.at else "")
    )
    for name, value in _lines(shown):
        print(f"  {name:<14}{value}")
    numbers = [number for number in project.items.order_by().values_list("round", flat=True).distinct() if number]
    if len(numbers) > 1:
        print(f"{'round':>5}{'judged':>16}{'reward right':>14}{'new wins':>10}  model")
    for number in sorted(numbers) if len(numbers) > 1 else []:
        one = shown if number == shown.number else round_of(project, number)
        there, right, wins = one.progress, _rate(one.accuracy), _rate(one.wins)
        judged = f"{there.judgements:,} of {there.wanted:,}"
        shares = f"{figure(right and right.value):>14}{figure(wins and wins.value):>10}"
        print(f"{number:>5}{judged:>16}{shares}  {one.new}")
    return 0


def _lines(shown: "Round") -> list[tuple[str, str]]:
    """What there is to say about a round, each with its name."""
    there, alpha = shown.progress, shown.agreement
    people = "person" if shown.annotators == 1 else "people"
    judged = f"{there.judgements:,} of {there.wanted:,} judgements by {shown.annotators:,} {people};"
    lines = [("new model", shown.new), ("old model", shown.old), ("reward model", shown.reward_model)]
    lines = [(name, value) for name, value in lines if value]
    lines += [("judged", f"{judged} {there.finished:,} of {there.items:,} items finished")]
    if alpha is None:
        lines += [("agreement", "- (nobody shares an item; --required 2 has two people judge each)")]
    else:
        alphas = (("names", alpha.nominal), ("order", alpha.ordinal), ("steps", alpha.interval))
        said = ", ".join(f"{name} {figure(value)}" for name, value in alphas)
        lines += [("agreement", f"alpha of {said}, on {alpha.items:,} shared items")]
    lines += [("reward right", _told(shown.accuracy, "- (sample with --reward-model)", "decisions it had not seen"))]
    return [*lines, ("new wins", _told(shown.wins, "- (sample with --against OLD)", "votes, ties half"))]


def _told(outcomes: "Sequence[Outcome]", without: str, unit: str) -> str:
    rate = _rate(outcomes)
    if rate is None:
        return without
    return f"{rate.value:.2f} ({rate.low:.2f} to {rate.high:.2f}) of {len(outcomes):,} {unit}"


def _rate(outcomes: "Sequence[Outcome]") -> Estimate | None:
    """Mean and its interval of 95 %, each prompt counting the same; None where there is nothing."""
    if not outcomes:
        return None
    values = torch.tensor([outcome.value for outcome in outcomes], dtype=torch.float64)
    return win_rate(values, cluster_numbers([outcome.prompt for outcome in outcomes]))


def _summary(shown: "Round") -> dict[str, Any]:
    """The same for programs."""
    there, alpha = shown.progress, shown.agreement
    rates = {"reward_accuracy": shown.accuracy, "win_rate": shown.wins}
    return {
        "round": shown.number,
        "at": shown.at and shown.at.isoformat(),
        "new": shown.new,
        "old": shown.old,
        "reward_model": shown.reward_model,
        "items": there.items,
        "finished": there.finished,
        "judgements": there.judgements,
        "wanted": there.wanted,
        "annotators": shown.annotators,
        "agreement": alpha and {name: getattr(alpha, name) for name in ("items", "nominal", "ordinal", "interval")},
        **{
            name: (rate := _rate(outcomes)) and {**rate._asdict(), "of": len(outcomes)}
            for name, outcomes in rates.items()
        },
    }
