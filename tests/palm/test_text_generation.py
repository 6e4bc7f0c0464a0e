"""Text in, text out: against `palm.generate`, and on a model that says what it is told to."""

import gc
import weakref

import pytest
import torch

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.attention import KVCache
from palm_rlhf_pytorch.palm.scopes import Scopes
from palm_rlhf_pytorch.palm.text_generation import generate_text, stream
from palm_rlhf_pytorch.text.hf_tokenizer import HFTokenizer
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from tests.text.tiny_bpe import tiny_bpe

BYTES = ByteTokenizer()
EOS = BYTES.eos_token


class Scripted:
    """Says fixed ids, a list for each row, whatever the prompt; counts the rows of each step."""

    causal, num_tokens, device = True, 300, torch.device("cpu")

    def __init__(self, *scripts, max_length=float("inf"), broken_at=None):
        self.scripts = [script.encode() if isinstance(script, str) else script for script in scripts]
        self.finetune_modules, self.max_length, self.broken_at, self.batches = Scopes(), max_length, broken_at, []
        self.filled, self.said, self.rows = 0, 0, range(len(scripts))

    def new_cache(self, batch, max_length):
        return KVCache(depth=1, batch=batch, max_length=max_length, dim_head=2, dtype=torch.float32, device="cpu")

    def embed(self, seq, *, since, **_):
        return torch.zeros(len(seq), seq.shape[1] - since, 3)

    def new_decoder(self, **_):
        return self

    def take(self, *_, **__):
        pass

    def keep(self, rows):
        self.rows = [self.rows[row] for row in rows.tolist()]

    @property
    def span(self):
        return 1

    def read_out(self, hidden):
        logits = torch.full((len(self.rows), self.num_tokens), -50.0)
        for place, row in enumerate(self.rows):
            script = self.scripts[row]
            logits[place, script[self.said] if self.said < len(script) else EOS] = 50.0
        self.said += 1
        self.batches.append(len(self.rows))
        return logits * (float("nan") if self.said == self.broken_at else 1)

    def __call__(self, tokens, *, span):
        return self.read_out(tokens)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def palm():
    torch.manual_seed(0)
    model = PaLM(num_tokens=259, dim=16, depth=2, heads=3, dim_head=4).eval()
    with torch.no_grad():
        model.token_emb.weight.mul_(5)
    return model


@pytest.mark.parametrize(
    ("said", "stop", "pieces"),
    [
        ("né🙂!", (), ["n", "é", "🙂", "!"]),
        ("ab\n\nHuman: c", "\n\nHuman:", ["a", "b"]),
        ("ab\n\nHugo", ["\n\nHuman:"], ["a", "b", "\n\nHug", "o"]),  # told apart late
        ("ab\n", ["\n\n"], ["a", "b", "\n"]),  # a beginning that the end of the text leaves alone
        ("a🙂b", ["🙂"], ["a"]),
        (b"a\xf0\x9f", (), ["a", "\ufffd"]),  # half a character
        ([97, 280, 98], (), ["a", "b"]),  # an id that the tokenizer has not
        ([97, EOS, 98], (), ["a"]),
    ],
)
def test_stream_gives_whole_characters_and_nothing_of_a_stop_string(said, stop, pieces):
    found = list(stream(Scripted(said), "q", tokenizer=BYTES, stop=stop))
    assert found == pieces
    assert generate_text(Scripted(said), "q", tokenizer=BYTES, stop=stop) == "".join(pieces)


def test_rows_leave_the_batch_at_their_stop_string():
    model = Scripted("one. two", "a longer one. two", "no dot")
    texts = generate_text(model, ["q", "prompt", "pr"], tokenizer=BYTES, stop=". ")
    assert texts == ["one", "a longer one", "no dot"]
    # 5 bytes to the first stop; then 2 of 3 rows, then after EOS of "no dot" (7th) 1 row, to the 14th byte
    assert model.batches == [3] * 5 + [2] * 2 + [1] * 7


@pytest.mark.parametrize("stop", [(), ("e", "\n", "\x00")])
@pytest.mark.parametrize("tokenizer", [BYTES, HFTokenizer(tiny_bpe())], ids=["bytes", "bpe"])
def test_streams_and_texts_are_what_generate_draws(palm, make_palm, stop, tokenizer):
    model = palm if tokenizer is BYTES else make_palm(num_tokens=300)  # of more ids than the tokenizer's
    prompt, eos = "Hé 🙂", tokenizer.eos_token
    ids = tokenizer.encode(prompt)
    for seed in range(6):
        drawn = model.generate(len(ids) + 40, ids, eos_token=eos, pad_value=eos, generator=seeded(seed))
        expected = tokenizer.decode([token for token in drawn.tolist() if token < tokenizer.num_tokens])
        expected = expected[: min((expected.find(mark) for mark in stop if mark in expected), default=None)]
        options = {"tokenizer": tokenizer, "max_new_tokens": 40, "stop": stop}
        assert "".join(model.stream(prompt, generator=seeded(seed), **options)) == expected
        assert model.generate_text(prompt, generator=seeded(seed), **options) == expected


