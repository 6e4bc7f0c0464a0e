"""Experience on disk: the same bits as in memory, whatever was killed, cut or flipped in between."""

import json
import os
import random
import resource
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.policy import rollout_file
from palm_rlhf_pytorch.policy.experience import Experience
from palm_rlhf_pytorch.policy.rollout import Rollout, row_batches
from palm_rlhf_pytorch.policy.rollout_file import RolloutFile
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

KILLS = 15
SPANS = [(5, 3), (1, 7), (4, 0), (2, 1), (6, 2), (3, 5), (1, 1)]  # the third counts nowhere
CPU = torch.device("cpu")


def make_rollout(spans: list[tuple[int, int]], *, seed: int = 0, version: int = 0, scored: bool = False) -> Rollout:
    """Random ids and numbers, zero beyond each row's end."""
    generator = torch.Generator().manual_seed(seed)
    prompts, lengths = torch.tensor(spans).unbind(dim=1)
    width, steps, rows = int((prompts + lengths).max()), int(lengths.max()), len(spans)
    real = torch.arange(width) < (prompts + lengths)[:, None]
    answered = torch.arange(steps) < lengths[:, None]
    numbers = torch.randn(5, rows, steps, generator=generator).masked_fill(~answered, 0.0)
    return Rollout(
        torch.randint(1, 2**31 - 1, (rows, width), generator=generator).masked_fill(~real, 0).int(), prompts, lengths,
        *numbers, ended=torch.rand(rows, generator=generator) < 0.5,
        prompt_rows=torch.arange(rows) * 2**40 - 1, versions=torch.arange(rows) + version, temperature=0.7,
        eos_token=3, scores=torch.randn(rows, generator=generator) if scored else None,
    )  # fmt: skip


def assert_same(found: Rollout, expected: Rollout) -> None:
    """Every field to the bit, in dtype and shape too."""
    for name, ours, theirs in zip(Rollout._fields, found, expected, strict=True):
        if isinstance(theirs, Tensor):
            assert isinstance(ours, Tensor) and ours.dtype == theirs.dtype, name
            assert torch.equal(ours, theirs), name
        else:
            assert ours == theirs and type(ours) is type(theirs), name


def filled(path: Path, rollout: Rollout) -> RolloutFile:
    file = RolloutFile(path)
    file.append(rollout)
    return file


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("layout", [[[7]], [[3, 1, 3]], [[2, 3], [2]]])  # files, and the rows of each append
@pytest.mark.parametrize("reopened", [True, False])
def test_rows_come_back_as_from_memory(tmp_path: Path, scored: bool, layout: list[list[int]], reopened: bool) -> None:
    rollout = make_rollout(SPANS, scored=scored)
    files, first = [RolloutFile(tmp_path / f"{number}") for number in range(len(layout))], 0
    for file, appends in zip(files, layout, strict=True):
        for rows in appends:
            part = rollout.select(torch.arange(first, first + rows))
            file.append(part)
            assert_same(Experience([file]).select(torch.arange(len(file) - rows, len(file))), part)
            first += rows
    source = Experience([RolloutFile(file.path) if reopened else file for file in files])
    assert len(source) == 7 and list(source.spans()) == rollout.spans() == SPANS
    assert source.spans()[1:6:2] == SPANS[1:6:2] and source.spans()[-2] == SPANS[-2]
    for name in ("ended", "prompt_rows", "versions", "eos_token"):
        assert_same(rollout._replace(**{name: getattr(source, name)}), rollout)
    assert (source.scores is None) if not scored else torch.equal(source.scores, rollout.scores)
    for rows in (torch.arange(7), torch.tensor([6, 1, 1]), torch.tensor([2]), rollout.ended):
        assert_same(source.select(rows), rollout.select(rows))
    for rows in row_batches(SPANS, [3, 5, 0, 2, 6], device=CPU, max_rows=2):
        assert_same(source.select(rows), rollout.select(rows))
    with pytest.raises(IndexError, match="out of range"):
        source.spans()[7]
    with pytest.raises(IndexError, match="row 7 is none of the 7"):
        source.select(next(row_batches([*SPANS, (1, 1)], [7], device=CPU)))


def test_a_token_takes_at_most_24_bytes(tmp_path: Path) -> None:
    rollout = make_rollout([(4, 1), (4, 90), (31, 0)])
    size = os.stat(filled(tmp_path / "a", rollout).path).st_size
    assert size == 32 + 3 * 52 + 4 * (5 + 94 + 31) + 20 * 91  # headers and markers, ids, five numbers
    assert size <= 24 * (5 + 94 + 31)


