"""Texts as tokens, steps over them, and the reference's log-probabilities: what direct trainers stand on."""

import hashlib
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from palm_rlhf_pytorch.objectives.direct import dpo_loss, with_nll
from palm_rlhf_pytorch.policy.direct_data import Encoder, TokenTexts, pair_examples, vote_examples
from palm_rlhf_pytorch.policy.direct_model import DirectPolicy, Reference, Tally, check_whole, digest_of
from palm_rlhf_pytorch.policy.direct_records import pairs_of, votes_of
from palm_rlhf_pytorch.policy.direct_settings import described, settings_from
from palm_rlhf_pytorch.policy.direct_steps import Steps
from palm_rlhf_pytorch.text.records import Pair, Ranking, Rating, Text, Vote
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.tensor_file import save_tensors


class Letters:
    """A tokenizer of small letters, 3 to 12; 1 begins a text, 2 ends it."""

    bos_token, eos_token = 1, 2

    def __call__(self, text):
        return [3 + "abcdefghij".index(letter) for letter in text]


def encoder(**options):
    return Encoder(**{"tokenizer": Letters(), "num_tokens": 13, "max_length": 8, "eos_token": None} | options)


def pair(prompt, chosen, rejected, **options):
    return Pair(chosen=Text(prompt, chosen), rejected=Text(prompt, rejected), **options)


def test_texts_become_prompt_response_and_end():
    found = pair_examples([pair("ab", "c", "da"), pair("", "a", "b")], encoder())
    assert [ids.tolist() for ids in found.texts.ids] == [[3, 4, 5, 2], [3, 4, 6, 3, 2], [1, 3, 2], [1, 4, 2]]
    assert found.texts.prompt_lengths == [2, 2, 1, 1]
    batch = found.texts.batch([1, 2])
    assert batch["ids"].tolist() == [[3, 4, 6, 3, 2], [1, 3, 2, 0, 0]]
    assert batch["prompt_lengths"].tolist() == [2, 1] and batch["lengths"].tolist() == [3, 2]
    assert not any(found.texts.cuts)


def test_long_texts_lose_the_prompts_beginning_alike_and_only_then_the_responses_end():
    found = pair_examples([pair("abcdef", "g", "hij"), pair("ab", "abcdefghi", "a")], encoder())
    # room for 8: the longer response and its end take 4, which leaves 4 of the prompt to both
    assert [ids.tolist() for ids in found.texts.ids[:2]] == [[5, 6, 7, 8, 9, 2], [5, 6, 7, 8, 10, 11, 12, 2]]
    assert [ids.tolist() for ids in found.texts.ids[2:]] == [[4, 3, 4, 5, 6, 7, 8, 9], [4, 3, 2]]
    assert found.texts.cuts == (4, 1)


def test_what_a_tokenizer_adds_by_itself_is_taken_away():
    def adding(text):
        return [1, *Letters()(text), 2]

    adding.bos_token, adding.eos_token = 1, 2
    found = pair_examples([pair("ab", "c", "d")], encoder(tokenizer=adding))
    assert [ids.tolist() for ids in found.texts.ids] == [[1, 3, 4, 5, 2], [1, 3, 4, 6, 2]]


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([pair("a", "b", "c"), pair("", "b", "c", line=7)], {"tokenizer": lambda text: [3]}, "pair 1 .line 7.* prompt"),
        ([pair("a", "", "c")], {"tokenizer": lambda text: [3]}, "pair 0 has an empty response"),
        ([pair("a", "j", "c")], {"num_tokens": 12}, "pair 0 holds the id 12, palm's go from 0 to 11"),
        ([pair("a", "b", "c", weight=0.0)], {}, "all 1 records have weight 0"),
        ([], {}, "pairs is empty"),
    ],
)
def test_records_that_do_not_fit_are_named(records, options, message):
    with pytest.raises(ValueError, match=message):
        pair_examples(records, encoder(**options))


def test_weights_have_mean_one():
    found = pair_examples([pair("a", "b", "c", weight=3), pair("a", "d", "c", weight=1)], encoder())
    assert found.weights.tolist() == [1.5, 0.5] and found.labels.tolist() == [1, 1]


