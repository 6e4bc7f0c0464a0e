"""1. A language model from plain text: a byte-level PaLM reads the documentation of the Python installation.

text -> a folder of token ids -> random windows -> next-token loss          gives palm.pt
"""

import torch
from alphabet import options

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.palm import Samples, TextLoop, pretrain
from palm_rlhf_pytorch.text import load_tokenizer, open_or_write, python_documentation, save_tokenizer, split_corpus
from palm_rlhf_pytorch.training import MetricsLog
from palm_rlhf_pytorch.training.optimizers import muon

parser = options(__doc__)
parser.add_argument("--tokenizer", default="bytes", help="or a tokenizer.json, a folder, a name on the Hub")
args = parser.parse_args()
num_steps, num_bytes, dim = (10, 200_000, 32) if args.quick else (300, 2_000_000, 64)
args.out.mkdir(parents=True, exist_ok=True)

# a line of the file is a paragraph; any text files and folders would do
text = args.out / "documentation.txt"
text.write_text("\n\n".join(python_documentation(max_bytes=num_bytes)), encoding="utf-8")
tokenizer = load_tokenizer(args.tokenizer)
train, held_out = split_corpus(open_or_write([text], tokenizer, args.out / "tokens"), 0.05)

torch.manual_seed(0)
palm = PaLM(num_tokens=tokenizer.num_tokens, dim=dim, depth=4, heads=4, dim_head=32, flash_attn=True)

# the same sentence is begun after every evaluation, and what the model makes of it printed
samples = Samples(
    [tokenizer.encode("Return the ")],
    tokenizer,
    max_new_tokens=60,
    tell=lambda step, prompt, sample: print(f"after {step} steps: {prompt}{sample!r}"),
)
loop = TextLoop(
    lr=5e-3,
    optimizer=muon,  # any function from parameter groups to an optimizer; without it AdamW
    samples=samples,
    eval_every=max(num_steps // 4, 1),
    metrics=MetricsLog(args.out / "pretrain.jsonl"),
    description="1 pretrain",
)
found = pretrain(palm, train, tokenizer, held_out=held_out, num_steps=num_steps, length=128, batch_size=32, loop=loop)

palm.save(args.out / "palm.pt")
save_tokenizer(tokenizer, args.out / "palm.pt")
print(f"held-out text: {found.metrics['eval/bits_per_byte']:.2f} bits a byte (8 before training)")
