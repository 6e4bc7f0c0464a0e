"""The cache: asked once about the same response, across calls, processes and failures."""

import math
import sqlite3

import pytest
import torch

from palm_rlhf_pytorch.reward.caching import CachedJudge
from palm_rlhf_pytorch.tensors import lengths_to_mask, pad_ragged


class Counting:
    """A judge that remembers what it was asked: the sum of the response's ids, or each of them."""

    def __init__(self, tokens=False):
        self.rows, self.tokens, self.missing = [], tokens, ()

    def __call__(self, sequences, *, prompt_mask, mask):
        self.rows += [row[kept].tolist() for row, kept in zip(sequences, mask, strict=True)]
        assert int(mask.sum(dim=1).max()) == sequences.shape[1]  # trimmed to the longest
        responses = [row[kept].float() for row, kept in zip(sequences, mask & ~prompt_mask, strict=True)]
        if self.tokens:
            return pad_ragged(responses)[0]
        return torch.tensor([math.nan if r.tolist() in self.missing else r.sum().item() for r in responses])


def ask(judge, *rows):
    """Ask about rows of (prompt, response), padded to nine tokens."""
    texts = [torch.tensor([*prompt, *response]) for prompt, response in rows]
    sequences, mask = pad_ragged([*texts, torch.zeros(9, dtype=torch.long)])
    sequences, mask = sequences[:-1], mask[:-1]
    prompt_mask = lengths_to_mask(torch.tensor([len(prompt) for prompt, _ in rows]), sequences.shape[1])
    return judge(sequences, prompt_mask=prompt_mask, mask=mask).tolist()


def test_equal_rows_are_judged_once_and_the_border_counts():
    inner = Counting()
    judge = CachedJudge(inner)
    assert ask(judge, ([1], [2, 3]), ([1, 2], [3]), ([1], [2, 3])) == [5, 3, 5]
    assert inner.rows == [[1, 2, 3], [1, 2, 3]]
    assert ask(judge, ([4], [0, 6]), ([1], [2, 3])) == [6, 5]
    assert inner.rows[2:] == [[4, 0, 6]]
    assert (judge.num_asked, judge.num_hits) == (3, 2)
    assert ask(judge, ([4], [0, 6])) == [6] and len(inner.rows) == 3
    assert ask(judge, ([4], [6])) == [6] and len(inner.rows) == 4  # a real 0 is no padding


def test_rewards_of_tokens_come_back_in_their_places(tmp_path):
    inner = Counting(tokens=True)
    path = tmp_path / "said.sqlite"
    assert ask(CachedJudge(inner, path=path, version="a"), ([1], [2, 3]), ([], [5])) == [[2, 3], [5, 0]]
    again = CachedJudge(inner, path=path, version="a")
    assert ask(again, ([], [5]), ([1], [2, 3]), ([], [7, 8, 9])) == [[5, 0, 0], [2, 3, 0], [7, 8, 9]]
    assert len(inner.rows) == 3 and again.num_hits == 2


def test_memory_keeps_what_was_asked_last():
    inner = Counting()
    judge = CachedJudge(inner, max_entries=2)
    for response in ([1], [2], [1], [3], [1], [2]):  # 3 pushes 2 out, for 1 was asked after it
        ask(judge, ([], response))
    assert inner.rows == [[1], [2], [3], [2]]
    judge.clear()
    ask(judge, ([], [2]))
    assert inner.rows[4:] == [[2]]


def test_what_could_not_be_judged_is_asked_again(tmp_path):
    inner = Counting()
    inner.missing = ([2],)
    judge = CachedJudge(inner, path=tmp_path / "said", version="a")
    first = ask(judge, ([], [2]), ([], [3]))
    assert math.isnan(first[0]) and first[1] == 3
    inner.missing = ()
    assert ask(judge, ([], [2]), ([], [3])) == [2, 3]
    assert inner.rows == [[2], [3], [2]]


def test_file_is_bounded_and_outlives_the_judge(tmp_path):
    path = tmp_path / "made" / "said.sqlite"
    inner = Counting()
    for response in ([1], [2], [3]):
        ask(CachedJudge(inner, path=path, version="a", max_entries=2), ([], response))
    judge = CachedJudge(inner, path=path, version="a", max_entries=2)
    assert ask(judge, ([], [3]), ([], [2]), ([], [1])) == [3, 2, 1]
    assert inner.rows == [[1], [2], [3], [1]]


def test_a_call_that_is_killed_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "said.sqlite"
    judge = CachedJudge(Counting(), path=path, version="a")
    ask(judge, ([], [1]))
    with pytest.raises(RuntimeError, match="killed"), judge._file._open() as database:
        database.execute("INSERT INTO said VALUES (x'00', 1.0, NULL)")
        raise RuntimeError("killed")
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM said").fetchone() == (1,)


def test_foreign_files_and_other_judges_are_refused_and_kept(tmp_path):
    text, foreign, ours = tmp_path / "notes.txt", tmp_path / "foreign.sqlite", tmp_path / "said.sqlite"
    text.write_text("my notes, which are longer than a header of SQLite " * 9)
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE mine (x)")
    CachedJudge(Counting(), path=ours, version="a")
    before = [path.read_bytes() for path in (text, foreign, ours)]
    for path, message in ((text, "cannot be used"), (foreign, "another program's"), (ours, "what 'a' said")):
        with pytest.raises(ValueError, match=message):
            CachedJudge(Counting(), path=path, version="b")
    assert [path.read_bytes() for path in (text, foreign, ours)] == before
    with pytest.raises(ValueError, match="go together"):
        CachedJudge(Counting(), path=ours)
    with pytest.raises(ValueError, match="max_entries"):
        CachedJudge(Counting(), max_entries=0)