def test_each_vote_has_a_response_to_another_prompt():
    prompts = "aaaabacdaa"
    votes = [Vote(text=Text(prompt, "bcdefghija"[row]), up=row % 3 == 0) for row, prompt in enumerate(prompts)]
    for seed in range(5):
        found = vote_examples(votes, encoder(), seed=seed)
        for row, prompt in enumerate(prompts):
            own, other = found.texts.ids[2 * row], found.texts.ids[2 * row + 1]
            assert own[0] == other[0] == Letters()(prompt)[0]
            assert prompts["bcdefghija".index("abcdefghij"[int(other[1]) - 3])] != prompt
    with pytest.raises(ValueError, match="all have one prompt"):
        vote_examples(votes[:4], encoder(), seed=0)


def test_records_are_turned_into_what_a_loss_takes(tmp_path):
    a, b, c = (Text("p", letter) for letter in "abc")
    ranking = Ranking(texts=(a, b, c), ranks=(1, 0, 1), weight=3, group="g")
    pairs = pairs_of([Pair(chosen=c, rejected=a), ranking])
    assert [(p.chosen.response, p.rejected.response, p.preference, p.weight) for p in pairs] == [
        ("c", "a", 1, 1), ("b", "a", 1, 1), ("b", "c", 1, 1), ("a", "c", 0.5, 1)
    ]  # fmt: skip
    assert [p.group for p in pairs] == [None, "g", "g", "g"]
    votes = votes_of([Vote(text=b, up=False), Pair(chosen=a, rejected=b, preference=0.2, weight=5), ranking])
    assert [(v.text.response, v.up, round(v.weight, 6)) for v in votes] == [
        ("b", False, 1), ("b", True, 3), ("a", False, 3), ("b", True, 1), ("a", False, 1), ("b", True, 1),
        ("c", False, 1),
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    assert pairs_of(tmp_path / "pairs.jsonl")[0].line == 1
    with pytest.raises(ValueError, match=r"record 1 \(line 4\) is a Rating"):
        votes_of([Vote(text=b, up=False), Rating(text=a, value=0.5, line=4)])
    with pytest.raises(ValueError, match="no record"):
        votes_of([Pair(chosen=a, rejected=b, preference=0.5)])


class TwoOf(Ranks):
    """One of several processes that never ask one another."""

    def __init__(self, rank, count):
        super().__init__(None)
        self.rank, self.count = rank, count


class Sized:
    """Examples of given lengths and counts."""

    def __init__(self, sizes, counts):
        self._sizes, self._counts = sizes, counts

    def read(self, rows):
        return list(rows)

    def sizes(self):
        return self._sizes

    def counts(self):
        return self._counts


@pytest.mark.parametrize(("size", "ranks", "max_tokens"), [(4, 1, 1000), (4, 1, 9), (5, 2, 9), (3, 4, 20)])
def test_each_example_counts_once_an_epoch_whatever_passes_and_processes(size, ranks, max_tokens):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (11,), generator=generator).tolist()
    counts = (1 + torch.arange(11.0)).tolist()
    plan = {"num_steps": 2 * math.ceil(11 / size) + 1, "minibatch_size": size, "max_batch_tokens": max_tokens}
    every = [list(Steps(Sized(sizes, counts), seed=3, ranks=TwoOf(rank, ranks), **plan)) for rank in range(ranks)]
    accumulate = Steps(Sized(sizes, counts), seed=3, ranks=TwoOf(0, ranks), **plan).accumulate
    seen = []
    for of_ranks in zip(*every, strict=True):
        rows, weights = of_ranks[0][0], {}
        seen += rows
        for own, passes in of_ranks:
            assert own == rows and len(passes) == accumulate
            for part, share in passes:
                assert len(part) == 1 or len(part) * max(sizes[row] for row in part) <= max_tokens
                for row in part if share else ():
                    # a pass's loss is a mean by counts; fit averages over passes, and gradients over ranks
                    mean = counts[row] / sum(counts[one] for one in part)
                    weights[row] = weights.get(row, 0) + share * mean / accumulate / ranks
        assert weights == pytest.approx({row: counts[row] / sum(counts[one] for one in rows) for row in rows})
    assert sorted(seen[:11]) == sorted(seen[11:22]) == list(range(11)) and seen[:11] != seen[11:22]


def policy(palm, **options):
    settings = {"lora": True, "lora_r": 2, "lora_alpha": None, "last_layers": None, "activation_checkpointing": False}
    generator = torch.Generator().manual_seed(0)
    return DirectPolicy(
        palm, lambda logprobs, lengths: (logprobs.mean(), {}), generator=generator, **settings | options
    )


def by_hand(palm, ids, prompt_length):
    logprobs = palm(ids[None].long())[0].log_softmax(dim=-1)
    return sum(logprobs[place - 1, ids[place]] for place in range(prompt_length, len(ids)))


