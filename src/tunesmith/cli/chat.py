"""Talk to what was trained, to its base, or to both.

example:
  tunesmith chat runs/my-run
  tunesmith chat runs/my-run --side-by-side
  echo "What do you know?" | tunesmith chat runs/my-run

ctrl-C ends an answer. Without a terminal every line of stdin is a question, and only answers go to stdout.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.options import add_decoding, add_run, decoding_of
from tunesmith.cli.stdin import stdin_lines
from tunesmith.errors import EXIT_OK, TunesmithError, UsageError
from tunesmith.signals import StopRequest

if TYPE_CHECKING:
    from tunesmith.cli.dialogue import Dialogue, Side

COMMANDS = """/base  /adapter  /both   who answers from here on
/reset                   forget what was said
/system [TEXT]           show the system message, or set it (/system - for none)
/save FILE               append the conversation to FILE as training rows
/quit                    leave (so does ctrl-D, or ctrl-C twice)"""
EPILOG = f"commands in the chat:\n{COMMANDS}"
COLUMNS = 80  # a terminal this wide shows two answers beside each other
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x9b]")  # a model's escape sequences must not drive the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    first = parser.add_mutually_exclusive_group()
    first.add_argument("--base", action="store_true", help="begin with the base model; /adapter switches")
    first.add_argument("--side-by-side", action="store_true", help="begin with both, each question to base and tuned")
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the one of the recipe)")
    add_decoding(parser, max_new_tokens=512)


def run(args: argparse.Namespace) -> int:
    from tunesmith.inference.load_run import load_run, locate_run

    location = locate_run(args.run)
    if location.kind == "base" and args.side_by_side:
        raise UsageError(
            f"{args.run} is a plain model, with nothing to compare it with",
            where="--side-by-side",
            fix="give a run, a checkpoint or an adapter, or leave --side-by-side out",
        )
    from tunesmith.cli.dialogue import Dialogue

    decoding = decoding_of(args)
    loaded = load_run(location, device=args.device)
    system = loaded.system if args.system is None else args.system or None
    dialogue = Dialogue(loaded, lambda: load_run(args.run, device=args.device, base_only=True), decoding, system)
    chat = Chat(dialogue)
    if args.side_by_side:
        chat.sides = ["base", "tuned"]
    elif args.base or location.kind == "base":
        chat.sides = ["base"]
    if chat.on_terminal:
        about = f"{location.note or args.run}: {decoding.describe()}; {loaded.template.describe()}"
        notify(f"{about}\n/help shows the commands")
    chat.talk()
    return EXIT_OK


def notify(text: str) -> None:
    """A note to the user beside the answers: on stderr."""
    print(text, file=sys.stderr, flush=True)


class Chat:
    """Reads lines, obeys the commands, shows the answers."""

    def __init__(self, dialogue: Dialogue) -> None:
        self.dialogue = dialogue
        self.sides: list[Side] = ["tuned"]
        self.on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.commands: dict[str, Callable[[str], None]] = {
            "/base": lambda _: self._switch_to(["base"]),
            "/adapter": lambda _: self._switch_to(["tuned"]),
            "/both": lambda _: self._switch_to(["base", "tuned"]),
            "/reset": self._reset,
            "/system": self._system,
            "/save": self._save,
            "/help": lambda _: notify(COMMANDS),
        }

    def talk(self) -> None:
        """Until /quit, the end of the input, or ctrl-C twice."""
        lines = self._typed_lines() if self.on_terminal else (line.strip() for _, line in stdin_lines())
        for line in lines:
            word, _, rest = line.partition(" ")
            try:
                if word in ("/quit", "/exit"):
                    return
                if word in self.commands:
                    self.commands[word](rest.strip())
                elif line.startswith("/"):
                    notify(f"there is no command {word}\n{COMMANDS}")
                else:
                    self._answer(line)
            except KeyboardInterrupt:
                print(flush=True)
                return
            except TunesmithError as error:
                if not self.on_terminal:
                    raise
                notify(error.text())

    def _typed_lines(self) -> Iterator[str]:
        import readline  # noqa: F401  line editing and history for input()

        interrupted = False
        while True:
            try:
                if line := input("you> ").strip():
                    yield line
                interrupted = False
            except EOFError:
                break
            except KeyboardInterrupt:
                if interrupted:
                    break
                notify("\nctrl-C again leaves")
                interrupted = True
        notify("")

    def _answer(self, question: str) -> None:
        """Show the answers of all sides; KeyboardInterrupt ends the chat: ctrl-C twice, or once without a terminal."""
        if self.on_terminal and len(self.sides) > 1 and shutil.get_terminal_size().columns >= COLUMNS:
            self._answer_in_columns(question)
            return
        for side in self.sides:
            if self.on_terminal or len(self.sides) > 1:
                sys.stdout.write(f"{side}> " if self.on_terminal else f"{side}: ")
            go_on = self._ask(question, side, self._write)
            print(flush=True)
            if not go_on:
                return

    def _ask(self, question: str, side: Side, write: Callable[[str], None]) -> bool:
        """One answer; False when ctrl-C ended it, so that the other side is not asked."""
        with StopRequest(interactive=True) as stop:
            answer = self.dialogue.ask(question, side, write, notify, stop.requested)
        if stop.requested():
            notify("\n(stopped)")
            if not self.on_terminal:
                raise KeyboardInterrupt
        elif not answer.finished:
            notify(f"\n(cut at {self.dialogue.decoding.max_new_tokens} tokens; --max-new-tokens gives more)")
        return not stop.requested()

    def _answer_in_columns(self, question: str) -> None:
        """The answers beside each other, in columns that fill as they come."""
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        texts = dict.fromkeys(self.sides, "")

        def columns() -> Table:
            table = Table(*texts, expand=True)
            table.add_row(*(Text(text) for text in texts.values()))
            return table

        with Live(columns(), refresh_per_second=12) as live:
            for side in self.sides:

                def write(text: str, side: Side = side) -> None:
                    texts[side] += _CONTROL.sub("", text)
                    live.update(columns())

                if not self._ask(question, side, write):
                    return

    def _write(self, text: str) -> None:
        sys.stdout.write(_CONTROL.sub("", text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def _switch_to(self, sides: list[Side]) -> None:
        if self.dialogue.loaded.location.kind == "base" and "tuned" in sides:
            notify("this is a plain model; nothing was trained onto it")
            return
        self.sides = sides
        notify(f"from here on: {' and '.join(sides)}")

    def _reset(self, _: str) -> None:
        self.dialogue.turns.clear()
        notify("all forgotten")

    def _system(self, text: str) -> None:
        if text:
            self.dialogue.system = None if text == "-" else text
        notify(f"system: {self.dialogue.system or '(none)'}")

    def _save(self, name: str) -> None:
        if not name:
            notify("name a file: /save FILE")
            return
        try:
            rows = self.dialogue.save(Path(name).expanduser())
        except OSError as error:
            notify(f"error: {name} cannot be written: {error.strerror}")
            return
        notify(f"{rows} row{'s' if rows != 1 else ''} added to {name}" if rows else "nothing was said yet")
