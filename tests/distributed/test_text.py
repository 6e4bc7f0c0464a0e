"""Pretraining and fine-tuning in two processes: the same steps as one process that takes their batches together."""

import pytest
import torch
from accelerate import Accelerator

from palm_rlhf_pytorch.palm.finetuning import finetune
from palm_rlhf_pytorch.palm.pretraining import pretrain
from palm_rlhf_pytorch.palm.text_training import Samples, TextLoop
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.demonstrations import read_demonstrations
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from tests.distributed.ranks import in_ranks

TOKENIZER = ByteTokenizer()
TEXT = torch.cat([TOKENIZER.encode(f"the cat sat on mat {n}", eos=True) for n in range(40)])
RECORDS = read_demonstrations([{"prompt": "?" * (n % 5), "response": "yes " * (1 + n % 3)} for n in range(32)]).records


def train(folder, *, method, batch_size, accumulate=1, lora_r=None):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    palm = PaLM(num_tokens=259, dim=16, depth=1, heads=2, dim_head=8)
    samples = Samples([TEXT[:4]], TOKENIZER, max_new_tokens=3, path=folder.with_suffix(".jsonl"))
    loop = TextLoop(
        lr=1e-2,
        accumulate=accumulate,
        eval_every=3,
        run_dir=folder,
        save_every=2,
        samples=samples,
        accelerator=accelerator,
        progress=False,
    )
    if method == "pretrain":
        found = pretrain(
            palm, TEXT, TOKENIZER, num_steps=6, held_out=TEXT[-90:], length=16, batch_size=batch_size, loop=loop
        )
    else:
        found = finetune(
            palm, RECORDS[:24], TOKENIZER, held_out=RECORDS[24:], length=32, batch_size=batch_size, packing=False,
            epochs=2, lora_r=lora_r, loop=loop,
        )  # fmt: skip
    return found.metrics["eval/bits_per_byte"], {name: weight.detach() for name, weight in palm.named_parameters()}


@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ({"method": "pretrain", "batch_size": 2}, {"batch_size": 4}),
        ({"method": "finetune", "batch_size": 5}, {"accumulate": 2}),
        ({"method": "finetune", "batch_size": 5, "lora_r": 2}, {"accumulate": 2}),
    ],
)
def test_two_processes_do_what_one_does_with_the_batches_of_both(tmp_path, options, alone):
    first, second = in_ranks(tmp_path / "two", train, **options)
    [one] = in_ranks(tmp_path / "one", train, ranks=1, **(options | alone))
    assert first[0] == second[0] == pytest.approx(one[0], abs=1e-4)
    for name, weight in one[1].items():
        assert torch.equal(first[1][name], second[1][name])
        assert torch.allclose(first[1][name], weight, atol=2e-4), name
    assert [path.read_text().count("\n") for path in sorted(tmp_path.glob("*.jsonl"))] == [2, 2]  # written by one alone
