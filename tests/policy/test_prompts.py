"""Prompts: every source, what is padding and what is a token, and the order they are handed out in."""

import random

import pytest
import torch

from palm_rlhf_pytorch.policy.prompts import one_prompt, prompts_from


def read(**source):
    return prompts_from(num_tokens=50, seed=3, **source)


def rows_of(prompts):
    return [row[:length].tolist() for row, length in zip(prompts.ids, prompts.lengths.tolist(), strict=True)]


def test_each_prompt_comes_once_before_any_comes_again():
    prompts = read(prompt_token_ids=torch.arange(7)[:, None])
    taken = torch.cat([prompts.next_rows(count) for count in (3, 5, 1, 12)]).tolist()
    epochs = [taken[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert prompts.taken == 21


def test_order_follows_from_the_seed_alone():
    random.seed(1)
    torch.manual_seed(1)
    first = prompts_from(num_tokens=50, seed=3, prompt_token_ids=torch.arange(20)[:, None]).next_rows(50)
    random.seed(2)
    torch.manual_seed(2)
    second = prompts_from(num_tokens=50, seed=3, prompt_token_ids=torch.arange(20)[:, None])
    assert torch.equal(torch.cat([second.next_rows(10) for _ in range(5)]), first)
    other = prompts_from(num_tokens=50, seed=4, prompt_token_ids=torch.arange(20)[:, None])
    assert not torch.equal(other.next_rows(50), first)


def test_order_follows_a_seed_that_is_changed_later():
    changed = read(prompt_token_ids=torch.arange(20)[:, None])
    changed.next_rows(5)
    changed.seed, changed.taken = 4, 0
    fresh = prompts_from(num_tokens=50, seed=4, prompt_token_ids=torch.arange(20)[:, None])
    assert torch.equal(changed.next_rows(5), fresh.next_rows(5))


def test_shares_of_all_ranks_make_up_the_next_prompts():
    ids = torch.arange(20)[:, None]
    together = read(prompt_token_ids=ids).next_rows(9)
    shares = [read(prompt_token_ids=ids).next_share(8, rank, of=3) for rank in range(3)]  # 8 is rounded up to 9
    assert torch.equal(torch.cat(shares), together)


def test_selected_prompts_are_padded_to_the_longest_of_them():
    prompts = read(prompt_token_ids=[torch.tensor(ids) for ids in ([1, 2, 3, 4], [5], [6, 7])])
    ids, mask = prompts.select(torch.tensor([2, 1]))
    assert ids.tolist() == [[6, 7], [5, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


def test_token_equal_to_pad_value_stays_inside_a_prompt():
    rows = torch.tensor([[5, 0, 6, 0, 7, 8], [5, 0, 6, 0, 0, 0]])
    assert rows_of(read(prompt_token_ids=rows, pad_value=0)) == [[5, 0, 6, 0, 7, 8], [5, 0, 6]]
    assert rows_of(read(prompt_token_ids=rows)) == rows.tolist()
    lengths = torch.tensor([6, 4])
    assert rows_of(read(prompt_token_ids=rows, prompt_lengths=lengths, pad_value=0)) == [
        [5, 0, 6, 0, 7, 8],
        [5, 0, 6, 0],
    ]


@pytest.mark.parametrize("pad_value", [-1, 50])
def test_pad_value_may_lie_outside_the_vocabulary(pad_value):
    rows = torch.tensor([[5, 6, 7], [8, pad_value, pad_value]])
    prompts = read(prompt_token_ids=rows, pad_value=pad_value)
    assert rows_of(prompts) == [[5, 6, 7], [8]]
    assert prompts.select(torch.tensor([0, 1]))[0].tolist() == [[5, 6, 7], [8, 0, 0]]


@pytest.mark.parametrize("filler", [0, -7])
def test_mask_says_padding_on_either_side(filler):
    rows = torch.tensor([[filler, filler, 4, 2], [9, 8, 7, filler], [1, 2, 3, 4]])
    mask = torch.tensor([[False, False, True, True], [True, True, True, False], [True] * 4])
    assert rows_of(read(prompt_token_ids=rows, prompt_mask=mask)) == [[4, 2], [9, 8, 7], [1, 2, 3, 4]]


def words(text):
    return {"input_ids": [len(word) for word in text.split()]}


class BatchEncoding(dict):
    """As Hugging Face's tokenizers return it: a mapping whose entries are attributes too."""

    def __getattr__(self, name):
        return self[name]


def padded(texts):
    rows = [[len(word) for word in text.split()] for text in ([texts] if isinstance(texts, str) else texts)]
    longest = max(map(len, rows))
    return BatchEncoding(
        input_ids=torch.tensor([[49] * (longest - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    )


class Encoder:
    def encode(self, text):
        return [len(word) for word in text.split()]


@pytest.mark.parametrize("tokenizer", [words, padded, Encoder(), lambda text: torch.tensor(Encoder().encode(text))])
def test_text_is_read_by_any_tokenizer(tokenizer):
    assert rows_of(read(prompts=["a short one", "longest"], tokenizer=tokenizer)) == [[1, 5, 3], [7]]


def test_file_gives_one_prompt_a_line_without_the_blank_ones(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("hello\n\n  \na b\n", encoding="utf-8")
    assert rows_of(read(prompts_path=path, tokenizer=words)) == [[5], [1, 1]]
    assert rows_of(read(prompts_path=str(path), tokenizer=words)) == [[5], [1, 1]]


IDS = torch.tensor([[1, 2, 3], [4, 5, 0]])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "not none"),
        ({"prompt_token_ids": IDS, "prompts": ["a"]}, "prompt_token_ids and prompts"),
        ({"prompts": ["a"], "prompts_path": "x", "tokenizer": words}, "prompts and prompts_path"),
        ({"prompts": ["a"]}, "give the tokenizer"),
        ({"prompts": [], "tokenizer": words}, "no prompt"),
        ({"prompts": ["a", ""], "tokenizer": words}, r"texts\[1\]"),
        ({"prompt_token_ids": []}, "empty list"),
        ({"prompt_token_ids": [torch.tensor([1]), torch.tensor([], dtype=torch.long)]}, "prompt 1 has shape"),
        ({"prompt_token_ids": [torch.tensor([[1]])]}, "prompt 0 has shape"),
        ({"prompt_token_ids": IDS[0]}, r"shape \(3,\)"),
        ({"prompt_token_ids": IDS[:, :0]}, r"shape \(2, 0\)"),
        ({"prompt_token_ids": IDS + 46}, "id 51"),
        ({"prompt_token_ids": IDS - 1}, "id -1"),
        ({"prompt_token_ids": IDS, "prompt_mask": IDS > 0, "prompt_lengths": torch.tensor([3, 2])}, "not both"),
        ({"prompt_token_ids": IDS, "prompt_mask": (IDS > 0)[:1]}, r"prompt_mask \(\(1, 3\)"),
        ({"prompt_token_ids": IDS, "prompt_mask": IDS}, "must be boolean"),
        ({"prompt_token_ids": IDS, "prompt_mask": IDS == 2}, "prompt 1 is all padding"),
        ({"prompt_token_ids": IDS, "prompt_lengths": torch.tensor([3, 0])}, "prompt 1 is all padding"),
        ({"prompt_token_ids": IDS, "prompt_lengths": torch.tensor([3, 4])}, "length"),
        ({"prompt_token_ids": IDS, "prompt_lengths": torch.tensor([3])}, r"prompt_lengths \(\(1,\)"),
        ({"prompt_token_ids": IDS * torch.tensor([[1], [0]]), "pad_value": 0}, "prompt 1 is all padding"),
        ({"prompt_token_ids": IDS.flip(1), "pad_value": 0}, "prompt 1 begins with pad_value"),
        ({"prompt_token_ids": [IDS[0]], "prompt_mask": IDS > 0}, "a list says its lengths"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_used_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read(**source)


@pytest.mark.parametrize(
    "source",
    [
        {"prompt_token_ids": IDS.float()},
        {"prompt_token_ids": IDS > 0},
        {"prompt_token_ids": [IDS[0].float()]},
        {"prompt_token_ids": [[1, 2]]},
        {"prompts": "one text", "tokenizer": words},
        {"prompts": ["a"], "tokenizer": 5},
    ],
)
def test_prompts_of_a_wrong_type_are_refused(source):
    with pytest.raises(TypeError):
        read(**source)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        read(prompts_path=tmp_path / "nowhere.txt", tokenizer=words)


def test_single_prompt_loses_its_padding_only():
    assert one_prompt(torch.tensor([4, 0, 5, 0]), num_tokens=9, pad_value=0, seq_len=4).tolist() == [4, 0, 5]
    assert one_prompt(torch.tensor([4, 0, 5, 0]), num_tokens=9, pad_value=None, seq_len=5).tolist() == [4, 0, 5, 0]
    with pytest.raises(ValueError, match=r"seq_len \(4\)"):
        one_prompt(torch.tensor([4, 0, 5, 0]), num_tokens=9, pad_value=None, seq_len=4)
    with pytest.raises(ValueError, match="one prompt"):
        one_prompt(torch.tensor([[4]]), num_tokens=9, pad_value=None, seq_len=4)
