"""7. Who has become better? The models of 4, 5 and 6 beside the one they began from, on questions nobody judged.

answers of both to the same questions -> the reward model and the rule -> win rates with intervals
"""

from functools import partial

import torch
from alphabet import MAX_NEW_TOKENS, asked, options, questions, rule, share_right

from palm_rlhf_pytorch import PaLM, RewardModel
from palm_rlhf_pytorch.palm import generate_responses
from palm_rlhf_pytorch.policy.best_of_n import best_of_n
from palm_rlhf_pytorch.policy.evaluation import evaluate
from palm_rlhf_pytorch.reward import each, text_judge
from palm_rlhf_pytorch.text import tokenizer_of

parser = options(__doc__)
parser.add_argument("--samples", type=int, default=4, help="answers to each question (default: %(default)s)")
args = parser.parse_args()
before = PaLM.from_checkpoint(args.out / "finetuned.pt").eval()
tokenizer = tokenizer_of(args.out / "finetuned.pt", num_tokens=before.num_tokens)
reward_model = RewardModel.from_checkpoint(args.out / "reward_model.pt").eval()
judges = {"rule": text_judge(each(rule), tokenizer), "reward model": reward_model}
prompts = [asked(question) for question in questions(held_out=True)][: 3 if args.quick else None]
sampling = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token": tokenizer.eos_token}

for name in ("ppo", "grpo", "dpo"):
    after = PaLM.from_checkpoint(args.out / f"improved_{name}.pt").eval()
    found = evaluate(before, after, prompts, judges, tokenizer, num_samples=args.samples, **sampling)
    asked_for = [prompts[row] for row in found.prompt_rows]
    right = [share_right(asked_for, side.responses) for side in (found.a, found.b)]
    print(f"\n{name}: right answers {right[0]:.2f} -> {right[1]:.2f}\n{found.table()}")

# no training at all: of eight answers the one that the reward model likes best
ids, mask = tokenizer.batch(prompts)
best = best_of_n(
    partial(generate_responses, before), reward_model, ids, mask, num_samples=8,
    generator=torch.Generator().manual_seed(0), **sampling,
)  # fmt: skip
answers = [tokenizer.decode(row) for row in best.sequences]
answers = [answer.removeprefix(prompt) for prompt, answer in zip(prompts, answers, strict=True)]
print(f"\nbest of 8 by the reward model: right answers {share_right(prompts, answers):.2f}")

after = PaLM.from_checkpoint(args.out / "improved_ppo.pt").eval()
print("\nthe model of PPO, as it writes:")
for question in questions(held_out=True)[:3]:
    print(f"  {question}", end="")
    for piece in after.stream(asked(question), tokenizer=tokenizer, temperature=0, max_new_tokens=MAX_NEW_TOKENS):
        print(piece, end="", flush=True)
    print()
print(f"talk to it: palm-rlhf chat {args.out / 'improved_ppo.pt'}")
