"""Generation: the cached route against the uncached one, ragged prompts, ends, room, randomness, refused input."""

import threading

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch.attention import KVCache
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.palm.decoding import Decoder
from palm_rlhf_pytorch.palm.generation import generate_responses
from palm_rlhf_pytorch.tensors import align_right

MODELS = [{}, {"flash_attn": True}, {"qk_rmsnorm": True}, {"rotary_xpos_scale_base": None}]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# cached = uncached


@torch.no_grad()
@pytest.mark.parametrize("scope", [None, "a"])
@pytest.mark.parametrize("settings", MODELS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("chunks", [(7, 1, 1, 1, 1), (4, 3, 2, 1, 1), (1,) * 11])
def test_cached_logits_equal_uncached_ones_at_every_position(make_palm, ragged, scope, settings, padding, chunks):
    palm = make_palm(finetune_scopes=("a",), **settings)
    lengths = (7, 7, 7) if padding == "none" else (7, 2, 5)
    prompts, prompt_mask = ragged(*lengths, left=padding != "right")
    ids = torch.cat((prompts, torch.randint(0, 37, (3, 4), generator=seeded())), dim=1)
    mask = F.pad(prompt_mask, (0, 4), value=True)
    adapter = palm.finetune_modules[scope] if scope else None
    whole = palm.to_logits(palm.embed(ids, mask=None if padding == "none" else mask, adapter=adapter))
    cache = palm.new_cache(3, 11)
    parts, begin = [], 0
    for size in chunks:
        part = slice(begin, begin + size)
        part_mask = None if mask[:, part].all() else mask[:, part]
        parts.append(palm.to_logits(palm.embed(ids[:, part], mask=part_mask, adapter=adapter, cache=cache)))
        begin += size
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask], whole[mask], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("scope", [None, "a"])
@pytest.mark.parametrize("settings", MODELS[:2])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reported_logprobs_are_those_of_an_uncached_pass(make_palm, ragged, scope, settings, left, temperature):
    palm = make_palm(finetune_scopes=("a",), **settings)
    prompts, mask = ragged(7, 2, 5, left=left)
    adapter = palm.finetune_modules[scope] if scope else None
    out = generate_responses(
        palm, prompts, mask, max_new_tokens=6, temperature=temperature, generator=seeded(), adapter=adapter
    )
    for row in range(3):
        prompt = prompts[row][mask[row]]
        logits = palm(torch.cat((prompt, out.tokens[row]))[None], finetune_scope=scope)[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(dim=-1).gather(-1, out.tokens[row][:, None])[:, 0]
        torch.testing.assert_close(out.logprobs[row], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def greedy_by_whole_passes(palm: PaLM, prompt: torch.Tensor, seq_len: int, **scope: str) -> list[int]:
    row = prompt
    while len(row) < seq_len:
        row = torch.cat((row, palm(row[None], **scope)[0, -1].argmax()[None]))
    return row[len(prompt) :].tolist()


@pytest.mark.parametrize("settings", MODELS)
@pytest.mark.parametrize(("left", "extra"), [(True, 0), (True, 4), (False, 0), (False, 3)])
def test_greedy_rows_of_unequal_prompts_equal_whole_passes_over_each(make_palm, ragged, settings, left, extra):
    palm = make_palm(finetune_scopes=("a",), **settings)
    prompts, mask = ragged(7, 2, 5, left=left, extra=extra)
    new = palm.generate(11, prompts, prompt_mask=mask, temperature=0.0, finetune_scope="a", pad_value=-1)
    assert new.shape == (3, 9)
    for row in range(3):
        expected = greedy_by_whole_passes(palm, prompts[row][mask[row]], 11, finetune_scope="a")
        assert new[row].tolist() == expected + [-1] * (9 - len(expected))  # each row has its own room: 4, 9 and 6
    assert palm.generate(11, prompts, prompt_mask=mask, temperature=0.0)[0].tolist() != new[0].tolist()


def test_permuted_prompts_give_permuted_responses(make_palm, ragged):
    palm = make_palm()
    prompts, mask = ragged(7, 2, 5)
    order = torch.tensor([2, 0, 1])
    straight = palm.generate(11, prompts, prompt_mask=mask, temperature=0.0)
    permuted = palm.generate(11, prompts[order], prompt_mask=mask[order], temperature=0.0)
    assert torch.equal(permuted, straight[order])


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_xpos_holds_at_8k_tokens_in_bfloat16_with_the_cache(fused):
    torch.manual_seed(0)
    palm = PaLM(num_tokens=17, dim=16, depth=2, dim_head=8, heads=2, ff_mult=1, flash_attn=True).eval()
    palm.token_emb.weight.normal_()
    palm = palm.bfloat16()
    ids = torch.randint(0, 17, (1, 8196))
    whole = palm.to_logits(palm.embed(ids))[:, 8192:].float()
    cache = palm.new_cache(1, 8196)
    palm.embed(ids[:, :8192], cache=cache)
    for layer in palm.layers:  # the prompt by the fused kernels, which are lean; the steps by either
        layer.fused = fused
    steps = [palm.to_logits(palm.embed(ids[:, place : place + 1], cache=cache)) for place in range(8192, 8196)]
    stepped = torch.cat(steps, dim=1).float()
    assert stepped.isfinite().all() and cache.keys.isfinite().all()
    assert float((stepped - whole).norm() / whole.norm()) < 0.02  # bfloat16 rounds at 0.004
    for layer in palm.layers:
        layer.fused = True
    assert palm.generate(8194, ids[0, :8191], temperature=0.0).shape == (3,)


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_generates_with_the_cache(make_palm, fused):
    palm = make_palm(flash_attn=fused, finetune_scopes=("a",))
    prompt = torch.tensor([[1, 2, 3], [3, 2, 1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = generate_responses(palm, prompt, max_new_tokens=5, temperature=0.0, adapter=palm.finetune_modules["a"])
        logits = palm(torch.cat((prompt, out.tokens), dim=1), finetune_scope="a")[:, 2:-1].float()
    expected = logits.log_softmax(dim=-1).gather(-1, out.tokens[..., None])[..., 0]
    torch.testing.assert_close(out.logprobs, expected, atol=0.5, rtol=0)  # logits of deviation 5, rounded at 0.4 %


def test_generation_reads_the_prompt_once_and_then_a_token_a_step(make_palm, monkeypatch):
    palm, embedded, stepped = make_palm(), [], []
    embed, step = palm.embed, Decoder.__call__
    monkeypatch.setattr(palm, "embed", lambda seq, **rest: (embedded.append(tuple(seq.shape)), embed(seq, **rest))[1])
    monkeypatch.setattr(
        Decoder, "__call__", lambda *args, **rest: (stepped.append(tuple(args[1].shape)), step(*args, **rest))[1]
    )
    palm.generate(9, torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]))
    assert embedded == [(2, 4)]
    assert stepped == [(2,)] * 4  # the last of five tokens is never embedded


def test_padding_that_no_row_needs_costs_nothing(make_palm, ragged, monkeypatch):
    palm = make_palm()
    embedded, embed = [], palm.embed
    monkeypatch.setattr(palm, "embed", lambda seq, **rest: (embedded.append(tuple(seq.shape)), embed(seq, **rest))[1])
    prompts, mask = ragged(4, 2, extra=50)
    palm.generate(6, prompts, prompt_mask=mask)
    assert embedded == [(2, 4)]


def test_prompts_are_read_in_passes_of_like_length_and_bounded_size(make_palm, ragged, monkeypatch):
    palm = make_palm()
    prompts, mask = ragged(7, 2, 5, 3)
    expected = palm.generate(11, prompts, prompt_mask=mask, temperature=0.0)
    embedded, embed = [], palm.embed
    monkeypatch.setattr(palm, "embed", lambda seq, **rest: (embedded.append(tuple(seq.shape)), embed(seq, **rest))[1])
    monkeypatch.setattr("palm_rlhf_pytorch.palm.generation.PREFILL_TOKENS", {"cpu": 14})
    assert torch.equal(palm.generate(11, prompts, prompt_mask=mask, temperature=0.0), expected)
    assert embedded == [(2, 3), (2, 7)]


# ends


class Script:
    """A model and its decoder that say what they are told: the prompt that begins with b gets script[b]."""

    num_tokens, causal, max_length, device = 12, True, 100, torch.device("cpu")

    def __init__(self, script: list[list[int]]) -> None:
        self.script, self.steps, self.batches = torch.tensor(script), 0, []
        self.rows = torch.zeros(len(script), dtype=torch.long)
        self.filled = self.span = 0

    @property
    def prompts(self) -> torch.Tensor:
        return torch.tensor([[row, 5] for row in range(len(self.script))])

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        return KVCache(
            depth=1, batch=batch, max_length=max_length, dim_head=2, dtype=torch.float32, device=torch.device("cpu")
        )

    def embed(self, seq: torch.Tensor, *, mask, adapter, dropout, cache, since) -> torch.Tensor:
        self.prefilled = seq[:, 0]
        return seq[:, :1, None].expand(-1, seq.shape[1] - since, 1)

    def new_decoder(self, *, batch: int, room: int, adapter, steps: int) -> "Script":
        return self

    def take(self, cache, rows: torch.Tensor, sources: torch.Tensor, *, end: int) -> None:
        self.rows[rows] = self.prefilled[sources]

    def keep(self, rows: torch.Tensor) -> None:
        self.rows = self.rows[rows]

    def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        assert torch.equal(hidden[:, 0], self.rows)
        return self._say()

    def __call__(self, tokens: torch.Tensor, *, span: int) -> torch.Tensor:
        assert torch.equal(tokens, self.script[self.rows, self.steps - 1])  # what was drawn comes back in
        return self._say()

    def _say(self) -> torch.Tensor:
        self.steps += 1
        self.batches.append(self.rows.tolist())
        return F.one_hot(self.script[self.rows, self.steps - 1], self.num_tokens).float() * 50


def test_rows_stop_at_their_eos_and_the_loop_when_all_have():
    model = Script([[4, 9, 5, 9, 1, 1, 1, 1], [3, 3, 3, 9, 2, 2, 2, 2], [9, 8, 8, 8, 8, 8, 8, 8]])
    out = generate_responses(model, model.prompts, max_new_tokens=8, eos_token=9)
    assert model.steps == 4
    assert out.mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert out.tokens[out.mask].tolist() == [4, 9, 3, 3, 3, 9, 9]
    assert out.ended.tolist() == [True, True, True]
    assert (out.logprobs[~out.mask] == 0).all()


def test_rows_that_have_ended_leave_the_batch_once_they_are_a_quarter_of_it():
    model = Script([[4, 4, 9, 1, 1], [9, 1, 1, 1, 1], [4, 4, 4, 4, 9], [3, 3, 9, 1, 1], [3, 3, 3, 9, 1]])
    out = generate_responses(model, model.prompts, max_new_tokens=5, eos_token=9)
    everyone = [0, 1, 2, 3, 4]
    assert model.batches == [everyone, everyone, everyone, [2, 4], [2]]  # one ended row of five is no quarter
    assert [row[real].tolist() for row, real in zip(out.tokens, out.mask, strict=True)] == [
        [4, 4, 9], [9], [4, 4, 4, 4, 9], [3, 3, 9], [3, 3, 3, 9],
    ]  # fmt: skip


def test_prompts_that_are_alike_are_read_once():
    model = Script([[4, 5], [6, 7], [8, 9]])
    model.rows = torch.zeros(5, dtype=torch.long)
    out = generate_responses(model, model.prompts[[2, 0, 2, 2, 0]], max_new_tokens=2)
    assert model.prefilled.tolist() == [0, 2]
    assert out.tokens.tolist() == [[8, 9], [4, 5], [8, 9], [8, 9], [4, 5]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_room_may_be_given_in_any_integer_dtype(dtype):
    model = Script([[4, 4, 4], [3, 9, 3]])
    out = generate_responses(model, model.prompts, max_new_tokens=torch.tensor([1, 3], dtype=dtype), eos_token=9)
    assert out.mask.sum(dim=-1).tolist() == [1, 2]


def test_what_is_called_each_step_runs_in_the_callers_modes():
    model, made = Script([[4, 5, 6]]), []
    generate_responses(model, model.prompts, max_new_tokens=3, on_step=lambda: made.append(torch.ones(1)))
    assert len(made) == 3 and not any(tensor.is_inference() for tensor in made)


def test_each_row_has_its_own_room():
    model = Script([[4, 4, 4, 4, 4], [3, 9, 3, 3, 3], [5, 5, 5, 9, 5], [6, 6, 6, 6, 9]])
    room = torch.tensor([1, 2, 3, 5])
    out = generate_responses(model, model.prompts, max_new_tokens=room, eos_token=9)
    assert out.mask.sum(dim=-1).tolist() == [1, 2, 3, 5]
    assert out.ended.tolist() == [False, True, False, True]  # row 2 draws its EOS after its room is used up
    assert model.steps == 5


def test_a_row_that_used_up_its_room_waits_for_the_others_within_the_models_range(make_palm, ragged):
    palm = make_palm(rotary_xpos_scale_base=1)
    longest = int(palm.max_length)
    prompts, mask = ragged(3, longest - 5)
    out = palm.generate(longest, prompts, prompt_mask=mask, temperature=0, pad_value=-1)
    assert (out >= 0).sum(dim=-1).tolist() == [longest - 3, 5]
    for row in range(2):
        alone = palm.generate(longest, prompts[row][mask[row]], temperature=0)
        assert torch.equal(out[row, : len(alone)], alone)


def test_without_eos_all_rows_run_to_their_room():
    model = Script([[4, 9, 9]])
    out = generate_responses(model, model.prompts, max_new_tokens=3)
    assert out.tokens.tolist() == [[4, 9, 9]] and not out.ended.any()


def test_each_step_is_reported():
    model, seen = Script([[4, 9, 9]]), []
    generate_responses(model, model.prompts, max_new_tokens=3, eos_token=9, on_step=lambda: seen.append(1))
    assert len(seen) == 2


def test_rows_are_padded_after_their_eos(make_palm, ragged):
    palm = make_palm()
    prompts, mask = ragged(7, 2, 5)
    free = palm.generate(20, prompts, prompt_mask=mask, temperature=0.0)
    eos = int(free[1, 3])
    new = palm.generate(20, prompts, prompt_mask=mask, temperature=0.0, eos_token=eos, pad_value=99)
    for row, room in enumerate((13, 18, 15)):
        tokens = free[row, :room].tolist()
        tokens = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        assert new[row].tolist() == tokens + [99] * (new.shape[1] - len(tokens))
    assert (new != 99).any(dim=0).all()  # no column of padding alone


def test_eos_in_the_prompt_is_a_token_like_any(make_palm):
    palm = make_palm()
    prompt = torch.tensor([7, 3, 7, 5])
    free = palm.generate(10, prompt, temperature=0.0)
    eos = 7 if 7 not in free.tolist() else next(token for token in range(37) if token not in free.tolist())
    prompt = prompt.masked_fill(prompt == 7, eos)
    free = palm.generate(10, prompt, temperature=0.0).tolist()
    expected = free[: free.index(eos) + 1] if eos in free else free
    assert palm.generate(10, prompt, temperature=0.0, eos_token=eos).tolist() == expected
    assert prompt.tolist() == [eos, 3, eos, 5]


def test_seq_len_counts_the_prompt(make_palm):
    palm = make_palm()
    assert palm.generate(12, torch.tensor([1, 2, 3, 4, 5])).shape == (7,)
    assert palm.generate(12, torch.tensor([[1, 2, 3, 4, 5]] * 2)).shape == (2, 7)
    assert palm.generate(12).shape == (1, 12)
    assert palm.generate(1).shape == (1, 1)
    assert palm.generate(6, torch.tensor([1, 2, 3, 4, 5])).shape == (1,)


def test_max_new_tokens_bounds_the_response_within_seq_len(make_palm):
    palm, prompt = make_palm(), torch.tensor([[3, 1, 4]])
    assert [palm.generate(9, prompt, max_new_tokens=count).shape[1] for count in (1, 4, 6, 50)] == [1, 4, 6, 6]
    assert palm.generate(9, max_new_tokens=2).shape == (1, 3)  # with the random token it starts from
    with pytest.raises(ValueError, match=r"max_new_tokens \(0\)"):
        palm.generate(9, prompt, max_new_tokens=0)


def test_a_single_prompt_takes_a_mask_too(make_palm):
    palm = make_palm()
    masked = palm.generate(9, torch.tensor([0, 0, 4, 5]), prompt_mask=torch.tensor([0, 0, 1, 1]).bool(), temperature=0)
    assert torch.equal(masked, palm.generate(9, torch.tensor([4, 5]), temperature=0))


# randomness and state


@pytest.mark.parametrize("prompt", [None, torch.tensor([[1, 2, 3], [3, 2, 1]])])
def test_generator_makes_generation_reproducible_and_leaves_the_global_state_alone(make_palm, prompt):
    palm = make_palm()
    state = torch.get_rng_state()
    first, again, other = (palm.generate(30, prompt, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_the_global_seed_decides(make_palm):
    palm = make_palm()
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(palm.generate(30, torch.tensor([1, 2]), temperature=3.0))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], palm.generate(30, torch.tensor([1, 2]), temperature=3.0))


@torch.no_grad()
def test_first_tokens_follow_the_models_distribution(make_palm):
    palm = make_palm(num_tokens=5)
    palm.token_emb.weight.mul_(0.3)
    prompt = torch.tensor([[1, 2, 3]])
    expected = palm(prompt)[0, -1].softmax(dim=-1) * 4000
    tokens = generate_responses(palm, prompt.expand(4000, -1), max_new_tokens=1, generator=seeded()).tokens[:, 0]
    counts = tokens.bincount(minlength=5)
    assert float(((counts - expected).square() / expected).sum()) < 18.5  # p = 0.001 at 4 degrees of freedom


def test_threads_generate_at_once_what_each_would_alone(make_palm, ragged):
    palm = make_palm(finetune_scopes=("a",))
    jobs = {}
    for number, (lengths, scope) in enumerate([((7, 2), None), ((3, 3, 5), "a"), ((4,), None)]):
        prompts, mask = ragged(*lengths)
        jobs[number] = {"prompt": prompts, "prompt_mask": mask, "finetune_scope": scope}
    alone = {number: palm.generate(40, generator=seeded(number), **job) for number, job in jobs.items()}
    together: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        together[number] = palm.generate(40, generator=seeded(number), **jobs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[number], alone[number]) for number in jobs)


def test_generation_uses_no_dropout_and_leaves_every_mode_as_it_was(make_palm):
    palm = make_palm(attn_dropout=0.5, ff_dropout=0.5)
    prompt = torch.tensor([1, 2, 3])
    still = palm.generate(20, prompt, temperature=0)
    palm.train().layers[1].eval()
    modes = {name: module.training for name, module in palm.named_modules()}
    assert torch.equal(palm.generate(20, prompt, temperature=0), still)
    with pytest.raises(ValueError, match="seq_len"):
        palm.generate(2, prompt)
    assert {name: module.training for name, module in palm.named_modules()} == modes
    assert PaLM.generate.__name__ == "generate" and "Continue a prompt" in PaLM.generate.__doc__


def test_generation_builds_no_graph(make_palm):
    palm = make_palm(finetune_scopes=("a",))
    out = generate_responses(palm, torch.tensor([[1, 2]]), max_new_tokens=2, adapter=palm.finetune_modules["a"])
    assert not out.logprobs.requires_grad


def test_progress_bar_shows_only_when_asked_for(make_palm, capfd):
    palm = make_palm()
    palm.generate(5, torch.tensor([1, 2]))
    assert capfd.readouterr() == ("", "")
    palm.generate(5, torch.tensor([1, 2]), use_tqdm=True)
    assert "generate" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_greedy_at_temperature_zero(make_palm, dtype):
    palm = make_palm(depth=1).to(dtype)
    rows = palm.generate(9, torch.tensor([[1, 2, 3]] * 40), temperature=0.0)
    assert (rows == rows[0]).all()
    assert int(rows[0, 0]) == int(palm(torch.tensor([[1, 2, 3]]))[0, -1].argmax())


def test_align_right_keeps_the_order_of_real_tokens():
    ids, mask = align_right(
        torch.tensor([[4, 0, 5, 0], [0, 6, 0, 0]]), torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]).bool()
    )
    assert ids[mask].tolist() == [4, 5, 6] and mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]