def test_discarded_file_begins_anew(tmp_path: Path) -> None:
    file = filled(tmp_path / "a", make_rollout(SPANS, scored=True))
    assert file.files() == [tmp_path / "a", tmp_path / "a.scores"]
    file.discard()
    assert len(file) == 0 and file.scores is None and os.listdir(tmp_path) == []
    other = make_rollout([(2, 3)], seed=1)._replace(temperature=1.0, eos_token=None)
    file.append(other)
    assert_same(Experience([RolloutFile(file.path)]).select(torch.tensor([0])), other)


# damage


def kept_rows(path: Path, rollout: Rollout) -> int | None:
    """How many rows a damaged file still gives, which must be those that were stored; None if it is refused."""
    try:
        file = RolloutFile(path)
    except ValueError as error:
        assert str(path) in str(error)
        return None
    if len(file):
        assert_same(Experience([file]).select(torch.arange(len(file))), rollout.select(torch.arange(len(file))))
    return len(file)


def record_starts(spans: list[tuple[int, int]]) -> list[int]:
    """Where each record begins, and the last ends."""
    starts = [32]
    for prompt, length in spans:
        starts.append(starts[-1] + 52 + 4 * (prompt + length) + 20 * length)
    return starts


def test_flipped_byte_is_refused_or_costs_the_last_record(tmp_path: Path) -> None:
    spans = SPANS[1:4]
    rollout = make_rollout(spans)
    path = filled(tmp_path / "a", rollout).path
    content, (*_, last, end) = path.read_bytes(), record_starts(spans)
    assert len(content) == end
    for place in range(end):
        path.write_bytes(content[:place] + bytes([content[place] ^ random.randint(1, 255)]) + content[place + 1 :])
        assert kept_rows(path, rollout) in ([None] if place < last + 44 else [2])
    path.write_bytes(content)
    assert kept_rows(path, rollout) == 3


@pytest.mark.parametrize("tail", [b"", b"\0" * 77], ids=["cut", "zeros"])
def test_cut_file_keeps_whole_records_and_goes_on(tmp_path: Path, tail: bytes) -> None:
    spans = [(4, 0), (1, 7), (2, 1)]
    rollout, more = make_rollout(spans), make_rollout([(2, 2)], seed=1)
    path = filled(tmp_path / "a", rollout).path
    content, starts = path.read_bytes(), record_starts(spans)
    for size in starts[:-1] if tail else range(starts[-1]):
        path.write_bytes(content[:size] + tail)
        whole = sum(start <= size for start in starts[1:])
        assert kept_rows(path, rollout) == (whole if size >= 32 else None)
        if size >= 32 and (tail or size % 7 == 0):
            file = RolloutFile(path)
            file.append(more)
            file = RolloutFile(path)
            assert len(file) == whole + 1
            assert_same(Experience([file]).select(torch.tensor([whole])), more)
            assert path.stat().st_size == starts[whole] + 52 + 4 * 4 + 20 * 2


def test_damaged_scores_are_refused(tmp_path: Path) -> None:
    rollout = make_rollout(SPANS, scored=True)
    file = filled(tmp_path / "a", rollout)
    content = file.scores_path.read_bytes()
    assert len(content) == 24 + 4 * 7
    for place in range(len(content)):
        flipped = content[:place] + bytes([content[place] ^ random.randint(1, 255)]) + content[place + 1 :]
        for damaged in (flipped, content[:place], content + content[: place + 1]):
            file.scores_path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"a\.scores is damaged"):
                RolloutFile(file.path)
    file.scores_path.write_bytes(content)
    assert torch.equal(RolloutFile(file.path).scores, rollout.scores)


def test_scores_are_of_all_rows_or_of_none(tmp_path: Path) -> None:
    rollout = make_rollout(SPANS, scored=True)
    file = filled(tmp_path / "a", rollout)
    file.append(rollout._replace(scores=None))
    assert file.scores is None and RolloutFile(file.path).scores is None
    with pytest.raises(ValueError, match=r"scores \(7,\) must be one for each of the 14 rows"):
        file.set_scores(rollout.scores)
    scores = torch.arange(14.0)
    scores[3] = torch.nan
    file.set_scores(scores)
    assert torch.equal(RolloutFile(file.path).scores.nan_to_num(-1), scores.nan_to_num(-1))
    assert Experience([file, filled(tmp_path / "b", rollout._replace(scores=None))]).scores is None
    (tmp_path / "c.scores").write_bytes(file.scores_path.read_bytes())
    with pytest.raises(ValueError, match="more than the scores of the 0 rows"):
        RolloutFile(tmp_path / "c")


