"""Decoding a token at a time against whole passes: precision, adapters, spans of the cache, rows that leave."""

import pytest
import torch

from palm_rlhf_pytorch.palm import PaLM, generate_responses
from palm_rlhf_pytorch.palm.decoding import SPAN, STEPS_WORTH_PACKING, Decoder

MANY = STEPS_WORTH_PACKING + 3


def decoder_after(palm: PaLM, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings: object) -> Decoder:
    """A decoder that has read ids (b, n), padded on the left."""
    given = {"adapter": None, "steps": MANY, "replayable": False} | settings
    batch, length = ids.shape
    decoder = Decoder(palm, batch=batch, room=length + MANY, **given)
    cache = palm.new_cache(batch, length)
    palm.embed(ids, mask=mask, adapter=given["adapter"], cache=cache)
    rows = torch.arange(batch)
    decoder.take(cache, rows, rows, end=length)
    return decoder


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"qk_rmsnorm": True}, {"rotary_xpos_scale_base": None}, {"heads": 1}])
@pytest.mark.parametrize("steps", [MANY, 1])
@pytest.mark.parametrize("replayable", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_steps_equal_a_whole_pass(make_palm, ragged, monkeypatch, settings, steps, replayable, padded):
    monkeypatch.setattr("palm_rlhf_pytorch.palm.decoding.SPAN", 5)  # several spans within the test's few tokens
    palm = make_palm(finetune_scopes=("a",), **settings)
    prompts, mask = ragged(7, 2, 5) if padded else (torch.randint(0, 37, (3, 7)), None)
    new = torch.randint(0, 37, (3, MANY))
    whole_mask = None if mask is None else torch.cat((mask, torch.ones_like(new, dtype=torch.bool)), dim=1)
    adapter = palm.finetune_modules["a"]
    hidden = palm.embed(torch.cat((prompts, new), dim=1), mask=whole_mask, adapter=adapter)
    expected = palm.to_logits(hidden[:, 7:])
    decoder = decoder_after(palm, prompts, mask, adapter=adapter, steps=steps, replayable=replayable)
    for step in range(MANY):
        found = decoder(new[:, step], span=decoder.span)
        decoder.filled += 1
        torch.testing.assert_close(found, expected[:, step], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("replayable", [False, True])
def test_rows_that_are_kept_go_on_as_if_alone(make_palm, ragged, replayable):
    palm = make_palm()
    prompts, mask = ragged(7, 2, 5)
    new = torch.randint(0, 37, (3, 4))
    decoder = decoder_after(palm, prompts, mask, replayable=replayable)
    for step in range(4):
        if step == 2:
            decoder.keep(torch.tensor([1, 2]))
        rows = [0, 1, 2] if step < 2 else [1, 2]
        found = decoder(new[rows, step], span=decoder.span)
        decoder.filled += 1
        for row, logits in zip(rows, found, strict=True):
            alone = torch.cat((prompts[row][mask[row]], new[row, : step + 1]))
            torch.testing.assert_close(logits, palm(alone[None])[0, -1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_small_adapter_counts_in_half_precision(make_palm):
    palm = make_palm(finetune_scopes=("a",), depth=1).bfloat16()
    adapter, prompts = palm.finetune_modules["a"], torch.randint(0, 37, (2, 5))
    for lora in (adapter.layers["0"].q, adapter.layers["0"].k, adapter.layers["0"].v):
        lora.B.zero_()
    lora = adapter.layers["0"].o
    lora.B.fill_(2.0**-10)
    lora.A.fill_(2.0**-4)
    merged = palm.layers[0].merged(adapter.layers["0"])[1]
    assert (
        torch.equal(merged, palm.layers[0].out_proj.weight)
        or (merged != palm.layers[0].out_proj.weight).float().mean() < 0.2
    )
    plain, adapted = (decoder_after(palm, prompts, adapter=chosen) for chosen in (None, adapter))
    token = torch.tensor([3, 4])
    assert not torch.equal(adapted(token, span=6), plain(token, span=6))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stay_as_they_were_bit_for_bit(make_palm, dtype):
    palm = make_palm(finetune_scopes=("a",)).to(dtype)
    before = {name: weight.clone() for name, weight in palm.state_dict().items()}
    palm.generate(30, torch.tensor([1, 2, 3]), finetune_scope="a")
    assert all(torch.equal(weight, before[name]) for name, weight in palm.state_dict().items())
    assert not hasattr(palm, "decoder") and list(palm.buffers()) == []


@torch.no_grad()
def test_autocast_and_half_precision_sample_from_what_a_whole_pass_gives(make_palm):
    palm = make_palm(finetune_scopes=("a",))
    with torch.no_grad():
        palm.token_emb.weight.mul_(0.1)  # logits of deviation 0.5: bfloat16 rounds them at 0.002
    prompts, adapter = torch.randint(0, 37, (3, 7)), palm.finetune_modules["a"]
    for model, autocast in ((palm, True), (palm.bfloat16(), False)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = generate_responses(model, prompts, max_new_tokens=MANY, adapter=adapter)
            logits = model(torch.cat((prompts, out.tokens), dim=1), finetune_scope="a")[:, 6:-1].float()
        expected = logits.log_softmax(dim=-1).gather(-1, out.tokens[..., None])[..., 0]
        torch.testing.assert_close(out.logprobs, expected, atol=0.05, rtol=0)


def test_rows_that_end_early_leave_the_others_draws_alone(make_palm):
    palm = make_palm(num_tokens=5)
    with torch.no_grad():
        palm.token_emb.weight.mul_(0.1)  # nearly uniform: a row ends within a few tokens
    prompts = torch.randint(0, 5, (9, 3))
    free = generate_responses(palm, prompts, max_new_tokens=40, generator=torch.Generator().manual_seed(3))
    ended = generate_responses(
        palm, prompts, max_new_tokens=40, eos_token=4, generator=torch.Generator().manual_seed(3)
    )
    assert len(set(ended.mask.sum(dim=-1).tolist())) > 3
    for row in range(9):
        tokens = free.tokens[row].tolist()
        expected = tokens[: tokens.index(4) + 1] if 4 in tokens else tokens
        assert ended.tokens[row][ended.mask[row]].tolist() == expected


def test_spans_are_multiples_and_the_room_is_one(make_palm):
    palm = make_palm()
    decoder = Decoder(palm, batch=1, room=2 * SPAN + 7, adapter=None, steps=1, replayable=True)
    spans = []
    for decoder.filled in (0, SPAN - 1, SPAN, 2 * SPAN, 2 * SPAN + 6):
        spans.append(decoder.span)
    assert spans == [SPAN, SPAN, 2 * SPAN, 3 * SPAN, 3 * SPAN]
    assert decoder.cache.shape[-2] == 3 * SPAN


def test_a_layer_in_a_wrapper_is_refused_not_left_out(make_palm):
    palm = make_palm()
    palm.layers[1] = torch.nn.Sequential(palm.layers[1])
    with pytest.raises(TypeError, match=r"layers\.1 is a Sequential"):
        Decoder(palm, batch=1, room=3, adapter=None, steps=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run it on a machine that has one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eos_token", [None, 4])
def test_graphs_on_cuda_draw_what_steps_without_them_draw(make_palm, monkeypatch, dtype, eos_token):
    palm = make_palm(num_tokens=5, finetune_scopes=("a",)).to("cuda", dtype)
    prompts = torch.randint(0, 5, (9, 3), device="cuda")
    settings = {"max_new_tokens": SPAN + 40, "eos_token": eos_token, "adapter": palm.finetune_modules["a"]}
    drawn = []
    for graphs in (True, False):
        if not graphs:
            monkeypatch.setattr("palm_rlhf_pytorch.palm.graphs.StepGraphs._replay", lambda self, span: self.step(span))
        generator = torch.Generator("cuda").manual_seed(3)
        drawn.append(generate_responses(palm, prompts, generator=generator, **settings))
    assert torch.equal(drawn[0].mask, drawn[1].mask)
    assert torch.equal(drawn[0].tokens[drawn[0].mask], drawn[1].tokens[drawn[1].mask])
