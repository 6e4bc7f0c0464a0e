"""The native step against whole passes of the model, in each build of it; when it is taken, and when it is not."""

import shutil
import subprocess
import sys
import types

import pytest
import torch

from palm_rlhf_pytorch import processor
from palm_rlhf_pytorch.lora import Adapter
from palm_rlhf_pytorch.palm import PaLM, generate_responses, native
from palm_rlhf_pytorch.palm.decoding import Decoder
from palm_rlhf_pytorch.palm.native_decoding import NativeDecoder, decodes_natively, new_decoder
from palm_rlhf_pytorch.processor import is_allowed

SIZES = {"num_tokens": 203, "dim": 64, "dim_head": 32, "heads": 5, "ff_mult": 1, "depth": 2}
LENGTHS = (131, 3, 70)  # the longest needs two looks at its keys, one of them over a part
MANY = 6


def read(palm: PaLM, ids: torch.Tensor, mask: torch.Tensor | None, adapter=None) -> NativeDecoder:
    """A decoder that has read ids (b, n), padded on the left."""
    batch, length = ids.shape
    decoder = NativeDecoder(palm, batch=batch, room=length + MANY, adapter=adapter)
    cache = palm.new_cache(batch, length)
    palm.embed(ids, mask=mask, adapter=adapter, cache=cache)
    decoder.take(cache, torch.arange(batch), torch.arange(batch), end=length)
    return decoder


def steps(decoder: NativeDecoder, new: torch.Tensor) -> torch.Tensor:
    """Logits (b, t, v) after each of new tokens (b, t)."""
    found = []
    for tokens in new.unbind(dim=1):
        found.append(decoder(tokens, span=decoder.span))
        decoder.filled += 1
    return torch.stack(found, dim=1)


def whole(palm: PaLM, ids: torch.Tensor, mask: torch.Tensor | None, new: torch.Tensor, scope=None) -> torch.Tensor:
    """The same by one pass over everything."""
    if mask is not None:
        mask = torch.cat((mask, torch.ones_like(new, dtype=torch.bool)), dim=1)
    return palm(torch.cat((ids, new), dim=1), mask=mask, finetune_scope=scope)[:, ids.shape[1] :]


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"qk_rmsnorm": True}, {"rotary_xpos_scale_base": None}, {"heads": 1}, {"dim_head": 64, "heads": 4}]
)
@pytest.mark.parametrize("scope", [None, "a"])
@pytest.mark.parametrize("padded", [False, True])
def test_steps_equal_a_whole_pass(native_build, make_palm, ragged, changes, scope, padded):
    palm = make_palm(finetune_scopes=("a",), **(SIZES | changes))
    ids, mask = ragged(*LENGTHS) if padded else (torch.randint(0, 203, (3, 131)), None)
    new = torch.randint(0, 203, (3, MANY))
    adapter = palm.finetune_modules["a"] if scope else None
    found, expected = steps(read(palm, ids, mask, adapter), new), whole(palm, ids, mask, new, scope)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("scope", [None, "a"])
@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_steps_in_bfloat16_are_as_near_float32_as_torchs_own(native_build, make_palm, scope, batch):
    palm = make_palm(finetune_scopes=("a",), **SIZES).bfloat16()
    exact = make_palm(finetune_scopes=("a",), **SIZES)
    exact.load_state_dict({name: weight.float() for name, weight in palm.state_dict().items()})
    ids, new = torch.randint(0, 203, (batch, 131)), torch.randint(0, 203, (batch, MANY))
    adapter = palm.finetune_modules["a"] if scope else None
    expected = whole(exact, ids, None, new, scope)
    torchs = (whole(palm, ids, None, new, scope).float() - expected).pow(2).mean().sqrt()
    found = steps(read(palm, ids, None, adapter), new)
    assert found.dtype == torch.bfloat16
    assert 0 < (found.float() - expected).pow(2).mean().sqrt() < 1.2 * torchs


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_hang_on_the_others(native_build, make_palm, dtype):
    palm = make_palm(**SIZES).to(dtype)
    ids, new = torch.randint(0, 203, (9, 131)), torch.randint(0, 203, (9, MANY))
    together = steps(read(palm, ids, None), new)
    cache = palm.new_cache(9, 131)
    palm.embed(ids, mask=None, adapter=None, cache=cache)
    for rows in ([4], [0, 8], [1, 2, 3, 4, 5]):
        decoder, chosen = NativeDecoder(palm, batch=len(rows), room=140, adapter=None), torch.tensor(rows)
        decoder.take(cache, torch.arange(len(rows)), chosen, end=131)
        assert torch.equal(steps(decoder, new[chosen]), together[chosen])