def test_absurd_lengths_are_not_believed(tmp_path: Path) -> None:
    rollout = make_rollout(SPANS)
    path = filled(tmp_path / "a", rollout).path
    content, (*_, last, end) = path.read_bytes(), record_starts(SPANS)
    for row, kept in ((6, 6), (7, 7), (9, None)):  # in place of the last, after it, and one with a wrong number
        header = struct.pack("<4s4I2qI", b"RESP", row, 2**32 - 1, 2**32 - 1, 1, 0, 0, 0)
        header += struct.pack("<I", zlib.crc32(header))
        path.write_bytes(content[: last if row == 6 else end] + header)
        assert kept_rows(path, rollout) == kept


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"PALMROLL", b"PALMROLL" + struct.pack("<Idq", 2, 1, 1)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    newer = len(content) == 28
    (tmp_path / "a").write_bytes(content + (struct.pack("<I", zlib.crc32(content)) if newer else b""))
    with pytest.raises(ValueError, match="format version 2" if newer else r"a starts with|a is damaged"):
        RolloutFile(tmp_path / "a")
    with pytest.raises(ValueError, match="a folder"):
        RolloutFile(tmp_path)


# writing


def append_until_killed(path: Path, pool: Rollout, acknowledged: int, *, wait: bool) -> None:
    """In a child process: record k holds row k of the pool, over and over."""
    torch.set_num_threads(1)
    if not wait:  # a kill, unlike a power cut, loses nothing that was written; and so more of them hit a write
        rollout_file.os.fsync = lambda descriptor: None
    file = RolloutFile(path, verify=False)
    while True:
        rows = torch.arange(len(file), len(file) + 29) % len(pool.lengths)
        file.append(pool.select(rows))
        os.write(acknowledged, struct.pack("<Q", len(file)))


def wait_and_kill(child: int, acknowledged: int, seconds: float) -> int:
    """Rows that the child said were on the disk."""
    told = os.read(acknowledged, 8)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(acknowledged, 8 * 64):
        told += more
    return struct.unpack("<Q", told[-8:])[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer is a fork of this process")
def test_kill_loses_no_row_that_was_appended(tmp_path: Path) -> None:
    pool = make_rollout([(3 + row % 5, 2011 + row % 7) for row in range(31)])
    for kill in range(KILLS):
        path = tmp_path / f"{kill // 4}"
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                append_until_killed(path, pool, writer, wait=kill % 2 == 0)
            finally:
                os._exit(1)
        os.close(writer)
        told = wait_and_kill(child, reader, random.uniform(0, 0.006))
        os.close(reader)
        file = RolloutFile(path)
        assert len(file) >= told > 0
        for rows in torch.arange(len(file)).split(100):
            assert_same(Experience([file]).select(rows), pool.select(rows % 31))


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may grow beyond 2000 bytes; only for what is inside: pytest's own output may be a file too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_the_rows_before(tmp_path: Path) -> None:
    rollout, large = make_rollout(SPANS), make_rollout([(3, 99)])
    file = filled(tmp_path / "a", rollout)
    before = file.path.read_bytes()
    with pytest.raises(OSError, match=r"too large while adding 2,\d+ bytes; .*untouched.*a'"):
        with small_disk():
            file.append(large)
    assert file.path.read_bytes() == before and len(file) == 7
    assert_same(Experience([file]).select(torch.arange(7)), rollout)
    file.append(rollout.select(torch.tensor([3])))
    assert len(RolloutFile(file.path)) == 8


def spoiled(rollout: Rollout, name: str, row: int, value: float) -> Rollout:
    part = getattr(rollout, name).clone()
    part[row] = value
    return rollout._replace(**{name: part})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda rollout: spoiled(rollout, "logprobs", 3, torch.nan), ValueError, "logprobs of row 3 is NaN"),
        (lambda rollout: spoiled(rollout, "values", 5, torch.inf), ValueError, "values of row 5 is NaN or infinite"),
        (lambda rollout: spoiled(rollout, "lengths", 4, 9), ValueError, "row 4 has prompt_lengths 6 and lengths 9"),
        (lambda rollout: spoiled(rollout, "prompt_lengths", 1, 2**31), ValueError, "row 1 has prompt_lengths 2147"),
        (lambda rollout: spoiled(rollout, "lengths", 0, -1), ValueError, "row 0 has prompt_lengths 5 and lengths -1"),
        (lambda rollout: rollout._replace(temperature=1.0), ValueError, "temperature 1.0 and eos_token 3, .* 0.7 and"),
        (lambda rollout: rollout._replace(eos_token=None), ValueError, "eos_token None, .* 0.7 and 3"),
        (lambda rollout: rollout._replace(values=rollout.values.bfloat16()), TypeError, "values is torch.bfloat16"),
        (lambda rollout: rollout._replace(sequences=rollout.sequences.long()), TypeError, "sequences is torch.int64"),
        (lambda rollout: rollout._replace(values=rollout.values[:, 1:]), ValueError, r"values \(7, 6\)"),
        (lambda rollout: rollout._replace(scores=torch.zeros(6)), ValueError, r"scores \(6,\)"),
        (lambda rollout: rollout._replace(sequences=rollout.sequences[1:]), ValueError, "numbers of rows"),
    ],
)
def test_rollout_that_cannot_be_kept_is_refused(tmp_path: Path, change, error, message) -> None:
    rollout = make_rollout(SPANS)
    file = filled(tmp_path / "a", rollout)
    before = file.path.read_bytes()
    with pytest.raises(error, match=message):
        file.append(change(rollout))
    assert file.path.read_bytes() == before and len(file) == 7


