"""3. A judge from preferences: the model answers twice, the better answer is chosen, a reward model learns to agree.

pairs of answers -> labels.jsonl -> loss of the choice          finetuned.pt gives reward_model.pt
"""

import json

import torch
from alphabet import MAX_NEW_TOKENS, asked, options, questions, rule

from palm_rlhf_pytorch import PaLM, RewardModel
from palm_rlhf_pytorch.reward import train_reward_model
from palm_rlhf_pytorch.text import read_labels, split_by_group, tokenizer_of
from palm_rlhf_pytorch.training import MetricsLog

args = options(__doc__).parse_args()
num_answers = 2 if args.quick else 40
torch.manual_seed(0)
palm = PaLM.from_checkpoint(args.out / "finetuned.pt").eval()
tokenizer = tokenizer_of(args.out / "finetuned.pt", num_tokens=palm.num_tokens)

# people would choose; here a rule does, and pairs that it holds alike are left out
prompts = [asked(question) for question in questions(held_out=False)]
answers = palm.generate_text(prompts, tokenizer=tokenizer, num_samples=num_answers, max_new_tokens=MAX_NEW_TOKENS)
path = args.out / "labels.jsonl"
with path.open("w", encoding="utf-8") as file:
    for place in range(0, len(answers), 2):
        prompt = prompts[place // num_answers]
        worse, better = sorted(answers[place : place + 2], key=lambda answer: rule(prompt, answer))
        if rule(prompt, worse) < rule(prompt, better) and worse.strip():
            file.write(json.dumps({"prompt": prompt, "chosen": better, "rejected": worse}) + "\n")

labels = read_labels(path)
print(labels.summary())
train, held_out = split_by_group(labels.records, held_out=0.15)
judge = RewardModel(palm, use_lora=False)  # all weights of a copy learn
found = train_reward_model(
    judge,
    train,
    tokenizer,
    eos_token=tokenizer.eos_token,
    held_out=held_out,
    epochs=1 if args.quick else 4,
    lr=2e-3,
    metrics=MetricsLog(args.out / "reward.jsonl"),
    description="3 reward model",
)
judge.save(args.out / "reward_model.pt")
accuracy = found.metrics["eval/accuracy"]
print(f"of {len(held_out)} held-out pairs, about other questions, it orders {accuracy:.2f} as the rule does")