TEXTS = TokenTexts([torch.tensor(ids) for ids in ([3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8], [9, 7])], [2, 1, 3, 1])


@pytest.mark.parametrize("lora", [True, False])
def test_logprobs_of_whole_responses_are_those_written_out(make_palm, lora):
    palm = make_palm()
    model = policy(palm, lora=lora)
    expected = torch.stack([by_hand(palm, ids, n) for ids, n in zip(TEXTS.ids, TEXTS.prompt_lengths, strict=True)])
    for reference in (False, True):
        found = model.logprobs(**TEXTS.batch(range(4)), reference=reference)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and not name.endswith(".A"):
                weight += 0.1
    moved = torch.stack(
        [by_hand(model.export_palm(), ids, n) for ids, n in zip(TEXTS.ids, TEXTS.prompt_lengths, strict=True)]
    )
    torch.testing.assert_close(model.logprobs(**TEXTS.batch(range(4))), moved, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.logprobs(**TEXTS.batch(range(4)), reference=True), expected, atol=1e-5, rtol=0)
    assert (moved - expected).abs().min() > 0.01


def test_a_reference_is_computed_once_and_again_where_it_does_not_fit(make_palm, tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    model, calls = policy(make_palm()), []
    monkeypatch.setattr(
        DirectPolicy,
        "logprobs",
        lambda *args, _own=DirectPolicy.logprobs, **named: calls.append(1) or _own(*args, **named),
    )

    def stored(digest):
        reference = Reference(
            tmp_path / "reference.safetensors", ranks=Ranks(accelerator), accelerator=accelerator, max_batch_tokens=8
        )
        return reference(model, {"train": TEXTS}, digest=digest, progress=False)["train"]

    first, passes = stored("one"), len(calls)
    expected = [by_hand(model.palm, ids, n) for ids, n in zip(TEXTS.ids, TEXTS.prompt_lengths, strict=True)]
    torch.testing.assert_close(first, torch.stack(expected).detach(), atol=1e-5, rtol=0)
    assert torch.equal(stored("one"), first) and len(calls) == passes > 1
    assert torch.equal(stored("two"), first) and len(calls) == 2 * passes
    save_tensors(tmp_path / "reference.safetensors", {"x": first}, kind="PaLM", config={})
    with pytest.raises(ValueError, match="'PaLM', expected 'reference log-probabilities'"):
        stored("two")


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_spread_weights_are_refused(kind):
    check_whole(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))
    with pytest.raises(ValueError, match=f"spread by {kind} are not supported"):
        check_whole(SimpleNamespace(distributed_type=DistributedType(kind)))


def test_a_tally_weighs_means_by_what_they_are_of():
    tally = Tally()
    tally.add({"a": (torch.tensor(2.0), 3), "b": (torch.tensor(5.0), torch.tensor(0))})
    tally.add({"a": (torch.tensor(6.0), 1), "b": (torch.tensor(float("nan")), 0)})
    tally.add({"a": (torch.tensor(float("nan")), 9), "b": (torch.tensor(1.0), 9)}, counted=False)
    assert tally.taken(Ranks(None)) == {"a": 3.0} and tally.taken(Ranks(None)) == {}


def test_settings_name_what_may_have_been_meant():
    with pytest.raises(TypeError, match="DPOTrainer has no argument 'lora_rank'; did you mean lora_r"):
        settings_from({"lora_rank": 4}, trainer="DPOTrainer")
    with pytest.raises(TypeError, match="beta and its like are the loss's"):
        settings_from({"beta": 4}, trainer="DPOTrainer")
    for wrong in ({"lr": 0.0}, {"warmup": 1.0}, {"minibatch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            settings_from(wrong, trainer="DPOTrainer")


def test_a_loss_is_told_by_its_name_and_numbers():
    whole = partial(with_nll, loss=partial(dpo_loss, beta=0.2), coef=1.5)
    assert described(whole) == "with_nll(coef=1.5, loss=dpo_loss(beta=0.2))"


def test_digest_of_a_model_in_files_keeps_its_bits(make_palm):
    palm = make_palm()
    expected = hashlib.sha256(json.dumps(palm.config, sort_keys=True).encode())
    for name, weight in palm.named_base_parameters():
        expected.update(f"{name} torch.float32".encode() + weight.detach().numpy().tobytes())
    assert digest_of(palm) == expected.hexdigest()