THREADS = """
import torch
from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.palm.native_decoding import NativeDecoder

for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    palm = PaLM(num_tokens=203, dim=64, dim_head=32, heads=5, ff_mult=1, depth=2).to(dtype)
    found = []
    with torch.no_grad():
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            decoder = NativeDecoder(palm, batch=3, room=150, adapter=None)
            found.append(torch.stack([decoder(torch.tensor([5, 6, k]), span=1) for k in range(140)]))
            decoder.filled = 139
            found[-1] = torch.cat((found[-1], decoder(torch.tensor([5, 6, 7]), span=1)[None]))
    assert all(torch.equal(each, found[0]) for each in found)
"""


def test_bits_do_not_hang_on_the_number_of_threads():
    if native.best_build() is None:
        pytest.skip("needs a build of the native code: GCC when the package is installed, and an x86 processor")
    # in a process of its own: what forks from one that had several threads would wait for them
    assert subprocess.run([sys.executable, "-c", THREADS], timeout=120).returncode == 0


@torch.no_grad()
def test_rows_that_are_kept_go_on_as_if_alone(native_build, make_palm, ragged):
    palm = make_palm(**SIZES)
    ids, mask = ragged(*LENGTHS)
    new = torch.randint(0, 203, (3, MANY))
    expected = whole(palm, ids, mask, new)
    decoder = read(palm, ids, mask)
    torch.testing.assert_close(steps(decoder, new[:, :2]), expected[:, :2], atol=1e-4, rtol=0)
    decoder.keep(torch.tensor([1, 2]))
    torch.testing.assert_close(steps(decoder, new[1:, 2:]), expected[1:, 2:], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_where_they_are_and_never_written(native_build, make_palm, dtype):
    palm = make_palm(finetune_scopes=("a",), **SIZES).to(dtype)
    before = {name: weight.clone() for name, weight in palm.state_dict().items()}
    decoder = read(palm, torch.randint(0, 203, (2, 7)), None, palm.finetune_modules["a"])
    steps(decoder, torch.randint(0, 203, (2, MANY)))
    assert [layer.into for layer in decoder._layers] == [layer.in_proj.weight.data_ptr() for layer in palm.layers]
    assert all(torch.equal(weight, before[name]) for name, weight in palm.state_dict().items())


@torch.no_grad()
def test_a_small_adapter_counts_in_bfloat16(native_build, make_palm):
    palm = make_palm(finetune_scopes=("a",), **SIZES).bfloat16()
    for lora in palm.finetune_modules["a"].layers.values():
        for part in (lora.q, lora.k, lora.v, lora.o):
            part.B.mul_(2.0**-6)
    ids, new = torch.randint(0, 203, (2, 7)), torch.randint(0, 203, (2, MANY))
    plain, adapted = (steps(read(palm, ids, None, each), new) for each in (None, palm.finetune_modules["a"]))
    assert not torch.equal(plain, adapted)


@torch.no_grad()
def test_generation_takes_it_and_draws_what_the_whole_pass_gives(native_build, make_palm, ragged):
    palm = make_palm(**SIZES)
    assert isinstance(palm.new_decoder(batch=2, room=9, adapter=None, steps=3), NativeDecoder)
    ids, mask = ragged(*LENGTHS)
    greedy = palm.generate(160, ids, prompt_mask=mask, max_new_tokens=9, temperature=0.0)
    for row in range(3):
        text = torch.cat((ids[row][mask[row]], greedy[row]))
        assert palm(text[None])[0, -10:-1].argmax(dim=-1).tolist() == greedy[row].tolist()
    out = generate_responses(palm, ids, mask, max_new_tokens=9)
    logits = whole(palm, ids, mask, torch.cat((out.tokens[:, :1], out.tokens), dim=1)[:, 1:])
    drawn = logits.log_softmax(dim=-1)[:, :-1].gather(-1, out.tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(out.logprobs[:, 1:], drawn, atol=2e-4, rtol=0)


@torch.no_grad()
def test_what_there_is_not_is_refused_before_anything_is_read(native_build, make_palm):
    decoder = read(make_palm(**SIZES), torch.randint(0, 203, (2, 7)), None)
    with pytest.raises(ValueError, match=r"tokens \(3,\) must be one for each of 2 rows"):
        decoder(torch.tensor([3, 4, 5]), span=decoder.span)
    for bad in (-1, 203, 2**40):
        with pytest.raises(IndexError, match=rf"tokens\[1\] \({bad}\) must be from 0 to 202"):
            decoder(torch.tensor([3, bad]), span=decoder.span)
    assert decoder.positions.tolist() == [7, 7]
    decoder.filled = decoder.room
    with pytest.raises(IndexError, match="room for 32 tokens"):
        decoder(torch.tensor([3, 4]), span=decoder.span)


def test_rows_that_end_early_leave_the_others_draws_alone(native_build, make_palm):
    palm = make_palm(**(SIZES | {"num_tokens": 5}))
    with torch.no_grad():
        palm.token_emb.weight.mul_(0.05)  # nearly uniform: a row ends within a few tokens
    prompts = torch.randint(0, 5, (9, 3))
    free, ended = (
        generate_responses(palm, prompts, max_new_tokens=40, eos_token=eos, generator=torch.Generator().manual_seed(3))
        for eos in (None, 4)
    )
    assert len(set(ended.mask.sum(dim=-1).tolist())) > 3
    for row in range(9):
        tokens = free.tokens[row].tolist()
        expected = tokens[: tokens.index(4) + 1] if 4 in tokens else tokens
        assert ended.tokens[row][ended.mask[row]].tolist() == expected


@pytest.mark.parametrize(
    ("changes", "dtype", "natively"),
    [
        ({}, torch.float32, True),
        ({}, torch.bfloat16, True),
        ({}, torch.float16, False),
        ({}, torch.float64, False),
        ({"dim": 48}, torch.float32, False),
        ({"dim_head": 40}, torch.float32, False),
        ({"dim_head": 288, "heads": 1}, torch.float32, False),
    ],
)
def test_which_models_it_is_for(native_build, make_palm, changes, dtype, natively):
    palm = make_palm(**(SIZES | changes)).to(dtype)
    assert decodes_natively(palm) == natively
    kind = NativeDecoder if natively else Decoder
    assert isinstance(new_decoder(palm, batch=1, room=3, adapter=None, steps=2), kind)


def test_it_is_not_for_autocast_nor_for_weights_of_another_dtype_layout_or_class(native_build, make_palm):
    palm = make_palm(**SIZES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not decodes_natively(palm)
    assert decodes_natively(palm)
    palm.layers[1].in_proj.weight.data = palm.layers[1].in_proj.weight.data.bfloat16()
    assert not decodes_natively(palm)
    palm = make_palm(**SIZES)
    palm.layers[1].out_proj.weight.data = palm.layers[1].out_proj.weight.data.T.contiguous().T
    assert not decodes_natively(palm)
    palm.layers[1] = torch.nn.Sequential(palm.layers[1])
    with pytest.raises(TypeError, match=r"layers\.1 is a Sequential"):
        new_decoder(palm, batch=1, room=3, adapter=None, steps=2)


@torch.no_grad()
def test_where_nothing_was_compiled_torch_decodes(without, make_palm):
    palm = make_palm(**SIZES)
    assert isinstance(palm.new_decoder(batch=2, room=9, adapter=None, steps=3), Decoder)
    prompt = torch.randint(0, 203, (7,))
    tokens = palm.generate(16, prompt, temperature=0.0)
    assert palm(torch.cat((prompt, tokens))[None])[0, 6:-1].argmax(dim=-1).tolist() == tokens.tolist()


@torch.no_grad()
def test_layers_may_differ_in_rank_norm_and_gains(native_build, make_palm):
    palm = make_palm(finetune_scopes=("a",), qk_rmsnorm=True, **SIZES)
    wider = Adapter(depth=2, dim=64, dim_head=32, heads=5, r=40)
    for lora in (wider.layers["1"].q, wider.layers["1"].v, wider.layers["1"].o):
        lora.B.normal_(std=0.1)
    palm.finetune_modules["a"].layers["1"] = wider.layers["1"]
    palm.layers[1].norm.eps = 0.5
    palm.layers[0].norm.weight.data = torch.rand(128)[::2]
    palm.layers[1].norm.weight.data = torch.rand(1).expand(64)
    palm.layers[0].k_norm.double()
    ids, new = torch.randint(0, 203, (3, 11)), torch.randint(0, 203, (3, MANY))
    assert decodes_natively(palm, palm.finetune_modules["a"])
    found = steps(read(palm, ids, None, palm.finetune_modules["a"]), new)
    torch.testing.assert_close(found, whole(palm, ids, None, new, "a").float(), atol=1e-3, rtol=0)
    palm.layers[1].scale *= 2
    assert not decodes_natively(palm)


@torch.no_grad()
@pytest.mark.parametrize("default", ["meta", torch.float64, torch.bfloat16])
def test_torchs_defaults_are_not_its_own(native_build, make_palm, default):
    palm, prompt = make_palm(finetune_scopes=("a",), **SIZES), torch.randint(0, 203, (2, 7))
    settings = {"max_new_tokens": MANY, "adapter": palm.finetune_modules["a"]}
    expected = generate_responses(palm, prompt, generator=torch.Generator().manual_seed(1), **settings)
    dtype = torch.get_default_dtype()
    try:
        if default == "meta":
            with torch.device("meta"):
                decoder = read(palm, prompt, None)
                assert decoder(torch.tensor([3, 4], device="cpu"), span=8).isfinite().all()
            return
        torch.set_default_dtype(default)
        found = generate_responses(palm, prompt, generator=torch.Generator().manual_seed(1), **settings)
    finally:
        torch.set_default_dtype(dtype)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logprobs.float(), expected.logprobs, atol=0.05, rtol=0)


def test_a_build_of_other_sources_is_refused(native_build, monkeypatch):
    assert native.load(native_build) is not None
    monkeypatch.setattr(native, "zlib", types.SimpleNamespace(crc32=lambda _: 5))
    assert native.load.__wrapped__(native_build) is None
    monkeypatch.undo()
    assert native.load.__wrapped__("of_no_processor") is None


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None or not is_allowed("avx2", "fma", level="AVX2"),
    reason="needs Linux, GCC and a processor with AVX2: run it there after an installation",
)
def test_an_installation_compiles_every_build():
    assert [name for name, _, _ in native.BUILDS if native.load(name) is None] == []
    assert native.best_build() is not None


def test_what_holds_torch_to_an_instruction_set_holds_it_too(monkeypatch):
    flags = native.BUILDS[-1][1]
    monkeypatch.setattr(processor, "this_processor", lambda: processor.Processor(False, frozenset(flags)))
    assert is_allowed(*flags, level="AVX2") and not is_allowed(*native.BUILDS[0][1], level="AVX512_CORE_BF16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert not is_allowed(*flags, level="AVX2")
