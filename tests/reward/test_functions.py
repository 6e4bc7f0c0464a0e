"""Functions as judges: what they are given, what they may give, and what is said when they do not."""

import asyncio
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from palm_rlhf_pytorch.reward.functions import as_rewards, each, ids_judge, summed, text_judge
from palm_rlhf_pytorch.tensors import lengths_to_mask, pad_ragged
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

PAIRS = [("ab", "cde"), ("a", ""), ("", "wxyz")]  # b=3, t=4


def batch(pairs=PAIRS):
    """What a trainer gives a judge: padded ids, and the two masks."""
    rows = [ByteTokenizer().encode(prompt + response) for prompt, response in pairs]
    sequences, mask = pad_ragged(rows, pad_value=ord("#"))
    prompts = torch.tensor([len(prompt) for prompt, _ in pairs])
    return {"sequences": sequences, "prompt_mask": lengths_to_mask(prompts, sequences.shape[1]), "mask": mask}


def ask(judge, pairs=PAIRS):
    given = batch(pairs)
    return judge(given.pop("sequences"), **given)


def test_text_judge_gives_the_function_texts_without_padding():
    seen = []

    def length(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return [len(response) for response in responses]

    scores = ask(text_judge(length, ByteTokenizer()))
    assert seen == PAIRS
    assert scores.tolist() == [3, 0, 4] and scores.dtype == torch.float32


def test_text_judge_leaves_special_tokens_out_where_it_can():
    class Tokenizer:
        def decode(self, ids, skip_special_tokens=False):
            return "".join(chr(id) for id in ids if not (skip_special_tokens and id == ord("c")))

    assert ask(text_judge(lambda prompts, responses: [len(text) for text in responses], Tokenizer())).tolist() == [
        2,
        0,
        4,
    ]
    spelled = text_judge(each(lambda prompt, response: float(response == "c,d,e")), lambda ids: ",".join(map(chr, ids)))
    assert ask(spelled).tolist() == [1, 0, 0]


def test_ids_judge_takes_padding_on_either_side():
    given = batch()
    flipped = {name: tensor.flip(-1) for name, tensor in given.items()}
    judge = ids_judge(lambda prompts, responses: torch.tensor([int(ids.sum()) for ids in responses]))
    expected = [sum(map(ord, response)) for _, response in PAIRS]
    assert judge(given.pop("sequences"), **given).tolist() == expected
    assert judge(flipped.pop("sequences"), **flipped).tolist() == expected


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_scores_may_be_lists_arrays_and_tensors(kind):
    assert as_rewards(kind([1.5, -2.0, 0.0]), [3, 0, 4]).tolist() == [1.5, -2, 0]


def test_scores_may_be_any_real_number_or_missing():
    scores = as_rewards([True, Fraction(1, 4), np.float16(2), torch.tensor(3), None, 10**30], [1] * 6)
    assert scores.tolist() == [1, 0.25, 2, 3, pytest.approx(math.nan, nan_ok=True), pytest.approx(1e30)]
    assert as_rewards(np.array([1, None], dtype=object), [1, 1]).isnan().tolist() == [False, True]


def test_rewards_of_each_token_stand_where_the_response_starts():
    expected = [[1, 2, 3, 0], [0, 0, 0, 0], [4, 5, 6, 7]]
    ragged = [[1, 2, 3], torch.zeros(0), np.array([4.0, 5.0, 6.0, 7.0])]
    assert as_rewards(ragged, [3, 0, 4]).tolist() == expected
    padded = torch.tensor([[1, 2, 3, 9], [9, 9, 9, 9], [4, 5, 6, 7]])  # 9 stands beyond the end
    found = ask(ids_judge(lambda prompts, responses: padded))
    assert found.tolist() == expected and summed(found).tolist() == [6, 0, 22]
    assert summed(as_rewards([[1, 2], None], [2, 2])).isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (0.5, TypeError, "gave a float"),
        ("abc", TypeError, "gave a str"),
        ([0.1, 0.2], ValueError, "gave 2 scores for 3 responses"),
        ([0.1, "0.2", 0.3], TypeError, "a str for response 1"),
        ([0.1, Decimal(1), 0.3], TypeError, "a Decimal for response 1"),
        ([0.1, 0.2, 10**400], ValueError, "response 2 that no float"),
        ([[1, 2, 3], [], [1]], ValueError, "1 rewards for response 2 of 4 tokens"),
        ([[1, 2, 3], 0.5, [1, 2, 3, 4]], ValueError, "a float for response 1 of 0 tokens"),
        (torch.zeros(3, 1), ValueError, r"shape \(3, 1\) for 3 responses"),
        (torch.zeros(2), ValueError, r"shape \(2,\) for 3 responses"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "complex64"),
    ],
)
def test_what_is_no_score_is_named(found, error, message):
    with pytest.raises(error, match=message):
        ask(ids_judge(lambda prompts, responses: found))


def test_async_functions_run_together_up_to_a_bound_and_inside_a_running_loop():
    running, most = 0, []

    async def one(prompt, response):
        nonlocal running
        running += 1
        most.append(running)
        await asyncio.sleep(0.001)
        running -= 1
        return len(response)

    async def whole(prompts, responses):
        return await each(one, max_at_once=2)(prompts, responses)

    pairs = [("", "x" * length) for length in (5, 1, 4, 2, 3)]
    judges = [text_judge(each(one, max_at_once=2), ByteTokenizer()), text_judge(whole, ByteTokenizer())]

    async def notebook():  # a loop is running when the judge is asked
        return ask(judges[0], pairs)

    for scores in (ask(judges[0], pairs), ask(judges[1], pairs), asyncio.run(notebook())):
        assert scores.tolist() == [5, 1, 4, 2, 3]
    assert max(most) == 2


def test_an_error_names_the_response():
    def fails(prompt, response):
        return 1 / len(response)

    async def fails_later(prompt, response):
        return fails(prompt, response)

    for one in (fails, fails_later):
        with pytest.raises(ZeroDivisionError) as caught:
            ask(text_judge(each(one), ByteTokenizer()))
        assert "raised for response 1 of the batch, ''" in caught.value.__notes__
    with pytest.raises(ValueError, match="not ids of ByteTokenizer") as caught:
        text_judge(each(fails), ByteTokenizer())(
            torch.tensor([[1], [300]]), prompt_mask=torch.zeros(2, 1).bool(), mask=torch.ones(2, 1).bool()
        )
    assert "while decoding the response of response 1 of the batch" in caught.value.__notes__


def test_what_cannot_be_a_judge_is_refused_at_once():
    with pytest.raises(TypeError, match="function is a str"):
        text_judge("score", ByteTokenizer())
    with pytest.raises(TypeError, match=r"tokenizer \(int\)"):
        text_judge(len, 5)
    with pytest.raises(ValueError, match="max_at_once"):
        each(len, max_at_once=0)
    with pytest.raises(ValueError, match="mask"):
        ids_judge(len)(torch.zeros(2, 3).long(), prompt_mask=torch.ones(2, 3).bool(), mask=torch.ones(2, 4).bool())
