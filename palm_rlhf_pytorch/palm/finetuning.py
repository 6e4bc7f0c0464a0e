"""Supervised fine-tuning: a PaLM learns to answer as demonstrations do.

    dialogues -> ids, and which of them the assistant says -> packed rows -> next-token loss of what it says

Ouyang et al., "Training language models to follow instructions with human feedback", section 3.5,
https://arxiv.org/abs/2203.02155. Here the prompt is no target, and several dialogues share a row without seeing one
another. Knows no command line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from palm_rlhf_pytorch.palm.inputs import check_length
from palm_rlhf_pytorch.palm.text_training import HeldOutText, Samples, TextLoop, TextLoss, TextTraining, text_bytes
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.chats import end_token, stop_strings
from palm_rlhf_pytorch.text.demonstrations import Demonstration, Demonstrations, example_of, prompt_of
from palm_rlhf_pytorch.text.packing import Packed, PackedBatches, pack, packed_batch
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.training.digests import tensors_digest
from palm_rlhf_pytorch.training.ranks import Ranks

SCOPE = "finetune"  # of the adapter, while it is trained
MAX_ROWS = 256  # that a model is judged by
DEFAULT_LOOP = TextLoop(lr=1e-4, weight_decay=0.0, description="finetune")


@dataclass(frozen=True)
class Finetuning(TextTraining):
    """What came of a run, and how the dialogues were packed.

    Attributes:
        train: what was learnt from; `cut`, `cut_tokens` and `dropped` say what was not.
        held_out: what the model was judged by, likewise; None where nothing was held out.
    """

    train: Packed
    held_out: Packed | None


def finetune(
    palm: PaLM,
    dialogues: Sequence[Demonstration] | Demonstrations | Packed,
    tokenizer: Tokenizer,
    *,
    held_out: Sequence[Demonstration] | Demonstrations | Packed = (),
    length: int = 1024,
    batch_size: int = 8,
    epochs: int = 1,
    packing: bool = True,
    lora_r: int | None = None,
    seed: int = 0,
    loop: TextLoop = DEFAULT_LOOP,
) -> Finetuning:
    """Train a model on what the assistant says in dialogues; each such token counts the same, whatever its batch.

    Args:
        palm: trained in place, where it is, or where the loop's accelerator places it.
        dialogues: what to learn from; `read_demonstrations` makes them of rows and files. What `pack_dialogues` gave
            is taken as it is, whatever `length` and `packing` say.
        tokenizer: gives the ids; its chat template writes the turns, if it has one.
        held_out: what to judge by; share no dialogue with `dialogues` (`split_by_group`). Of more than 256 packed rows
            that many are taken.
        length: tokens of a row. A longer dialogue loses its end; `Finetuning.train` counts them.
        batch_size: rows of a batch, in each process; an optimizer step takes `loop.accumulate` of them.
        epochs: passes over the dialogues; 1 to 3 are usual.
        packing: put several dialogues into a row; each sees itself alone either way.
        lora_r: rank of an adapter to train, which is merged into the weights at the end; None trains all weights.
        seed: of the batches' order, and of the adapter. Dropout draws from torch's global random state.
        loop: learning rate, evaluation, checkpoints and the rest. Its default learning rate suits an adapter and some
            100M weights; 1e-5 is usual for billions, 1e-3 for a byte-level model of dim 128.

    Raises:
        ValueError: if an argument is out of range, the tokenizer has more ids than the model, no dialogue has anything
            to learn from within `length`, or `fit` refuses or ends. With an adapter the weights are then as they were.
    """
    if tokenizer.num_tokens > palm.num_tokens:
        raise ValueError(f"tokenizer has {tokenizer.num_tokens} ids, the model num_tokens={palm.num_tokens}")
    check_length(length, palm.max_length, name="length")
    ranks = Ranks(loop.accelerator)
    train = _packed(dialogues, tokenizer, length=length, packing=packing)
    held = _packed(held_out, tokenizer, length=length, packing=packing) if held_out else None
    batches = PackedBatches(
        train, batch_size=batch_size, epochs=epochs, accumulate=loop.accumulate, seed=seed, rank=ranks.rank,
        ranks=ranks.count,
    )  # fmt: skip
    scope = None if lora_r is None else SCOPE
    data = batches.digest
    if lora_r is not None:
        # checkpoints hold the adapter alone, which is worth nothing on other weights
        trunk = tensors_digest(("", weight) for weight in palm.palm_parameters())
        data += f", rank {lora_r} on {trunk}"
        adapter = palm.new_adapter(r=lora_r, generator=torch.Generator().manual_seed(seed))
        palm.finetune_modules.add(SCOPE, adapter)
    done = None
    try:
        done = loop.run(
            TextLoss(palm, scope=scope), batches, num_steps=batches.steps_an_epoch * epochs, data=data,
            held_out=None if held is None else held_out_rows(held, tokenizer, batch_size=batch_size),
            parameters=palm.palm_parameters() if scope is None else palm.finetune_parameters(scope),
        )  # fmt: skip
    finally:
        if scope is not None:
            adapter = palm.remove_finetune_params(scope)
            if done is not None and done.stopped is None:
                palm.merge_adapter(adapter)
    return Finetuning(done.num_steps, done.best_step, done.metrics, done.stopped, train, held)


def pack_dialogues(
    dialogues: Sequence[Demonstration] | Demonstrations, tokenizer: Tokenizer, *, length: int, packing: bool = True
) -> Packed:
    """Dialogues as rows of ids, and how much of them was cut or left out; arguments as in `finetune`.

    Raises:
        ValueError: if no dialogue has anything to learn from within `length`.
    """
    return pack([example_of(record, tokenizer) for record in _records(dialogues)], length=length, several=packing)


def held_out_rows(packed: Packed, tokenizer: Tokenizer, *, batch_size: int = 8) -> HeldOutText:
    """Packed rows to judge a model by, 256 of them at most, at even distances.

    Raises:
        ValueError: if what the assistant says in them stands for no text.
    """
    rows = list(range(0, len(packed.rows), -(-len(packed.rows) // MAX_ROWS)))
    batches = [packed_batch(packed, rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]
    said = [packed.examples[number] for row in rows for number in packed.rows[row]]
    num_bytes = sum(text_bytes(tokenizer, ids[1:][targets[1:]]) for ids, targets in said)
    if num_bytes < 1:
        raise ValueError("held_out: what the assistant says there stands for no text; hold other dialogues out")
    return HeldOutText(batches, num_bytes)


def samples_of(
    records: Sequence[Demonstration] | Demonstrations, tokenizer: Tokenizer, *, count: int, length: int,
    max_new_tokens: int = 100,
) -> Samples:  # fmt: skip
    """Prompts of the first dialogues that have one, for `TextLoop.samples`; what is asked more than once counts once.

    Args:
        records: dialogues; held-out ones show what is learnt rather than remembered.
        tokenizer: of the model.
        count: prompts at most.
        length: tokens of a prompt at most; longer ones are passed over.
        max_new_tokens: of a sample.
    """
    prompts: list[torch.Tensor] = []
    for record in _records(records):
        prompt = prompt_of(record, tokenizer)
        new = prompt is not None and not any(torch.equal(prompt, other) for other in prompts)
        if prompt is not None and new and 0 < len(prompt) <= length and len(prompts) < count:
            prompts.append(prompt)
    ends = end_token(tokenizer)
    return Samples(prompts, tokenizer, max_new_tokens, end_token=ends, stops=stop_strings(tokenizer))


def _packed(
    given: Sequence[Demonstration] | Demonstrations | Packed, tokenizer: Tokenizer, *, length: int, packing: bool
) -> Packed:
    if isinstance(given, Packed):
        return given
    return pack_dialogues(given, tokenizer, length=length, packing=packing)


def _records(given: Sequence[Demonstration] | Demonstrations) -> Sequence[Demonstration]:
    return given.records if isinstance(given, Demonstrations) else given
