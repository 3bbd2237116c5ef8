"""Talk to what was trained, to its base, or to both.

commands in the chat:
  /base  /adapter  /both   who answers from here on
  /reset                   forget what was said
  /system [TEXT]           show the system message, or set it (/system - for none)
  /save FILE               append the conversation to FILE as training rows
  /quit                    leave (so does ctrl-D, or ctrl-C twice)

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

from tunesmith.cli.generate import add_decoding
from tunesmith.cli.lines import stdin_lines
from tunesmith.cli.signals import stop_on_interrupt
from tunesmith.errors import EXIT_OK, TunesmithError, UsageError

if TYPE_CHECKING:
    from tunesmith.cli.dialogue import Dialogue, Who

COMMANDS = """/base  /adapter  /both   who answers from here on
/reset                   forget what was said
/system [TEXT]           show the system message, or set it (/system - for none)
/save FILE               append the conversation to FILE as training rows
/quit                    leave (so does ctrl-D, or ctrl-C twice)"""
COLUMNS = 80  # a terminal this wide shows two answers beside each other
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x9b]")  # a model's escape sequences must not drive the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, checkpoint, final/, adapter or model folder")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--base", action="store_true", help="begin with the base model; /adapter switches")
    who.add_argument("--side-by-side", action="store_true", help="begin with both, each question to base and tuned")
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the one of the recipe)")
    add_decoding(parser, max_new_tokens=512)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    from tunesmith.inference.load_run import locate_run

    place = locate_run(args.run)
    if place.kind == "base" and args.side_by_side:
        raise UsageError(
            f"{args.run} is a plain model, with nothing to set beside it",
            where="--side-by-side",
            fix="give a run, a checkpoint or an adapter, or leave --side-by-side out",
        )
    from tunesmith.cli.dialogue import Dialogue
    from tunesmith.inference.generate import Decoding
    from tunesmith.inference.load_run import load_run, system_of

    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)
    opened = load_run(args.run, device=args.device, place=place)
    dialogue = Dialogue(
        opened,
        lambda: load_run(args.run, device=args.device, base_only=True),
        decoding,
        args.system if args.system is not None else system_of(opened.run),
    )
    plain = place.kind == "base" or args.base
    both: list[Who] = ["base", "tuned"]
    chat = Chat(dialogue, both if args.side_by_side else ["base"] if plain else ["tuned"])
    if chat.on_terminal:
        tell(f"{place.note or args.run}: {decoding.describe()}; {opened.template.describe()}\n/help shows the commands")
    chat.talk()
    return EXIT_OK


def tell(text: str) -> None:
    """A word to the user, beside the answers: on stderr."""
    print(text, file=sys.stderr, flush=True)


class Chat:
    """Reads lines, obeys the commands, shows the answers."""

    def __init__(self, dialogue: Dialogue, who: list[Who]) -> None:
        self.dialogue, self.who = dialogue, who
        self.on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.commands: dict[str, Callable[[str], None]] = {
            "/base": lambda _: self._turn_to(["base"]),
            "/adapter": lambda _: self._turn_to(["tuned"]),
            "/both": lambda _: self._turn_to(["base", "tuned"]),
            "/reset": self._reset,
            "/system": self._system,
            "/save": self._save,
            "/help": lambda _: tell(COMMANDS),
        }

    def talk(self) -> None:
        """Until /quit, the end of the input, or ctrl-C twice."""
        for line in self._lines():
            word, _, rest = line.partition(" ")
            if word in ("/quit", "/exit"):
                return
            try:
                if word in self.commands:
                    self.commands[word](rest.strip())
                elif line.startswith("/"):
                    tell(f"there is no command {word}\n{COMMANDS}")
                elif not self._answer(line):
                    return
            except TunesmithError as error:
                if not self.on_terminal:
                    raise
                tell(error.text())

    def _lines(self) -> Iterator[str]:
        if not self.on_terminal:
            yield from (line.strip() for _, line in stdin_lines())
            return
        import readline  # noqa: F401  line editing and history for input()

        asked_to_leave = False
        while True:
            try:
                line = input("you> ").strip()
            except EOFError:
                tell("")
                return
            except KeyboardInterrupt:
                if asked_to_leave:
                    tell("")
                    return
                asked_to_leave = True
                tell("\nctrl-C again leaves")
                continue
            asked_to_leave = False
            if line:
                yield line

    def _answer(self, question: str) -> bool:
        """Answer by all who are asked; False when ctrl-C came twice, or once where no one could ask again."""
        if self.on_terminal and len(self.who) > 1 and shutil.get_terminal_size().columns >= COLUMNS:
            return self._beside(question)
        for who in self.who:
            if self.on_terminal or len(self.who) > 1:
                sys.stdout.write(f"{who}> " if self.on_terminal else f"{who}: ")
            ended = self._ask(question, who, self._write)
            sys.stdout.write("\n")
            sys.stdout.flush()
            if ended is not None:
                return ended
        return True

    def _ask(self, question: str, who: Who, write: Callable[[str], None]) -> bool | None:
        """One answer; None when the next may follow, else what `_answer` is to return."""
        try:
            with stop_on_interrupt() as stop:
                answer = self.dialogue.ask(question, who, write, tell, stop)
        except KeyboardInterrupt:
            return False
        if stop.is_set():
            tell("\n(stopped)")
            return self.on_terminal
        if not answer.finished:
            tell(f"\n(cut at {self.dialogue.decoding.max_new_tokens} tokens; --max-new-tokens gives more)")
        return None

    def _beside(self, question: str) -> bool:
        """The answers in columns that fill as they come."""
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        said = dict.fromkeys(self.who, "")

        def columns() -> Table:
            table = Table(*said, expand=True)
            table.add_row(*(Text(text) for text in said.values()))
            return table

        with Live(columns(), refresh_per_second=12) as live:
            for who in self.who:

                def write(text: str, who: Who = who) -> None:
                    said[who] += _CONTROL.sub("", text)
                    live.update(columns())

                ended = self._ask(question, who, write)
                if ended is not None:
                    return ended
        return True

    def _write(self, text: str) -> None:
        sys.stdout.write(_CONTROL.sub("", text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def _turn_to(self, who: list[Who]) -> None:
        if self.dialogue.opened.kind == "base" and "tuned" in who:
            tell("this is a plain model; nothing was trained onto it")
            return
        self.who = who
        tell(f"from here on: {' and '.join(who)}")

    def _reset(self, _: str) -> None:
        self.dialogue.reset()
        tell("all forgotten")

    def _system(self, text: str) -> None:
        if text:
            self.dialogue.system = None if text == "-" else text
        tell(f"system: {self.dialogue.system or '(none)'}")

    def _save(self, name: str) -> None:
        if not name:
            tell("name a file: /save FILE")
            return
        try:
            rows = self.dialogue.save(Path(name).expanduser())
        except OSError as error:
            tell(f"error: {name} cannot be written: {error.strerror}")
            return
        tell(f"{rows} row{'s' if rows != 1 else ''} added to {name}" if rows else "nothing was said yet")