def test_what_does_not_count_is_not_looked_at(tmp_path: Path) -> None:
    rollout = spoiled(make_rollout(SPANS), "logprobs", 2, torch.nan)  # a row of length 0
    part = Experience([filled(tmp_path / "a", rollout)]).select(torch.arange(7))
    assert part.lengths[2] == 0 and not part.logprobs[2].any()


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    rollout = make_rollout(SPANS)
    files = [filled(tmp_path / "a", rollout), filled(tmp_path / "b", rollout._replace(temperature=1.0))]
    with pytest.raises(ValueError, match="differ in device, temperature or eos_token"):
        Experience(files)
    with pytest.raises(ValueError, match="files is empty"):
        Experience([])
    other = RolloutFile(tmp_path / "a")
    other.append(rollout)
    with pytest.raises(ValueError, match="another process has changed it"):
        files[0].append(rollout)
    assert len(RolloutFile(tmp_path / "a")) == 14


# judging and reading


def test_rescore_gives_what_the_judge_says_of_each_row(tmp_path: Path) -> None:
    rollout = make_rollout(SPANS, scored=True)
    files = [filled(tmp_path / "a", rollout.select(torch.arange(5))), RolloutFile(tmp_path / "b")]
    files.append(filled(tmp_path / "c", rollout.select(torch.arange(5, 7))))
    calls = []

    def judge(sequences: Tensor, *, prompt_mask: Tensor, mask: Tensor) -> Tensor:
        calls.append(tuple(sequences.shape))
        return (sequences % 101 * (mask & ~prompt_mask)).sum(dim=-1).float()

    Experience(files).rescore(judge, max_batch_size=3, max_batch_tokens=16)
    assert max(rows for rows, _ in calls) == 3 and max(rows * width for rows, width in calls) <= 16
    expected = [
        float(sum(token % 101 for token in ids[prompt : prompt + length]))
        for ids, (prompt, length) in zip(rollout.sequences.tolist(), SPANS, strict=True)
    ]
    assert expected[2] == 0 and len(set(expected)) == 7
    assert Experience([RolloutFile(file.path) for file in files]).scores.tolist() == expected


def test_lines_for_people(tmp_path: Path) -> None:
    rollout = make_rollout([(4, 5), (2, 3)])._replace(
        sequences=torch.tensor([[*b"two + ", 258, 258, 33], [*b"hi!", 226, 128, 0, 0, 0, 0]]).int(),
        logprobs=torch.tensor([[-1.0, -2, -3, -4, -5], [-0.5, -1, 0, 0, 0]]),
        ref_logprobs=torch.tensor([[-1.5, -1, -3, -4, -7], [-0.5, -1, -0.25, 0, 0]]),
        ended=torch.tensor([True, False]), prompt_rows=torch.tensor([-1, 8]), versions=torch.tensor([3, 4]),
        scores=torch.tensor([0.5, torch.inf]),
    )  # fmt: skip
    source = Experience([filled(tmp_path / "a", rollout)])
    source.to_jsonl(tmp_path / "lines.jsonl", ByteTokenizer())
    first = {"prompt": "two ", "response": "+ !", "score": 0.5, "ended": True, "version": 3, "prompt_row": -1}
    second = {"prompt": "hi", "response": "!\ufffd", "score": None, "ended": False, "version": 4, "prompt_row": 8}
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert lines == [
        first | {"prompt_length": 4, "length": 5, "kl": 1.5},
        second | {"prompt_length": 2, "length": 3, "kl": 0.25},
    ]
    source.to_jsonl(tmp_path / "lines.jsonl", None)
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert lines[1]["prompt"] == [*b"hi"] and lines[1]["response"] == [33, 226, 128]