# refused


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (torch.zeros(4), TypeError, "prompt holds torch.float32"),
        (torch.zeros(0, dtype=torch.long), ValueError, r"prompt has shape \(1, 0\)"),
        (torch.zeros(0, 3, dtype=torch.long), ValueError, r"prompt has shape \(0, 3\)"),
        (torch.zeros(1, 1, 3, dtype=torch.long), ValueError, r"prompt has shape \(1, 1, 3\)"),
        (torch.tensor([1, 37]), ValueError, "prompt holds the id 37"),
        (torch.tensor([1, -1]), ValueError, "prompt holds the id -1"),
        (torch.tensor([1] * 8), ValueError, r"seq_len \(8\).*above the longest prompt's 8 tokens"),
        ([1, 2], TypeError, "prompt"),
    ],
)
def test_prompts_that_are_none_are_refused(make_palm, prompt, error, message):
    with pytest.raises(error, match=message):
        make_palm().generate(8, prompt)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.tensor([[True, True], [False, False]]), ValueError, "prompt: row 1 is all padding"),
        (torch.ones(2, 3, dtype=torch.bool), ValueError, r"prompt_mask \(2, 3\) must have the prompt's shape \(2, 2\)"),
        (torch.ones(2, 2), TypeError, "prompt_mask is torch.float32"),
    ],
)
def test_prompt_masks_that_do_not_fit_are_refused(make_palm, mask, error, message):
    prompt, palm = torch.ones(2, 2, dtype=torch.long), make_palm()
    with pytest.raises(error, match=message):
        palm.generate(8, prompt, prompt_mask=mask)
    with pytest.raises(error, match=message):
        generate_responses(palm, prompt, mask, max_new_tokens=1)


