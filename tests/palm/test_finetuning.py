"""Fine-tuning in Python: what is learnt, by which weights, and what a token counts."""

import math
import os
import signal

import pytest
import torch

from palm_rlhf_pytorch.palm.finetuning import finetune, held_out_rows, pack_dialogues, samples_of
from palm_rlhf_pytorch.palm.text_training import TextLoop, TextLoss
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.demonstrations import example_of, read_demonstrations
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
ROWS = [{"prompt": f"{'?' * (n % 5)}{n}", "completion": "yes" if n % 2 else "no, never"} for n in range(24)]
RECORDS = read_demonstrations(ROWS).records


def new_palm(**options):
    torch.manual_seed(0)
    return PaLM(num_tokens=259, dim=16, depth=2, heads=2, dim_head=8, **options)


def weights_of(palm):
    return {name: weight.clone() for name, weight in palm.state_dict().items()}


def test_bits_per_byte_are_those_of_the_responses_alone():
    palm, (ids, targets) = new_palm().eval(), example_of(RECORDS[3], TOKENIZER)
    logprobs = palm(ids[None]).detach()[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    nats = -float(logprobs[targets[1:]].sum())
    found = held_out_rows(pack_dialogues(RECORDS[3:4], TOKENIZER, length=32), TOKENIZER).evaluate(TextLoss(palm))
    assert found["eval/loss"] == pytest.approx(nats / 4, abs=1e-5)  # y, e, s and the end
    assert found["eval/bits_per_byte"] == pytest.approx(nats / math.log(2) / 3, abs=1e-5)


class Marked(ByteTokenizer):
    """Bytes whose EOS and BOS are id 0, as those of the published PaLMs' tokenizer are."""

    bos_token = eos_token = 0


def test_a_model_whose_loss_skips_the_end_token_learns_to_end():
    palm = new_palm(cross_entropy_ignore_index=0)
    packed = pack_dialogues(RECORDS, Marked(), length=40)
    loop = TextLoop(lr=3e-2, progress=False)
    finetune(palm, packed, Marked(), batch_size=3, epochs=10, loop=loop)
    prompt = Marked().encode(RECORDS[1].plain.prompt + "yes")
    assert palm.eval()(prompt[None])[0, -1].softmax(-1)[0] > 0.5
    kept = palm.config | {"cross_entropy_ignore_index": -100}
    other = PaLM(**kept)
    other.load_state_dict(palm.state_dict())
    batch = {"seq": torch.tensor([[0, 65, 66, 0, 0, 67]]), "begins": torch.tensor([[1, 0, 0, 0, 1, 0]]).bool()}
    with torch.no_grad():
        assert float(TextLoss(palm)(**batch)) == float(TextLoss(other.eval())(**batch))


@pytest.mark.parametrize("accumulate", [1, 7])
def test_a_step_over_all_dialogues_is_the_mean_over_all_tokens_however_packed(accumulate):
    examples = [example_of(record, TOKENIZER) for record in RECORDS]
    palm = new_palm()
    sums = [palm(ids[None], True, loss_mask=targets[None]) * targets.sum() for ids, targets in examples]
    (torch.stack(sums).sum() / sum(int(targets.sum()) for _, targets in examples)).backward()
    expected = palm.token_emb.weight.grad.clone()

    found = {}

    class Look(torch.optim.SGD):
        def step(self, closure=None):
            found["gradient"] = self.param_groups[0]["params"][0].grad.clone()

    loop = TextLoop(lr=1.0, max_norm=None, accumulate=accumulate, progress=False, optimizer=lambda groups: Look(groups))
    packed = pack_dialogues(RECORDS, TOKENIZER, length=40)
    size = -(-len(packed.rows) // accumulate)
    assert len(packed.rows) % accumulate == 0 and len(packed.rows) < len(RECORDS)
    result = finetune(new_palm(), packed, TOKENIZER, batch_size=size, loop=loop)
    assert result.num_steps == 1
    assert torch.allclose(found["gradient"], expected, atol=1e-6)


@pytest.mark.parametrize("lora_r", [None, 3])
def test_it_learns_to_answer_and_leaves_no_scope(lora_r):
    palm = new_palm()
    before = weights_of(palm)
    loop = TextLoop(lr=2e-2, eval_every=20, progress=False)
    found = finetune(
        palm, RECORDS[:20], TOKENIZER, held_out=RECORDS[20:], length=48, batch_size=2, epochs=30, lora_r=lora_r,
        loop=loop,
    )  # fmt: skip
    judged = held_out_rows(found.held_out, TOKENIZER).evaluate(TextLoss(palm))
    assert judged["eval/loss"] == pytest.approx(found.metrics["eval/loss"], abs=1e-4)  # merged, the same
    assert judged["eval/loss"] < (1.0 if lora_r is None else 5.4)  # ln 259 = 5.6 at first
    assert not palm.finetune_modules
    changed = {name for name, weight in weights_of(palm).items() if not torch.equal(weight, before[name])}
    adapted = {f"layers.{layer}.{name}.weight" for layer in range(2) for name in ("in_proj", "out_proj")}
    assert changed == (adapted if lora_r else before.keys())


@pytest.mark.parametrize("lora_r", [None, 2])
def test_stopped_by_a_signal_it_goes_on_to_the_same_weights(tmp_path, monkeypatch, lora_r):
    options = {"length": 32, "batch_size": 3, "epochs": 3, "lora_r": lora_r}
    loop = {"lr": 1e-2, "save_every": 2, "progress": False}
    alone, told = new_palm(), new_palm()
    finetune(alone, RECORDS, TOKENIZER, **options, loop=TextLoop(**loop))
    begun, forward, calls = weights_of(told), TextLoss.forward, []

    def tell(self, *args, **more):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **more)

    loop["run_dir"] = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(TextLoss, "forward", tell)
        found = finetune(told, RECORDS, TOKENIZER, **options, loop=TextLoop(**loop))
    assert found.stopped == "SIGINT" and not told.finetune_modules
    if lora_r:  # an adapter that is not finished is not merged
        assert all(torch.equal(weight, begun[name]) for name, weight in weights_of(told).items())
        other = new_palm()
        with torch.no_grad():
            other.norm.weight[0] += 1
        with pytest.raises(ValueError, match="over other data"):
            finetune(other, RECORDS, TOKENIZER, **options, loop=TextLoop(**loop, resume=True))
    told = new_palm()
    finetune(told, RECORDS, TOKENIZER, **options, loop=TextLoop(**loop, resume=True))
    first, second = weights_of(alone), weights_of(told)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_samples_ask_what_dialogues_ask_once_and_skip_what_is_too_long():
    rows = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "x"}]} for c in "aab"]
    rows += [{"messages": [{"role": "assistant", "content": "hello"}]}, *rows[:1]]
    rows.insert(0, {"prompt": "long " * 30, "response": "x"})
    samples = samples_of(read_demonstrations(rows), TOKENIZER, count=5, length=60, max_new_tokens=9)
    asked = [TOKENIZER.decode(prompt) for prompt in samples.prompts]
    assert asked == [f"\n\nHuman: {letter}\n\nAssistant:" for letter in "ab"]
    assert samples.end_token == 257 and samples.stops == ("\n\nHuman:",)


def test_what_cannot_be_learnt_from_is_refused():
    with pytest.raises(ValueError, match="none of 1 examples"):
        finetune(new_palm(), RECORDS[4:5], TOKENIZER, length=5)
    with pytest.raises(ValueError, match=r"batch_size \(0\)"):
        finetune(new_palm(), RECORDS, TOKENIZER, batch_size=0)
