"""6. DPO: straight from the preferences that the reward model learnt from; nothing is sampled and nothing is scored.

labels.jsonl -> log-probabilities of both answers -> DPO's loss, and the chosen one's likelihood
"""

from functools import partial

from alphabet import options

from palm_rlhf_pytorch import DPOTrainer, PaLM
from palm_rlhf_pytorch.objectives import dpo_loss, with_nll
from palm_rlhf_pytorch.text import read_labels, save_tokenizer, split_by_group, tokenizer_of

args = options(__doc__).parse_args()
palm = PaLM.from_checkpoint(args.out / "finetuned.pt")
tokenizer = tokenizer_of(args.out / "finetuned.pt", num_tokens=palm.num_tokens)
train, held_out = split_by_group(read_labels(args.out / "labels.jsonl").records, held_out=0.15)

trainer = DPOTrainer(
    palm=palm,
    pairs=train,
    held_out=held_out,
    tokenizer=tokenizer,
    # DPO alone makes chosen answers less likely too, and right ones no more frequent; others: ipo_loss, simpo_loss ...
    loss=partial(with_nll, loss=partial(dpo_loss, beta=0.1)),
    lr=1e-3,
    minibatch_size=32,
    run_dir=args.out / "dpo",
)
metrics = trainer.train(num_epochs=1, resume="auto")

trainer.export_palm().save(args.out / "improved_dpo.pt")
save_tokenizer(tokenizer, args.out / "improved_dpo.pt")
accuracy = metrics["eval/accuracy"]
print(f"{len(train)} pairs; it prefers the chosen answer in {accuracy:.2f} of {len(held_out)} held-out ones")
