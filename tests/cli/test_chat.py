"""`palm-rlhf chat`: turns and context on a model that repeats itself, the terminal on scripted talks and a real one."""

import io
import json
import os
import select
import subprocess
import sys
import time

import pytest
import torch

from palm_rlhf_pytorch.cli.chat import Terminal
from palm_rlhf_pytorch.cli.chat_session import Book, Chat, RawText, Voice
from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.dialogues import Turn, read_parts, read_turns
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def parrot():
    """Says its last token again and again when it is greedy: its layers add nothing to it."""
    torch.manual_seed(0)
    palm = PaLM(num_tokens=259, dim=64, depth=1, heads=2, dim_head=4)
    with torch.no_grad():
        palm.token_emb.weight.normal_()
        for layer in palm.layers:
            layer.out_proj.weight.zero_()
    return palm.eval()


@pytest.fixture
def voice(parrot):
    def make(**changes):
        settings = {"context": 500, "max_new_tokens": 3, "temperature": 0.0, "generator": torch.Generator()} | changes
        return Voice(parrot, BYTES, **settings)

    return make


@pytest.fixture
def asked(parrot, monkeypatch):
    """Texts that the model was asked to go on with."""
    found = []
    stream = parrot.stream

    def watched(ids, **options):
        found.append(BYTES.decode(ids))
        return stream(ids, **options)

    monkeypatch.setattr(parrot, "stream", watched)
    return found


def test_a_chat_asks_with_all_turns_and_keeps_the_answer(voice, asked):
    chat = Chat(voice(), system="Be brief.")
    assert "".join(chat.answer("Hi")) == ":::"  # the template ends with "Assistant:"
    list(chat.answer("And?"))
    opening = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:"
    assert asked == [opening, opening + " :::\n\nHuman: And?\n\nAssistant:"]
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", ":::"), ("user", "And?"), ("assistant", ":::")]
    record = json.loads(json.dumps(chat.record()))
    assert list(read_turns(record["messages"], field="messages")) == [Turn(*turn) for turn in turns]
    assert read_parts(None, record["messages"], field="messages").response == " :::"
    chat.reset()
    assert chat.record() is None


def test_an_answer_that_is_left_early_is_kept_as_far_as_it_was_given(voice):
    chat = Chat(voice(max_new_tokens=50))
    pieces = chat.answer("Hi")
    assert [next(pieces), next(pieces)] == [":", ":"]
    pieces.close()
    assert chat.turns == [Turn("user", "Hi"), Turn("assistant", "::")]
    chat.answer("never read").close()
    assert len(chat.turns) == 2


def test_the_oldest_turns_are_left_out_of_what_is_too_long(voice, asked):
    chat = Chat(voice(context=70), system="S")
    for message in ("one", "two", "three"):
        list(chat.answer(message))
    # bytes and EOS: 11 of the system, 24 of a question (26 the third), 5 of an answer; 67 leave room for an answer
    first, second = "\n\nHuman: one\n\nAssistant: :::", "\n\nHuman: two\n\nAssistant:"
    assert asked[1] == "\n\nSystem: S" + first + second and not asked[2].count("one")
    assert asked[2] == "\n\nSystem: S" + second + " :::\n\nHuman: three\n\nAssistant:"
    assert chat.forgotten and len(chat.record()["messages"]) == 7
    with pytest.raises(ValueError, match="context of 70 leaves no room"):
        list(chat.answer("x" * 60))
    assert len(chat.turns) == 6


def test_raw_text_goes_on_where_it_was(voice, asked):
    raw = RawText(voice(context=12))
    assert "".join(raw.answer("ab")) == "bbb" and "".join(raw.answer("")) == "bbb"
    assert asked == ["ab", "abbbb"] and raw.record() == {"text": "abbbbbbb"} and not raw.forgotten
    list(raw.answer("0123456789"))
    assert asked[-1] == "123456789" and raw.forgotten