def test_a_batch_is_its_prompts_one_by_one(palm):
    prompts = ["a", "", "some more"]
    options = {"tokenizer": BYTES, "max_new_tokens": 9, "temperature": 0.0, "stop": "e"}
    texts = palm.generate_text(prompts, num_samples=2, **options)
    alone = [palm.generate_text(prompt, **options) for prompt in prompts]
    assert texts == [text for text in alone for _ in range(2)]
    assert alone[1] == palm.generate_text(torch.tensor([BYTES.bos_token]), **options)
    assert palm.generate_text([], **options) == [] and palm.generate_text(["a"], **options) == alone[:1]


def test_streams_read_in_turn_do_not_disturb_each_other(palm):
    alone = [list(palm.stream("ab", tokenizer=BYTES, max_new_tokens=20, generator=seeded(s))) for s in (1, 2)]
    first, second = (palm.stream("ab", tokenizer=BYTES, max_new_tokens=20, generator=seeded(s)) for s in (1, 2))
    found = [[], []]
    for _ in range(20):
        for pieces, text in zip((first, second), found, strict=True):
            text += [piece for piece in [next(pieces, None)] if piece is not None]
    assert found == alone


def test_between_pieces_the_caller_is_in_its_own_modes(palm):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in palm.stream("ab", tokenizer=BYTES, max_new_tokens=4, generator=seeded()):
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")


def test_leaving_a_stream_frees_its_cache(palm, monkeypatch):
    made = []
    build = palm.new_decoder

    def watched(**sizes):
        decoder = build(**sizes)
        made.append(weakref.ref(decoder))
        return decoder

    monkeypatch.setattr(palm, "new_decoder", watched)
    pieces = palm.stream("ab", tokenizer=BYTES, max_new_tokens=50, generator=seeded())
    next(pieces)
    gc.disable()
    try:
        assert made[0]() is not None
        pieces.close()
        assert made[0]() is None
    finally:
        gc.enable()


def test_a_text_ends_where_the_context_is_full():
    assert generate_text(Scripted("abcdef", max_length=6), "1234", tokenizer=BYTES) == "ab"
    assert list(stream(Scripted("abcdef", max_length=6), "12345", tokenizer=BYTES, max_new_tokens=3)) == ["a"]
    with pytest.raises(ValueError, match="prompt 0 has 6 tokens; of this model's max_length 6"):
        stream(Scripted("a", max_length=6), "123456", tokenizer=BYTES)


def test_logits_that_are_not_finite_end_a_stream_before_their_token():
    pieces = stream(Scripted("abc", broken_at=2), "q", tokenizer=BYTES)
    assert next(pieces) == "a"
    with pytest.raises(ValueError, match="not finite"):
        next(pieces)


class Nameless(ByteTokenizer):
    bos_token = None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": "", "tokenizer": Nameless()}, ValueError, "prompt 0 is empty"),
        ({"prompt": 3}, TypeError, "int; generate_text takes|prompt is of type int"),
        ({"prompt": torch.tensor([[1]])}, ValueError, r"shape \(1, 1\)"),
        ({"prompt": torch.tensor([300])}, ValueError, "id 300"),
        ({"stop": [""]}, ValueError, r"stop\[0\]"),
        ({"max_new_tokens": 2.5}, TypeError, r"max_new_tokens \(2.5\)"),
        ({"max_new_tokens": 0}, ValueError, r"max_new_tokens \(0\)"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"eos_token": 300}, ValueError, r"eos_token \(300\)"),
        ({"finetune_scope": "none"}, ValueError, "unknown scope"),
    ],
)
def test_mistakes_are_told_by_the_call(palm, changes, error, message):
    given = {"prompt": "a", "tokenizer": BYTES} | changes
    for call in (palm.stream, palm.generate_text):
        with pytest.raises(error, match=message):
            call(**given)


def test_models_that_cannot_continue_are_refused(make_palm):
    with pytest.raises(ValueError, match="tokenizer has 259 ids, the model only num_tokens=37"):
        make_palm().stream("a", tokenizer=BYTES)
    with pytest.raises(ValueError, match="causal=False"):
        make_palm(num_tokens=259, causal=False).stream("a", tokenizer=BYTES)


def test_hugging_face_tokenizers_are_taken_as_they_are(make_palm):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    palm = make_palm(num_tokens=3)
    text = palm.generate_text("a b", tokenizer=backend, max_new_tokens=4, temperature=0.0)
    ids = palm.generate(6, torch.tensor([0, 1]), temperature=0.0)
    assert text == backend.decode(ids.tolist())
    with pytest.raises(TypeError, match=r"tokenizer \(int\)"):
        palm.generate_text("a b", tokenizer=3)
