"""2. The language model learns to answer: dialogues in which a careless teacher tells the alphabet.

dialogues.jsonl -> rows of several dialogues -> loss of what the assistant says     palm.pt gives finetuned.pt
"""

import json
import random

import torch
from alphabet import MAX_NEW_TOKENS, asked, careless, options, questions, share_right

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.palm import TextLoop, finetune
from palm_rlhf_pytorch.text import read_demonstrations, save_tokenizer, tokenizer_of
from palm_rlhf_pytorch.training import MetricsLog

args = options(__doc__).parse_args()
num_dialogues, epochs = (60, 1) if args.quick else (6000, 3)
palm = PaLM.from_checkpoint(args.out / "palm.pt")
tokenizer = tokenizer_of(args.out / "palm.pt", num_tokens=palm.num_tokens)

chance, path = random.Random(0), args.out / "dialogues.jsonl"
everything = questions(held_out=False) + questions(held_out=True)
with path.open("w", encoding="utf-8") as file:
    for question in chance.choices(everything, k=num_dialogues):
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": careless(question, chance)}]
        file.write(json.dumps({"messages": said}) + "\n")

dialogues = read_demonstrations(path).records
cut = len(dialogues) // 20
found = finetune(
    palm,
    dialogues[cut:],
    tokenizer,
    held_out=dialogues[:cut],
    length=256,  # some four dialogues, of which each sees itself alone
    batch_size=16,
    epochs=epochs,
    loop=TextLoop(lr=3e-3, metrics=MetricsLog(args.out / "finetune.jsonl"), description="2 finetune"),
)
packed = found.train
print(f"{len(packed.examples)} dialogues in {len(packed.rows)} rows; {found.metrics['eval/loss']:.3f} nats a token")
palm.save(args.out / "finetuned.pt")
save_tokenizer(tokenizer, args.out / "finetuned.pt")

kept = questions(held_out=True)
prompts = [asked(question) for question in kept]
answers = palm.eval().generate_text(
    prompts, tokenizer=tokenizer, max_new_tokens=MAX_NEW_TOKENS, generator=torch.Generator().manual_seed(0)
)
for question, answer in zip(kept[:4], answers, strict=False):
    print(f"  {question}{answer}")
print(f"right answers to {len(kept)} questions that nobody judges: {share_right(prompts, answers):.2f}")
