"""Rows of files: what is broken is named by its line, and the rest is still read."""

import gzip
import json

import pytest

from palm_rlhf_pytorch.text.dialogues import FieldError
from palm_rlhf_pytorch.text.rows import check_table, read_rows


def rows_of(path):
    check_table(path)
    return [
        (row.line, str(row.columns) if isinstance(row.columns, FieldError) else row.columns) for row in read_rows(path)
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_lines_are_read_whatever_their_ends(tmp_path, suffix):
    long = "x" * 3_000_000
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "%s"}\n{"a": null}' % long.encode()
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert rows_of(path) == [(1, {"a": 1}), (4, {"a": long}), (5, {"a": None})]


def test_broken_lines_are_named_and_the_rest_is_read(tmp_path):
    lines = [
        b'{"a": 1}',
        b'{"a": "\xff"}',
        b"[1]",
        b'{"a": 1, "b": 2, "a": 3}',
        b"[" * 100_000,
        b'{"a": 2}',
        b'{"a": "cut',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = rows_of(path)
    assert [line for line, _ in found] == [1, 2, 3, 4, 5, 6, 7]
    assert found[0][1] == {"a": 1} and found[5][1] == {"a": 2}
    for place, reason in {
        1: "byte 0xff at offset 7",
        2: "no object",
        3: "a: stands twice",
        4: "not JSON",
        6: "cut short",
    }.items():
        assert reason in found[place][1]


def test_damaged_gzip_gives_what_stands_before_the_damage(tmp_path):
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(50_000)), mtime=0)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    found = rows_of(path)
    assert 100 < len(found) < 50_000
    assert [columns for _, columns in found[:-1]] == [{"a": number} for number in range(len(found) - 1)]
    assert found[-1][0] == len(found) and "ends early" in found[-1][1]


def test_array_of_rows_is_one_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n [" + json.dumps({"a": [1]}) + ", 5]", encoding="utf-8-sig")
    assert rows_of(path) == [(1, {"a": [1]}), (2, "is JSON, but no object of columns")]
    path.write_text('[{"a": 1}, ')
    with pytest.raises(ValueError, match=r"rows.json is not a whole JSON array"):
        rows_of(path)


def test_cells_of_csv_and_tsv(tmp_path):
    content = 'a,b\r\n1,"two\nlines, one cell"\r\n\r\n,"say ""x"""\r\n1,2,3\r\nend,"open'
    for suffix, text in ((".csv", content), (".tsv", content.replace(",", "\t"))):
        path = tmp_path / f"rows{suffix}"
        path.write_text(text, encoding="utf-8-sig", newline="")
        cell = "two\nlines, one cell" if suffix == ".csv" else "two\nlines\t one cell"
        found = rows_of(path)
        assert found[:2] == [(3, {"a": "1", "b": cell}), (5, {"a": "", "b": 'say "x"'})]
        assert found[2] == (6, "has 3 cells; the header has 2")
        assert found[3][0] == 7 and "not CSV" in found[3][1] and len(found) == 4
    path.with_name("wrong.csv").write_bytes(b"a,b\n1,\xff\n2,3\n")
    assert rows_of(path.with_name("wrong.csv")) == [(2, "b: is not UTF-8"), (3, {"a": "2", "b": "3"})]
    for header in ("a,a\n1,2", "a,\n1,2", ""):
        path.with_name("header.csv").write_text(header)
        with pytest.raises(ValueError, match="names each column once"):
            rows_of(path.with_name("header.csv"))


def test_what_is_no_table_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "notes.txt").write_text("{}")
    for name, error, message in (
        ("", ValueError, "is a folder"),
        ("none.jsonl", FileNotFoundError, "no such file"),
        ("notes.txt", ValueError, "ends with none of .jsonl"),
    ):
        with pytest.raises(error, match=message):
            check_table(tmp_path / name)