def test_a_mask_without_a_prompt_is_refused(make_palm):
    with pytest.raises(ValueError, match="prompt_mask was given without a prompt"):
        make_palm().generate(8, prompt_mask=torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("setting", "error"),
    [({"temperature": -1.0}, ValueError), ({"top_k": 0}, ValueError), ({"top_p": 0.0}, ValueError),
     ({"top_p": 1.5}, ValueError), ({"top_k": 0.9}, TypeError), ({"temperature": "hot"}, TypeError),
     ({"eos_token": 37}, ValueError), ({"eos_token": -1}, ValueError)],
)  # fmt: skip
def test_sampling_settings_are_checked_before_the_model_runs(make_palm, monkeypatch, setting, error):
    palm = make_palm()
    monkeypatch.setattr(palm, "embed", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(error, match=next(iter(setting))):
        palm.generate(8, torch.tensor([1, 2]), **setting)


@pytest.mark.parametrize("seq_len", [0, -3])
def test_lengths_of_nothing_are_refused(make_palm, seq_len):
    with pytest.raises(ValueError, match=rf"seq_len \({seq_len}\)"):
        make_palm().generate(seq_len)


def test_room_for_no_token_is_refused(make_palm):
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate_responses(make_palm(), torch.tensor([[1], [2]]), max_new_tokens=torch.tensor([3, 0]))


def test_broken_weights_are_reported_not_sampled_from(make_palm):
    palm = make_palm()
    with torch.no_grad():
        palm.layers[0].out_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits for row 0 are not finite"):
        palm.generate(8, torch.tensor([1, 2]))


def test_generation_leaves_torchs_settings_as_they_were_even_after_an_error(make_palm):
    def settings() -> tuple[object, ...]:
        return (
            torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype(),
        )  # fmt: skip

    def stop() -> None:
        raise KeyboardInterrupt

    palm, before = make_palm(), settings()
    generate_responses(palm, torch.tensor([[1, 2]]), max_new_tokens=12)
    assert settings() == before
    with pytest.raises(KeyboardInterrupt), torch.autocast("cpu", dtype=torch.bfloat16):
        generate_responses(palm, torch.tensor([[1, 2]]), max_new_tokens=12, on_step=stop)
    assert settings() == before
    loss = palm(torch.tensor([[1, 2, 3]]), return_loss=True)  # what a step has touched can still be trained
    loss.backward()
    assert palm.token_emb.weight.grad.isfinite().all()
