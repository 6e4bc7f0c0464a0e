"""`palm-rlhf chat`: talk to a model in the terminal."""

import argparse
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from importlib import import_module
from pathlib import Path

import torch

from palm_rlhf_pytorch.cli.chat_session import Book, Chat, RawText, Session, Voice
from palm_rlhf_pytorch.cli.device import DTYPES, add_device_argument, add_dtype_argument, device_of
from palm_rlhf_pytorch.cli.generate import add_sampling_arguments, encodable, printable, sampling_of, stops_of
from palm_rlhf_pytorch.cli.models import add_model_argument, load_model, tokenizer_name

PROMPT = "> "
CONTEXT = 8192  # what the published models were trained with
WELCOME = "Write a message and press Enter; Ctrl-C stops an answer, /help lists the commands, /exit or Ctrl-D leaves."
HELP = """\
/reset       forget what was said, and begin anew
/save FILE   add the talk to FILE (.jsonl); again, and the line is replaced
/help        this list
/exit        leave; so does Ctrl-D
//text       say something that begins with a slash
Ctrl-C       stop an answer; what was said of it is kept"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model: its answers come as they are written, and it knows what was said before.\n"
        "Lines that come through a pipe are messages too; then answers alone are written.",
        epilog="commands, at the prompt:\n" + "".join(f"  {line}\n" for line in HELP.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_argument(parser)
    parser.add_argument("--system", metavar="STRING", help="what the model is told before all else")
    parser.add_argument(
        "--raw", action="store_true",
        help="for a model that is no chat model: continue each message as text, and on an empty line go on with it",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=int, default=CONTEXT, metavar="N",
        help=f"tokens of talk and answer together, as many as the model was trained with ({CONTEXT}, as the published"
        " models); the oldest turns are left out of what is longer",
    )  # fmt: skip
    add_sampling_arguments(parser, temperature=0.7, max_new_tokens=512)
    parser.add_argument("--seed", type=int, metavar="N", help="of the answers; another each time without it")
    add_device_argument(parser)
    add_dtype_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves, or the lines of a pipe end.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is no model, or a setting is out of range.
    """
    if args.raw and args.system is not None:
        raise ValueError("--system is a turn of a chat, and --raw knows no turns; leave one of them out")
    device = device_of(args)
    palm, tokenizer = load_model(
        args.palm, device, tokenizer=tokenizer_name(args), ends=False, dtype=DTYPES[args.dtype]
    )
    generator = torch.Generator(device)
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)
    voice = Voice(palm, tokenizer, context=args.context, generator=generator, stop=stops_of(args), **sampling_of(args))
    session = RawText(voice) if args.raw else Chat(voice, system=args.system)
    interactive = sys.stdin.isatty()
    read = _ask if interactive else _next_line
    Terminal(session, read=read, interactive=interactive, empty_lines=args.raw and interactive).talk()
    return 0


class Terminal:
    """Reads lines, shows answers as they come, and obeys commands."""

    def __init__(
        self, session: Session, *, read: Callable[[], str], interactive: bool, empty_lines: bool = False
    ) -> None:
        """Begin.

        Args:
            session: the talk.
            read: gives the next line without its end, and raises EOFError after the last.
            interactive: someone is there: Ctrl-C and mistakes end an answer, not the talk, and notes go where answers
                go; else they go to stderr.
            empty_lines: they are messages too.
        """
        self.session, self.read, self.interactive, self.empty_lines = session, read, interactive, empty_lines
        self.book, self.told = Book(), False  # told: that the talk has outgrown the context

    def talk(self) -> None:
        """Go on until the lines end, or one says so."""
        if self.interactive:
            self.note(WELCOME)
        while True:
            try:
                line = self.read()
                if line.strip() == "/exit":
                    return
                if line.strip() or self.empty_lines:
                    self.obey(line)
            except EOFError:
                if self.interactive:
                    self.note("")  # the shell's prompt gets a line of its own
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.note("\n(/exit or Ctrl-D leaves)")
            except (ValueError, OSError) as error:
                if not self.interactive:
                    raise
                self.note(f"error: {error}")

    def obey(self, line: str) -> None:
        """Do what a line asks: a command, or an answer to it."""
        if not line.startswith("/"):
            self.show_answer(line)
            return
        if line.startswith("//"):
            self.show_answer(line[1:])
            return
        command, _, rest = line.strip().partition(" ")
        if command == "/help":
            self.note(HELP)
        elif command == "/reset":
            self.session.reset()
            self.book.turn_page()
            self.told = False
            self.note("(begun anew)")
        elif command == "/save":
            self.save(rest.strip())
        else:
            raise ValueError(f"unknown command {command}; /help lists them, //text says something with a slash")

    def show_answer(self, message: str) -> None:
        """Write an answer piece by piece; Ctrl-C ends it, and what was said of it stays said."""
        said, stopped = False, False
        with closing(self.session.answer(message)) as pieces:
            try:
                for piece in pieces:
                    self.write(printable(piece))
                    said = True
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                stopped = True
        self.write("\n" if said else "")
        if not said:
            self.note("(stopped before a word)" if stopped else "(the model said nothing)")
        elif stopped:
            self.note("(stopped)")
        if self.session.forgotten and not self.told:
            self.told = True
            self.note("(the talk is longer than the context: from now on the model does not see its beginning)")

    def save(self, name: str) -> None:
        """Write the talk to a file."""
        if not name:
            raise ValueError("/save FILE: name the file, such as talk.jsonl")
        record = self.session.record()
        if record is None:
            raise ValueError("nothing was said yet, so there is nothing to save")
        path = Path(name).expanduser()
        self.book.save(record, path)
        self.note(f"(saved in {path})")

    def write(self, text: str) -> None:
        """Show part of an answer at once."""
        sys.stdout.write(encodable(text, sys.stdout))
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Tell something that is no answer."""
        out = sys.stdout if self.interactive else sys.stderr
        print(encodable(text, out), file=out, flush=True)


def _ask() -> str:
    """A line from someone at a terminal, who can go back to earlier ones where Python has readline."""
    with suppress(ImportError):  # there is none on Windows
        import_module("readline")  # input() uses it once it is there; it speaks to the terminal, so not before
    return input(PROMPT)


def _next_line() -> str:
    """A line of a pipe or file."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")
