"""Items out of what models write: which responses are judged together, and which are asked about first."""

import math

import pytest
import torch

pytest.importorskip("django", reason="needs the extra [feedback]")

from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.feedback.sampling import Author, Reader, sample_items, worth
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def small_palm(seed=0):
    torch.manual_seed(seed)
    return PaLM(num_tokens=TOKENIZER.num_tokens, dim=8, depth=1, heads=2, dim_head=4).eval()


class Scripted(Author):
    """An author that says what the test gives it, in turn."""

    def write(self, prompts, *, generator):
        return [self.settings["says"].pop(0) for _ in prompts]


def scripted(name, *says):
    return Scripted(name=name, palm=small_palm(), asking=TOKENIZER, settings={"says": list(says)})


class Scored:
    """A reader whose members' scores the test gives, by text."""

    def __init__(self, **scores):
        self.by_text = scores

    def scores(self, prompt_texts):
        return [torch.tensor([self.by_text[text] for text in texts]).T for _, texts in prompt_texts]


def texts_of(found):
    return [(item.prompt, tuple(one.text for one in item.completions)) for item in found.items]


def test_empty_and_repeated_responses_are_left_out_and_prompts_without_two_counted():
    author = scripted("m", "heron", "wren", "heron ", "", " \n", "oak", "elm", "elm", "")
    found = sample_items([author], ["bird", "tree", "bird", "wood"], kind=Kind.PAIR, samples=3, seed=0)
    assert texts_of(found) == [("bird", ("heron", "wren"))] and found.passed_over == 2


def test_two_authors_are_compared_with_each_other_alone():
    new, old = scripted("new", "a", "b"), scripted("old", "c", "a")
    found = sample_items([new, old], ["p"], kind=Kind.PAIR, samples=2, seed=0)
    assert {frozenset((one.text, one.source) for one in item.completions) for item in found.items} == {
        frozenset({("a", "new"), ("c", "old")}), frozenset({("b", "new"), ("c", "old")}),
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "groups"), [(Kind.RATING, [("a", "b"), ("c",)]), (Kind.RANKING, [("a", "b")])])
def test_all_responses_to_a_prompt_are_rated_or_ranked_together(kind, groups):
    found = sample_items([scripted("m", "a", "b", "c", "c")], ["p", "q"], kind=kind, samples=2, seed=0)
    assert [texts for _, texts in texts_of(found)] == groups


def test_what_reward_models_disagree_on_most_comes_first_and_no_more_than_asked_for():
    says = ["a", "b", "c", "d", "e", "f"]
    # two members: of a, b and c they are sure of opposite things for (a, c) alone
    reader = Scored(a=[2.0, 0.0], b=[2.0, 1.0], c=[0.0, 2.0], d=[0.0, 0.0], e=[0.1, 0.0], f=[0.0, 0.0])
    options = {"kind": Kind.PAIR, "samples": 3, "seed": 0, "reader": reader}
    found = sample_items([scripted("m", *says)], ["p", "q"], **options)
    assert texts_of(found)[0] == ("p", ("a", "c")) and len(found.items) == 6
    priorities = [item.priority for item in found.items]
    assert priorities == sorted(priorities, reverse=True) and priorities[-1] == pytest.approx(0, abs=1e-9)
    assert [one.score for one in found.items[0].completions] == [1.0, 1.0]
    one_each = sample_items([scripted("m", *says)], ["p", "q"], per_prompt=1, **options)
    assert [prompt for prompt, _ in texts_of(one_each)] == ["p", "q"]
    assert texts_of(sample_items([scripted("m", *says)], ["p", "q"], count=1, **options)) == [("p", ("a", "c"))]


def test_worth_by_hand():
    d = math.log(3)  # sigmoid 0.75
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert worth(torch.tensor([[d, 0.0]]), Kind.PAIR) == pytest.approx(entropy)
    assert worth(torch.tensor([[d, 0.0], [0.0, d]]), Kind.PAIR) == pytest.approx(math.log(2) - entropy)
    assert worth(torch.tensor([[d, 0.0], [d, 0.0]]), Kind.RANKING) == pytest.approx(0)
    assert worth(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), Kind.RATING) == pytest.approx(0.5)
    assert worth(torch.tensor([[1.0, 5.0]]), Kind.RATING) == 0


@pytest.mark.parametrize("members", [1, 2])
def test_reader_scores_are_those_of_each_model_on_the_text_alone(members):
    palm = small_palm(1)
    judge = RewardModel(palm) if members == 1 else RewardEnsemble.of(palm, 2, seed=3)
    models = [judge] if members == 1 else judge.models
    for number, model in enumerate(models):
        torch.nn.init.normal_(model.head.weight, std=1.0 + number)
    asked = [("bird ", ("heron", "a wren")), ("tree", ("elm", "oak", "fir"))]
    found = Reader(judge=judge, asking=TOKENIZER, max_tokens=12).scores(asked)
    assert [tuple(scores.shape) for scores in found] == [(members, 2), (members, 3)]
    for (prompt, texts), scores in zip(asked, found, strict=True):
        for place, text in enumerate(texts):
            seq = torch.cat((TOKENIZER.encode(prompt), TOKENIZER.encode(text, eos=True)))[None]
            lengths = torch.tensor([len(TOKENIZER.encode(prompt))])
            for number, model in enumerate(models):
                with torch.no_grad():
                    alone = model.eval().read(seq, prompt_lengths=lengths).scores
                assert torch.allclose(scores[number, place], alone[0], atol=1e-5)


def test_a_model_writes_the_same_again_by_the_same_seed_and_something_else_by_another():
    author = Author(name="m", palm=small_palm(), asking=TOKENIZER, settings={"max_new_tokens": 9})
    options = {"kind": Kind.PAIR, "samples": 2}
    one, two, other = (sample_items([author], ["p", "q"], seed=seed, **options) for seed in (5, 5, 6))
    assert texts_of(one) == texts_of(two) != texts_of(other) and len(one.items) == 2


def test_null_characters_which_no_database_takes_are_replaced(monkeypatch):
    monkeypatch.setattr(PaLM, "generate_text", lambda self, prompts, **options: [f"a\0{prompt}" for prompt in prompts])
    author = Author(name="m", palm=small_palm(), asking=TOKENIZER)
    assert author.write(["b"], generator=torch.Generator()) == ["a\N{REPLACEMENT CHARACTER}b"]


@pytest.mark.parametrize(
    ("names", "options", "reason"),
    [
        (["m"], {"samples": 1}, r"samples \(1\) must be from 2 to 4"),
        (["m"], {"samples": 5}, r"samples \(5\)"),
        (["m", "n"], {"samples": 0}, "from 1 to 4"),
        (["m", "m"], {"samples": 2}, "two of different names"),
        (["m"], {"samples": 2, "count": 0}, r"count \(0\)"),
        (["m"], {"samples": 2, "per_prompt": 0}, r"per_prompt \(0\)"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(names, options, reason):
    with pytest.raises(ValueError, match=reason):
        sample_items([scripted(name) for name in names], ["p"], kind=Kind.PAIR, seed=0, **options)
