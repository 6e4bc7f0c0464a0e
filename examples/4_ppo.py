"""4. PPO: the model learns from the reward model, and a judge that it never learns from says whether that is right.

questions -> answers -> scores -> clipped steps                 gives improved_ppo.pt, and a run in ppo/
"""

from alphabet import MAX_NEW_TOKENS, asked, options, questions, rule

from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer
from palm_rlhf_pytorch.policy import WatchSettings
from palm_rlhf_pytorch.reward import each, text_judge
from palm_rlhf_pytorch.text import save_tokenizer, tokenizer_of

parser = options(__doc__)
parser.add_argument("--log-with", help="a tracker that gets the metrics too: tensorboard, wandb")
args = parser.parse_args()
num_updates = 2 if args.quick else 40
palm = PaLM.from_checkpoint(args.out / "finetuned.pt")
tokenizer = tokenizer_of(args.out / "finetuned.pt", num_tokens=palm.num_tokens)

trainer = RLHFTrainer(
    palm=palm,
    reward_model=RewardModel.from_checkpoint(args.out / "reward_model.pt").eval(),
    held_out_judge=text_judge(each(rule), tokenizer),
    prompts=[asked(question) for question in questions(held_out=False)],
    tokenizer=tokenizer,
    actor_lr=2e-3,
    critic_lr=4e-3,
    kl_coef=0.02,
    minibatch_size=32,
    watch=WatchSettings(),  # ends the run if the score rises while the held-out judge's falls
    run_dir=args.out / "ppo",
    log_with=args.log_with,
)
history = trainer.train(
    num_updates * 64, max_new_tokens=MAX_NEW_TOKENS, eos_token=tokenizer.eos_token, resume="auto"
)  # with resume="auto" a run that was killed goes on

trainer.export_palm().save(args.out / "improved_ppo.pt")
save_tokenizer(tokenizer, args.out / "improved_ppo.pt")
for name, meaning in (
    ("reward/score", "the reward model's score"),
    ("reward/held_out_score", "the rule's score"),
    ("objective/kl", "KL to the model before, nats an answer"),
):
    print(f"{meaning}: {history[0][name]:.2f} -> {history[-1][name]:.2f}")
print(f"look: palm-rlhf plot {args.out / 'ppo'}; palm-rlhf inspect {args.out / 'ppo'}")
