"""Pretraining in Python: bits per byte, samples, early stopping, resuming."""

import json
import math

import pytest
import torch

from palm_rlhf_pytorch.palm.pretraining import bits_per_byte, held_out_windows, pretrain
from palm_rlhf_pytorch.palm.text_training import HeldOutText, Samples, TextLoop, TextLoss
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

TEXT = ByteTokenizer().encode("the cat sat on the mat, and the dog lay on the log. " * 20)


class Halves:
    """A tokenizer whose every token is two letters."""

    num_tokens, bos_token, eos_token, pad_token = 26 * 26, None, None, None

    def encode(self, text, *, bos=False, eos=False):
        return torch.tensor([(ord(a) - 97) * 26 + ord(b) - 97 for a, b in zip(text[::2], text[1::2], strict=True)])

    def decode(self, ids):
        return "".join(chr(97 + int(token) // 26) + chr(97 + int(token) % 26) for token in ids)

    def __call__(self, texts):
        return [self.encode(text) for text in texts]

    def batch(self, texts, *, left=False):
        raise NotImplementedError


def new_palm(num_tokens=259, **options):
    torch.manual_seed(0)
    return PaLM(num_tokens=num_tokens, dim=16, depth=1, heads=2, dim_head=8, **options)


def test_bits_per_byte_are_per_byte_whatever_the_tokenizer():
    palm, tokenizer = new_palm(676).eval(), Halves()
    ids = tokenizer.encode("abcdefghijklmnopqrstuvwxyz" * 3)
    windows = [ids[at : at + 5] for at in range(0, 35, 4)]
    nats = -sum(
        palm(window[None])[0, :-1].log_softmax(-1).gather(1, window[1:, None]).sum().item() for window in windows
    )
    found = held_out_windows(ids, tokenizer, length=5, batch_size=4).evaluate(TextLoss(palm))
    assert found["eval/loss"] == pytest.approx(nats / (4 * len(windows)), abs=1e-5)
    assert found["eval/bits_per_byte"] == pytest.approx(nats / math.log(2) / (8 * len(windows)), abs=1e-5)
    assert bits_per_byte(palm, ids, length=5, tokenizer=tokenizer) == pytest.approx(found["eval/bits_per_byte"])


def test_an_end_between_documents_is_predicted_and_counts_no_byte():
    palm, tokenizer = new_palm().eval(), ByteTokenizer()
    ids = torch.tensor([*b"abc", 257, *b"de", 257])
    documents = [ids[:4], ids[4:]]
    nats = -sum(palm(one[None])[0, :-1].log_softmax(-1).gather(1, one[1:, None]).sum().item() for one in documents)
    found = held_out_windows(ids, tokenizer, length=7).evaluate(TextLoss(palm))
    assert found["eval/loss"] == pytest.approx(nats / 5, abs=1e-5)
    assert found["eval/bits_per_byte"] == pytest.approx(nats / math.log(2) / 3, abs=1e-5)  # b, c and e
    with pytest.raises(ValueError, match="holds no text"):
        held_out_windows(torch.tensor([257, 257, 257]), tokenizer, length=3)


def test_a_model_that_gives_nan_is_judged_nan():
    palm = new_palm()
    with torch.no_grad():
        palm.norm.weight[0] = math.nan
    found = held_out_windows(TEXT, ByteTokenizer(), length=9).evaluate(TextLoss(palm))
    assert math.isnan(found["eval/loss"]) and math.isnan(found["eval/bits_per_byte"])


def test_samples_follow_the_steps_and_a_resumed_run_writes_none_twice(tmp_path):
    told, path = [], tmp_path / "samples.jsonl"
    samples = Samples(
        [TEXT[:5], TEXT[7:9]], ByteTokenizer(), max_new_tokens=6, path=path, tell=lambda *row: told.append(row)
    )
    loop = TextLoop(lr=1e-2, eval_every=2, samples=samples, run_dir=tmp_path / "run", save_every=3, progress=False)
    options = {"num_steps": 5, "length": 16, "batch_size": 2, "loop": loop}
    palm, state = new_palm(), torch.get_rng_state()
    pretrain(palm, TEXT, ByteTokenizer(), **options)
    assert torch.equal(torch.get_rng_state(), state)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(at, p) for at in (2, 4, 5) for p in ("the c", " s")]
    assert all(len(row["sample"].encode()) >= 1 for row in rows) and len(told) == 6
    again = TextLoop(**{**vars(loop), "resume": True})
    pretrain(new_palm(), TEXT, ByteTokenizer(), **{**options, "loop": again})
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_samples_end_with_the_end_token_or_a_stop_string(monkeypatch):
    said = iter([torch.tensor([*b"hi", 257, 0]), torch.tensor([*b"ab\n\nHuman: no"])])
    monkeypatch.setattr(PaLM, "generate", lambda *_, **__: next(said))
    told = []
    samples = Samples(
        [TEXT[:2]] * 2, ByteTokenizer(), end_token=257, stops=("\n\nHuman:",), tell=lambda *row: told.append(row[2])
    )
    samples.take(new_palm(), 1)
    assert told == ["hi", "ab"]


def test_patience_keeps_the_best_weights_and_resumes_to_them(tmp_path, monkeypatch):
    losses = {step: loss for step, loss in zip(range(2, 14, 2), (3.0, 2.0, 2.5, 2.4, 2.6, 2.7), strict=True)}
    seen = {}

    def judge(step_losses):
        steps = iter(step_losses)

        def evaluate(self, model, **_):
            step = next(steps)
            seen[step] = {name: weight.clone() for name, weight in model.palm.state_dict().items()}
            return {"eval/loss": losses[step]}

        return evaluate

    options = {"num_steps": 12, "length": 16, "batch_size": 2, "held_out": TEXT[:60]}
    loop = TextLoop(lr=1e-2, eval_every=2, patience=3, progress=False)
    monkeypatch.setattr(HeldOutText, "evaluate", judge([2, 4, 6, 8, 10]))
    palm = new_palm()
    found = pretrain(palm, TEXT, ByteTokenizer(), loop=loop, **options)
    assert found.best_step == 4 and found.metrics["eval/loss"] == 2.0
    assert all(torch.equal(weight, seen[4][name]) for name, weight in palm.state_dict().items())

    class Kill(Samples):
        def take(self, palm, step, *, scope=None):
            if step == 8:
                raise OSError("the power is gone")

    saved = {**vars(loop), "run_dir": tmp_path / "run"}
    monkeypatch.setattr(HeldOutText, "evaluate", judge([2, 4, 6, 8]))
    with pytest.raises(OSError, match="power"):
        pretrain(new_palm(), TEXT, ByteTokenizer(), loop=TextLoop(**{**saved, "samples": Kill([], None)}), **options)
    monkeypatch.setattr(HeldOutText, "evaluate", judge([8, 10]))
    other = new_palm()
    found = pretrain(other, TEXT, ByteTokenizer(), loop=TextLoop(**{**saved, "resume": True}), **options)
    assert found.best_step == 4
    assert all(torch.equal(weight, seen[4][name]) for name, weight in other.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loop": TextLoop(lr=1e-2, patience=2)}, "hold text out"),
        ({"loop": TextLoop(lr=1e-2, eval_every=0)}, r"eval_every \(0\)"),
        ({"loop": TextLoop(lr=1e-2, resume=True)}, "give run_dir"),
        ({"length": 10**6}, r"length \(1000000"),
        ({"tokenizer": Halves()}, "tokenizer has 676 ids"),
        ({"held_out": TEXT[:1]}, r"number of tokens \(1\)"),
    ],
)
def test_what_cannot_be_is_refused_before_a_step(options, message):
    with pytest.raises(ValueError, match=message):
        pretrain(new_palm(), TEXT, **{"tokenizer": ByteTokenizer(), "num_steps": 1, **options})