def test_a_talk_is_a_line_and_saving_it_again_replaces_it(tmp_path):
    path, book = tmp_path / "talks.jsonl", Book()
    path.write_text('{"text": "earlier"}')
    for text in ("a", "ab"):
        book.save({"text": text}, path)
    book.turn_page()
    book.save({"text": "ç"}, path)
    assert [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()] == ["earlier", "ab", "ç"]
    with pytest.raises(ValueError, match=r"ends with \.jsonl"):
        book.save({"text": "a"}, tmp_path / "palm.pt")


class Talk:
    """Answers with fixed pieces; one that is an exception is raised."""

    forgotten = True

    def __init__(self, *pieces):
        self.pieces, self.heard = pieces, []

    def answer(self, message):
        self.heard.append(message)
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def reset(self):
        self.heard = []

    def record(self):
        return {"text": "said"} if self.heard else None


def run_terminal(session, lines, *, interactive=True):
    given = iter(lines)

    def read():
        line = next(given, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    Terminal(session, read=read, interactive=interactive).talk()


def test_the_terminal_answers_obeys_and_leaves(tmp_path, capsys):
    talk = Talk("one\x1b", " two")
    path = tmp_path / "talk.jsonl"
    lines = ["/save x.jsonl", "hi", " ", "//path", f"/save {path}", "/what", "/help", "/reset", "/exit", "unread"]
    run_terminal(talk, [KeyboardInterrupt(), *lines])
    out = capsys.readouterr().out
    assert out.count("one\N{REPLACEMENT CHARACTER} two\n") == 2 and out.count("longer than the context") == 1
    for told in ("(/exit or Ctrl-D leaves)", "nothing was said yet", "unknown command /what", "//text", "begun anew"):
        assert told in out
    assert path.read_text() == '{"text": "said"}\n' and talk.heard == []


def test_ctrl_c_ends_the_answer_and_not_the_talk(capsys):
    talk = Talk("half", KeyboardInterrupt())
    run_terminal(talk, ["hi", "again"])
    assert talk.heard == ["hi", "again"] and capsys.readouterr().out.count("half\n(stopped)\n") == 2
    run_terminal(Talk(ValueError("too long")), ["hi"])
    assert "error: too long" in capsys.readouterr().out
    for mistake in (KeyboardInterrupt, ValueError):  # nobody is there
        with pytest.raises(mistake):
            run_terminal(Talk(mistake()), ["hi"], interactive=False)


@pytest.fixture
def checkpoint(parrot, tmp_path):
    parrot.save(tmp_path / "parrot.pt")
    return str(tmp_path / "parrot.pt")


def test_lines_of_a_pipe_are_answered_until_they_end(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nHo"))
    assert main(["chat", checkpoint, "--temperature", "0", "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "::::\n::::\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "1"], "--context 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--top-p", "2"], "top_p"),
        (["--raw", "--system", "x"], "--raw knows no turns"),
        (["--stop", ""], "stop[0] is empty"),
    ],
)
def test_chat_refuses_bad_options_before_it_begins(checkpoint, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["chat", checkpoint, "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


def test_generate_asks_as_a_chat(checkpoint, capsys):
    options = ["--chat", "--temperature", "0", "--max-new-tokens", "4", "--device", "cpu"]
    assert main(["generate", checkpoint, "Hi", *options]) == 0
    assert capsys.readouterr().out == "Hi\n::::\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_at_a_terminal_answers_stream_and_ctrl_c_stops_them(checkpoint):
    ours, theirs = os.openpty()
    options = ["--temperature", "0", "--max-new-tokens", "30000", "--context", "50000", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "palm_rlhf_pytorch", "chat", checkpoint, *options],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)
    try:
        read_until(ours, "> ")
        os.write(ours, b"Hi\n")
        read_until(ours, ":::::")  # it has begun, and would go on for a minute
        os.write(ours, b"\x03")
        assert "(stopped)" in read_until(ours, "\n> ")
        os.write(ours, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def take_terminal():
    """Make standard input the terminal that Ctrl-C comes from."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_until(terminal, text, *, seconds=40):
    """What comes up to a text."""
    found, end = "", time.monotonic() + seconds
    while text not in found:
        assert time.monotonic() < end, f"{text!r} did not come: {found[-300:]!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            found += os.read(terminal, 4096).decode(errors="replace")
    return found
