"""What to ask next: pairs that members are sure of in opposite ways, as rows that are read back once judged."""

import json
import math

import pytest
import torch

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.asking import best_questions, information, read_questions
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble
from palm_rlhf_pytorch.text.datasets import read_labels, skip_bad_record
from palm_rlhf_pytorch.text.records import Pair, Text
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer


def test_information_is_what_the_answer_tells_of_the_members():
    odds = math.log(3)  # probabilities 3/4 and 1/4
    found = information(torch.tensor([[odds, odds, 0.0, 800.0], [-odds, odds, 0.0, -800.0]]))
    half, quarter = math.log(2), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert found.gain.tolist() == pytest.approx([half - quarter, 0, 0, half], abs=1e-6)
    assert found.probability.tolist() == pytest.approx([0.5, 0.75, 0.5, 0.5])
    assert found.deviation.tolist() == pytest.approx([odds, 0, 0, 800])
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        information(torch.ones(1, 3))


def pair(prompt, first, second, **others):
    return Pair(chosen=Text(prompt, first), rejected=Text(prompt, second), **others)


def ensemble():
    """Scores are differences of a's and b's: the second member likes what the first dislikes, both dislike c's."""
    torch.manual_seed(0)
    made = RewardEnsemble.of(PaLM(num_tokens=259, dim=8, depth=1, dim_head=4, heads=2), 2, seed=0)
    with torch.no_grad():
        for parameter in made.palm.layers.parameters():
            parameter.zero_()
        made.palm.token_emb.weight.zero_()
        for letter, place in (("a", 0), ("b", 1), ("c", 2)):
            made.palm.token_emb.weight[ord(letter), place] = 1
        for member, sign in zip(made.models, (1, -1), strict=True):
            member.head.weight.copy_(torch.tensor([[sign, -sign, -4.0, 0, 0, 0, 0, 0]]))
    return made


def ask(pairs, **options):
    return best_questions(ensemble(), pairs, ByteTokenizer(), eos_token=257, **options)


def test_pairs_on_which_members_are_opposed_come_first():
    pairs = [
        pair("p", "ab", "ba", preference=0.9),  # a tie to both
        pair("q", "ab", "c"),  # both are sure of it
        pair("r", "aa", "bb", group="g", weight=0.0),  # opposed
        pair("s", "ab", "bb"),  # less so
    ]
    found = ask(pairs)
    assert [question.pair.chosen.prompt for question in found] == ["r", "s", "p", "q"]
    assert found[0].gain > found[1].gain > 0.01 and found[0].probability == pytest.approx(0.5)
    assert found[2].gain == pytest.approx(0, abs=1e-9) and found[2].probability == pytest.approx(0.5)
    assert found[3].probability > 0.9


def test_one_prompt_is_asked_about_once_unless_more_is_wanted():
    pairs = [
        pair("p", "aa", "bb"),
        pair("p", "ab", "bb"),
        pair("q", "ab", "bb"),
        pair("", "a", "b"),
        pair("", "b", "a"),
    ]
    assert [question.pair.chosen for question in ask(pairs)].count(Text("p", "ab")) == 0
    assert len(ask(pairs)) == 4 and len(ask(pairs, per_prompt=2)) == len(ask(pairs, per_prompt=None)) == 5
    with pytest.raises(ValueError, match=r"per_prompt \(0\)"):
        ask(pairs, per_prompt=0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "say a", "response_a": "aa", "response_b": "bb", "choice": None},
        {"prompt": [{"role": "user", "content": "hi"}], "response_a": "aa", "response_b": "bb", "group": "g"},
        {"chosen": "\n\nHuman: hi\n\nAssistant: aa", "rejected": "\n\nHuman: ho\n\nAssistant: bb", "margin": 2},
        {"response_a": "aa", "response_b": "bb", "preference": 0.2, "annotator": "ann", "weight": 3},
    ],
)
def test_questions_are_read_as_labels_once_they_are_judged(tmp_path, row):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (pair,) = read_questions(path).records
    (question,) = ask([pair])
    asked = question.row()
    unjudged, judged = tmp_path / "asked.jsonl", tmp_path / "judged.jsonl"
    unjudged.write_text(json.dumps(asked) + "\n")
    assert read_questions(unjudged).records[0].texts == pair.texts
    with pytest.raises(ValueError, match="choice"):
        read_labels(unjudged)
    judged.write_text("".join(json.dumps(asked | {"choice": choice}) + "\n" for choice in ("a", "b", "tie")))
    first, second, tie = read_labels(judged).records
    assert first.texts == pair.texts == second.texts[::-1] and tie.preference == 0.5
    assert {label.group for label in (first, second, tie)} == {row.get("group")}
    assert {label.margin for label in (first, second)} == {None} and first.preference == 1


def test_which_text_was_chosen_does_not_say_which_comes_first(tmp_path):
    texts = [(f"a{number}", f"b{number}") for number in range(40)]
    found = []
    for name, order in (("there", 1), ("back", -1)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps(dict(zip(("chosen", "rejected"), two[::order], strict=True))) + "\n" for two in texts)
        )
        found.append([label.texts for label in read_questions(path).records])
    assert found[0] == found[1]
    firsts = sum(first.response.startswith("a") for first, _ in found[0])
    assert 10 < firsts < 30


def test_rows_without_two_texts_are_bad_records(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = ['{"response_a": "x", "response_b": "y"}', '{"text": "x", "label": 1}', "{", '{"completions": ["a", "b"]}']
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match="mixed.jsonl, line 2"):
        read_questions(path)
    found = read_questions(path, on_bad_record=skip_bad_record)
    assert len(found.records) == 1 and [bad.line for bad in found.bad] == [2, 3, 4] and found.rows == 4
