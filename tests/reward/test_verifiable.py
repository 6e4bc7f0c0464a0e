"""Checks of responses: what counts as the right answer, the right form, a match, a length."""

import json
from fractions import Fraction
from functools import partial

import pytest
import torch

from palm_rlhf_pytorch.reward.functions import each, ids_judge, text_judge
from palm_rlhf_pytorch.reward.verifiable import (
    Task,
    at_most,
    final_answer,
    in_tags,
    matches,
    near_length,
    number_of,
    reaches_target,
    right_answer,
    sum_in,
    tagged,
    words_of,
    works_out,
)
from palm_rlhf_pytorch.tensors import lengths_to_mask, pad_ragged
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        (" 42.", 42),
        ("-5%", -5),
        ("− 5 apples", -5),
        ("$1,234.50 in all.", Fraction(2469, 2)),
        ("-$1,000,000", -1_000_000),
        ("**72**", 72),
        (": .5 km", Fraction(1, 2)),
        ("3/4 cup", Fraction(3, 4)),
        ("19 20", 19),
        ("1/0", None),
        ("--5", None),
        ("12:30", None),
        ("1.2.3", None),
        ("1,23", None),
        ("6*7", None),
        ("1e5", None),
        ("٤٢", None),
        ("about 42", None),
        ("", None),
        ("9" * 1_000_000, None),
    ],
)
def test_number_of_reads_a_number_whole_or_not_at_all(text, number):
    assert number_of(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", 72),
        ("#### 41\nno:\n#### 42", 42),  # the last one counts
        ("#### 42 ####", None),
        ("the answer is 42", None),
        ("", None),
    ],
)
def test_final_answer_stands_behind_the_last_marker(text, number):
    assert final_answer(text) == number


def test_right_answer_compares_by_value_and_knows_its_prompts():
    check = right_answer({"How many? ": "Half of 2,000.\n#### 1,000", "And now?": 7})
    responses = ["#### 1000.00", "#### 1,000 clips", "#### 1001", "1000", ""]
    assert [check("How many?", response) for response in responses] == [1, 1, 0, 0, 0]
    assert check(" And now?\n", "so #### 7") == 1
    with pytest.raises(ValueError, match=r"answers \(2 of them\) holds none for the prompt 'Why\?'"):
        check("Why?", "#### 7")
    with pytest.raises(ValueError, match="'no idea' for the prompt 'a'"):
        right_answer({"a": "no idea"})
    with pytest.raises(ValueError, match="two answers for the prompt ' a'"):
        right_answer({"a": "1", " a": "2"})


def test_right_answer_reads_words_and_tags():
    check = right_answer({"Capital?": "<answer>Paris</answer>"}, read=tagged("answer"))
    assert check("Capital?", "<think>Rome</think> <answer> PARIS. </answer>") == 1
    assert check("Capital?", "Paris") == check("Capital?", "</answer>Paris<answer>") == 0
    assert right_answer({"Capital?": "Paris"}, read=words_of)("Capital?", "paris\n") == 1


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>a\nb</think>\n<answer>c</answer> ", 1),
        ("<think></think><answer></answer>", 1),
        ("so <think>a</think><answer>c</answer>", 0),
        ("<think>a</think>so<answer>c</answer>", 0),
        ("<think>a</think><answer>c</answer>!", 0),
        ("<think>a</think><answer>c</answer><answer>d</answer>", 0),
        ("<answer>c</answer><think>a</think>", 0),
        ("<think>a<answer>c</think></answer>", 0),
        ("", 0),
    ],
)
def test_in_tags_wants_each_tag_once_in_order_and_nothing_between(response, score):
    assert in_tags("think", "answer")("", response) == score


def test_lengths_are_scored_by_their_distance():
    near, most = near_length(10, spread=4), at_most(3, slack=1)
    assert [near("", "x" * length) for length in (0, 6, 9, 10, 12, 14)] == [0, 0, 0.75, 1, 0.5, 0]
    assert [most("", "x" * length) for length in (0, 3, 4, 5, 9)] == [1, 1, 0.5, 0, 0]
    assert at_most(2, measure=lambda text: len(text.split()))("", "one two") == 1
    tokens = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    lengths = torch.tensor([3, 5])
    judge = ids_judge(each(at_most(2)))  # of ids it counts the response's tokens
    scores = judge(tokens, prompt_mask=lengths_to_mask(torch.tensor([1, 1]), 5), mask=lengths_to_mask(lengths, 5))
    assert scores.tolist() == [1, 0]


def test_arithmetic_prompts_are_scored_through_a_tokenizer():
    tokenizer = ByteTokenizer()
    rows = [("12+7=", "19"), ("12+7=", "20"), ("what is 3*(4+5)?", " 27."), ("In 2024, 9-4=", ""), ("8-9=", "-1")]
    prompts = [tokenizer.encode(prompt) for prompt, _ in rows]
    texts = [torch.cat((ids, tokenizer.encode(said, eos=True))) for ids, (_, said) in zip(prompts, rows, strict=True)]
    sequences, mask = pad_ragged(texts)
    prompt_mask = lengths_to_mask(torch.tensor([len(ids) for ids in prompts]), sequences.shape[1])
    scores = text_judge(each(works_out()), tokenizer)(sequences, prompt_mask=prompt_mask, mask=mask)
    assert scores.tolist() == [1, 0, 1, 0, 1]
    with pytest.raises(ValueError, match="no arithmetic in 'hello'"):
        works_out()("hello", "1")
    with pytest.raises(ValueError, match="divides by 0"):
        works_out()("1/0=", "1")


def test_sum_in_prefers_arithmetic_to_a_longer_number():
    assert [sum_in(text) for text in ("In 2024: 3+4.", "well-known: 7")] == ["3+4", "7"]


def test_target_is_reached_with_each_number_once():
    check = reaches_target({"make 24 of 3 8 1": Task([3, 8, 1], 24)}, tried=0.25)
    prompt = "make 24 of 3 8 1 "
    responses = ["3*8*1", "(3*8)/1 = 24", "3*8", "3+8+1", "3*8*1+0", "24", "3*8*", "import os", ""]
    assert [check(prompt, response) for response in responses] == [1, 1, 0, 0.25, 0, 0, 0, 0, 0]
    inside = reaches_target({"t": Task([2], 2)}, expression=tagged("answer", read=str.strip))
    assert [inside("t", response) for response in ("<answer>2</answer>", "2")] == [1, 0]
    with pytest.raises(ValueError, match="holds none for the prompt 'other'"):
        check("other", "1")


def test_matches_finds_a_pattern_and_survives_a_bomb():
    search = partial(matches(r"^(a+)+$", timeout=0.1), [""] * 4)
    assert search(["aaa", "b", "a" * 60 + "!", "aa"]) == [1, 0, None, 1]
    assert matches(r"(?i)yes.*\Z")(["", ""], ["well, YES \udc80", json.dumps("é")]) == [1, 0]
    with pytest.raises(ValueError, match="no regular expression"):
        matches("(")
