"""5. GRPO: no reward model and no critic; answers to one question are compared by a rule that can check them.

questions -> eight answers to each -> the rule -> who did better than the rest        gives improved_grpo.pt
"""

from alphabet import MAX_NEW_TOKENS, asked, options, questions, rule

from palm_rlhf_pytorch import GRPOTrainer, PaLM
from palm_rlhf_pytorch.objectives import DAPO
from palm_rlhf_pytorch.reward import each, text_judge
from palm_rlhf_pytorch.text import save_tokenizer, tokenizer_of

args = options(__doc__).parse_args()
num_updates = 2 if args.quick else 40
palm = PaLM.from_checkpoint(args.out / "finetuned.pt")
tokenizer = tokenizer_of(args.out / "finetuned.pt", num_tokens=palm.num_tokens)


def right(prompt, answer):
    """1 for the right answer, 0 for any other: exercises with a solution need no more."""
    return float(rule(prompt, answer) == 1)


trainer = GRPOTrainer(
    palm=palm,
    reward_model=text_judge(each(right), tokenizer),
    prompts=[asked(question) for question in questions(held_out=False)],
    tokenizer=tokenizer,
    objective=DAPO,  # or GRPO, DR_GRPO, RLOO, GSPO, or one made of their parts
    group_size=8,
    actor_lr=2e-3,
    minibatch_size=32,
    run_dir=args.out / "grpo",
)
history = trainer.train(
    num_updates * 128, update_timesteps=128, max_new_tokens=MAX_NEW_TOKENS, eos_token=tokenizer.eos_token
)

trainer.export_palm().save(args.out / "improved_grpo.pt")
save_tokenizer(tokenizer, args.out / "improved_grpo.pt")
for name, meaning in (
    ("reward/score", "share of right answers"),
    ("rollout/informative_groups", "share of questions with right and wrong answers, from which alone it learns"),
):
    print(f"{meaning}: {history[0][name]:.2f} -> {history[-1][name]:.2f}")
