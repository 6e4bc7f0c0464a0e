"""`palm-rlhf reward ask`: the pairs of responses whose judgement would teach an ensemble of reward models most."""

import argparse
import json
import sys
from pathlib import Path

from palm_rlhf_pytorch.cli.device import add_device_argument, device_of
from palm_rlhf_pytorch.cli.models import (
    add_chat_argument,
    add_tokenizer_argument,
    load_judge_tokenizer,
    prompt_tokenizer,
    tokenizer_name,
)
from palm_rlhf_pytorch.cli.text_runs import stop_at_bad_record
from palm_rlhf_pytorch.reward.asking import best_questions, read_questions
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble, load_judge
from palm_rlhf_pytorch.text.datasets import skip_bad_record
from palm_rlhf_pytorch.text.records import Pair
from palm_rlhf_pytorch.training.atomic import check_target, replacing

ON_BAD_RECORD = {"stop": stop_at_bad_record, "skip": skip_bad_record}


def add_ask_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "pairs", metavar="PAIRS", help="response_a and response_b, or chosen and rejected, judged or not"
    )
    parser.add_argument(
        "--reward-model", required=True, metavar="FILE", default=argparse.SUPPRESS,
        help="ensemble, as `palm-rlhf reward DATA --members 5` makes it",
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=20, metavar="N", help="questions at most")
    parser.add_argument("--per-prompt", type=int, default=1, metavar="N", help="questions about one prompt at most")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines; without it they are printed")
    parser.add_argument("--on-bad-record", choices=tuple(ON_BAD_RECORD), default="stop", help="as in training")
    parser.add_argument("--max-length", type=int, default=1024, metavar="N", help="as in training")
    parser.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="as in training")
    add_tokenizer_argument(parser)
    add_chat_argument(parser)
    add_device_argument(parser)
    parser.set_defaults(run=run_ask)


def run_ask(args: argparse.Namespace) -> int:
    """List the pairs whose judgement would teach most.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, or an option is out of range.
    """
    if args.count < 1:
        raise ValueError(f"--count {args.count}: must be at least 1")
    if args.out is not None:
        check_target(args.out)
    judge = load_judge(args.reward_model)
    if not isinstance(judge, RewardEnsemble):
        raise ValueError(
            f"{args.reward_model} holds one reward model, which cannot disagree with itself; make several of the same"
            " labels: palm-rlhf reward DATA --members 5"
        )
    tokenizer = prompt_tokenizer(args, load_judge_tokenizer(args.reward_model, judge, tokenizer=tokenizer_name(args)))
    found = read_questions(args.pairs, on_bad_record=ON_BAD_RECORD[args.on_bad_record])
    pairs = [label for label in found.records if isinstance(label, Pair)]
    questions = best_questions(
        judge.to(device_of(args)), pairs, tokenizer, eos_token=tokenizer.eos_token, max_length=args.max_length,
        max_tokens_per_batch=args.batch_tokens, per_prompt=args.per_prompt,
    )[: args.count]  # fmt: skip
    rows = "".join(f"{json.dumps(question.row(), ensure_ascii=False)}\n" for question in questions)
    told = f"{len(questions):,} of {found.rows:,} rows, {len(found.bad):,} bad; write a, b or tie for choice"
    if args.out is None:
        print(rows, end="")
    else:
        with replacing(args.out) as file:
            file.write(rows.encode())
        told += f" in {args.out}"
    print(told, file=sys.stderr if args.out is None else sys.stdout)
    return 0
