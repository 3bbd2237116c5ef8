"""The command line of tunesmith.

It imports only the module of the given command, and converts errors to messages and exit codes.

Each command is a module of this package or of a folder in tools/. It has the functions
`add_arguments(parser)` and `run(args)`. `run` returns an exit code, or None for the exit code 0.
The module's docstring is the start of the help page: one sentence, tested examples, further
information. The optional `EPILOG` is the end of the page. Code with slow imports is in a separate
module. `run` imports this module after it has checked the arguments and files. `LOADS_TORCH` is
"here" if the command imports torch or Transformers, and "in ranks" if it starts processes that do.

Exit codes: 0 success, 1 failed, 2 the command or recipe is wrong, 75 stopped and saved, 130
interrupted before there was anything to save, 141 the reader of the output has closed the pipe.
"""

import argparse
import difflib
import errno
import faulthandler
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import NoReturn

from tunesmith._version import __version__
from tunesmith.config.row_settings import rows_set_by
from tunesmith.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    MachineError,
    OtherRankError,
    TunesmithError,
    UsageError,
    disk_fault,
    first_line,
    is_fault,
    is_out_of_memory,
)
from tunesmith.host.ending import run_and_exit
from tunesmith.host.logger import lines_on_stderr
from tunesmith.host.packages import pip_install
from tunesmith.host.shell import shell_path
from tunesmith.host.signals import StopRequest, ignore_stop_signals
from tunesmith.host.streams import fault_of, folded, survive_write_errors, visible, width_of
from tunesmith.runtime.host import bound_shape_caches, prepare_threads

# Exit code of shells for a process that was ended by a signal: 128 + SIGPIPE.
EXIT_BROKEN_PIPE = 141

# Type of a table of commands. It maps the name of a group to the commands of the group, and the
# name of a command to its module and its purpose.
Verbs = dict[str, dict[str, tuple[str, str]]]
ENGINE_VERBS: Verbs = {
    "start here": {
        "train": ("tunesmith.cli.train", "fine-tune a model on your rows or from a recipe"),
        "recipes": ("tunesmith.cli.recipes", "list, show and copy shipped recipes"),
        "models": ("tunesmith.cli.models", "list model types and what each of them supports"),
    },
    "look at the data": {
        "data": ("tunesmith.cli.data", "show which tokens a recipe trains on"),
        "fetch": ("tunesmith.cli.fetch", "check license and disk, then download model and data"),
    },
    "train": {},
    "use the result": {},
    "machines": {
        "completion": ("tunesmith.cli.completion", "print a shell completion script"),
    },
}


def find_verbs() -> Verbs:
    """Return all commands by group: the commands in ENGINE_VERBS, and the commands of each folder
    in tools/.

    The `__init__.py` of a folder in tools/ defines `COMMANDS` in the format of ENGINE_VERBS. It
    must not import anything, so that `tunesmith --help` is fast.
    """
    groups = {group: dict(verbs) for group, verbs in ENGINE_VERBS.items()}
    for tool in iter_modules([str(Path(__file__).parents[1] / "tools")], "tunesmith.tools."):
        for group, verbs in import_module(tool.name).COMMANDS.items():
            groups[group].update(verbs)
    return groups


VERB_GROUPS = find_verbs()
# Names that users may try although no such command exists, with the fix that the error shows.
OTHER_NAMES = {
    "serve": "run `tunesmith chat RUN` in a terminal, or, for a server, "
    "`tunesmith export RUN --to vllm --output FOLDER`",
    "compare": "run `tunesmith report A B` for curves and losses, or `tunesmith eval A B` to "
    "compare row by row",
    "push": "run `hf upload OWNER/NAME RUN/final`: the model card is in final/",
    "selfcheck": "run `tunesmith doctor --ranks N`, or, across machines, start "
    "benchmarks/parity/selfcheck.py with torchrun",
}
VERBS = {name: verb for group in VERB_GROUPS.values() for name, verb in group.items()}
LAUNCHES = [name for name in VERBS if name.startswith("launch ")]

_PATH_FAULTS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
)


# Format of a positional argument in a usage line, by the argument's `nargs`.
_USAGE: dict[int | str | None, str] = {
    None: "{}",
    "?": "[{}]",
    "*": "[{} ...]",
    "+": "{0} [{0} ...]",
}


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UsageError and does not print the usage.

    The error suggests a similar option or recipe key.

    Attributes:
        words: the words of the command line, for errors.
    """

    words: Sequence[str] = ()

    def short_usage(self) -> str:
        """Return the usage line, such as `tunesmith train [RECIPE] [key=value ...] [options]`.

        The word `[options]` represents all options, because the help page lists them.
        """
        words = [self.prog]
        for action in self._actions:
            if action.option_strings:
                if action.required:
                    words.append(f"{action.option_strings[-1]} {action.metavar}")
            else:
                words.append(_USAGE[action.nargs].format(action.metavar or action.dest))
        return " ".join([*words, "[options]"])

    def typed_options(self, args: argparse.Namespace) -> dict[str, str]:
        """Return the options that the user has set to a value other than the default.

        The keys are attributes of `args`, and the values are the options, such as `--batch-size`.
        """
        return {
            action.dest: action.option_strings[0]
            for action in self._actions
            if action.option_strings and vars(args).get(action.dest) != action.default
        }

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            # A required option may be missing because it is misspelled.
            known = {option for action in self._actions for option in action.option_strings}
            named = [word.partition("=")[0] for word in self.words if word.startswith("--")]
            unknown = next((word for word in named if word not in known), None)
            message = f"unrecognized arguments: {unknown}" if unknown else message
        fix = self._fix_of(message) or f"run `{self.prog} --help`, which lists the options"
        raise UsageError(message, where=f"command line: {self.prog}", fix=fix)

    def _fix_of(self, message: str) -> str | None:
        """Return a text that says how to fix an argparse error, or None if no fix is known.

        The fix names a similar option or choice, or a recipe key.
        """
        choice = re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            option, word, listed = choice.groups()
            from tunesmith.config.names import nearest

            meant = nearest(word, re.split(r"[', ]+", listed))
            return f"did you mean {option} {meant}?" if meant else None
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if not unknown:
            return None
        word = unknown[1]
        # Do not suggest hidden options to users. They are for the processes that a command starts.
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        options = [option for action in shown for option in action.option_strings]
        near = difflib.get_close_matches(word, options, n=1, cutoff=0.75)
        if near:
            return f"did you mean {near[0]}? `{self.prog} --help` lists all options"
        takes_keys = any("key=value" in str(action.metavar) for action in shown)
        if not word.startswith("--") or not takes_keys:
            return None
        from tunesmith.config.names import keys, suggest_key

        name = word.lstrip("-").partition("=")[0].replace("-", "_").lower()
        hint = suggest_key(name, on_command_line=True)
        if name in keys():
            hint = f"write {name}=VALUE"
        return f"write a key of the recipe as key=value, without dashes; {hint}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the words after `tunesmith`. None means the arguments of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: dispatch(words), process=argv is None)


def run_process() -> NoReturn:
    """Run the command in the arguments of this process, and end the process with its exit code."""
    StopRequest.is_of_command = True
    run_and_exit(main)


@lines_on_stderr()
def run_command(command: Callable[[], int], *, process: bool) -> int:
    """Run a command and return its exit code. Errors are printed as messages.

    Args:
        process: whether this process ends after the command.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  stays open until the process ends
    sys.stdout = survive_write_errors(sys.stdout, raises=True)
    sys.stderr = survive_write_errors(sys.stderr)
    if process:
        # If a library crashes, such as by a segmentation fault, print the stack of each thread. By
        # default, Python prints nothing.
        faulthandler.enable()
    # Hide bitsandbytes' warning about a CPU kernel that it would download from the Hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Hide Transformers' warning that the RoPE factors of low and high frequencies are equal,
    # because Llama 4 was released with equal factors.
    rope = logging.getLogger("transformers.modeling_rope_utils")
    rope.addFilter(lambda record: "high_freq_factor" not in record.getMessage())
    # `bound_shape_caches` sets environment variables. Call it before torch is imported, because
    # torch reads one of these variables during the import.
    bound_shape_caches()
    failure: BaseException | None = None
    try:
        code = command()
        sys.stdout.flush()
    except SystemExit as stop:
        # argparse raises SystemExit after --help, and rich raises it if the output pipe is closed.
        code = EXIT_FAILED if stop.code else EXIT_OK
        if isinstance(stop.code, int):
            code = stop.code
    except KeyboardInterrupt as error:
        code = EXIT_INTERRUPTED
        failure = error
    except BaseException as error:
        if not is_fault(error):
            raise
        failure = error
        reported = error if isinstance(error, TunesmithError) else _machine_error(error)
        code = reported.exit_code if reported else EXIT_FAILED
    # The reader has closed the pipe, as in `tunesmith recipes | head -1`. This is not a failure.
    if isinstance(fault_of(sys.stdout), BrokenPipeError):
        code = EXIT_BROKEN_PIPE
        failure = None
    if process:
        ignore_stop_signals()
    if failure is not None:
        _report(failure)
    return code


def dispatch(words: list[str]) -> int:
    """Run the command that `words` name, and return its exit code. Errors are raised."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return EXIT_OK
    if words[0] in ("-V", "--version"):
        print(f"tunesmith {__version__}")
        return EXIT_OK
    try:
        os.getcwd()
    except FileNotFoundError:
        fix = "change to an existing folder, for example with `cd ~`"
        raise UsageError(
            "the working directory was deleted", where="command line", fix=fix
        ) from None
    verb, *rest = words
    # `launch` has subcommands, such as `launch local`.
    if verb == "launch":
        if rest[:1] in ([], ["-h"], ["--help"]):
            print(_launch_help())
            return EXIT_OK
        verb = " ".join(words[:2])
        rest = rest[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        fix = "run `tunesmith --help`, which lists the commands"
        if near:
            fix = f"did you mean tunesmith {near[0]}?"
        fix = OTHER_NAMES.get(verb, fix)
        raise UsageError(f"there is no command {verb!r}", where="command line", fix=fix)
    name, purpose = VERBS[verb]
    module = import_module(name)
    parser = Parser(
        prog=f"tunesmith {verb}",
        description=(module.__doc__ or purpose).strip(),
        epilog=vars(module).get("EPILOG"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.usage = parser.usage or parser.short_usage()
    parser.words = rest
    args = parser.parse_intermixed_args(rest)
    args.typed = parser.typed_options(args)
    # Set the environment variables for threads before torch is imported, because libgomp reads them
    # only once.
    if vars(module).get("LOADS_TORCH") == "here":
        prepare_threads()
    # A command without a recipe, such as `generate`, takes its rows from options.
    names_recipe = not vars(args).keys().isdisjoint(("recipe", "overrides"))
    # Not at the top, because it imports the YAML parser, which `--help` does not need.
    from tunesmith.config.trust import TRUSTS_CODE

    trust = TRUSTS_CODE.set(bool(vars(args).get("trust_remote_code")))
    try:
        with rows_set_by(option=not names_recipe or bool(vars(args).get("data"))):
            return module.run(args) or EXIT_OK
    finally:
        TRUSTS_CODE.reset(trust)


def _overview() -> str:
    """Return the page of `tunesmith --help`."""
    groups = "\n\n".join(f"{group}:\n{_listed(verbs)}" for group, verbs in VERB_GROUPS.items())
    return f"""\
usage: tunesmith COMMAND [...]

Fine-tune open-weight language models from one recipe file.

example:
  tunesmith train --model HuggingFaceTB/SmolLM2-135M-Instruct --data faq.csv
  tunesmith chat runs/faq-smollm2-135m-instruct

{groups}

  tunesmith COMMAND --help    options of a command, with examples
  tunesmith --version"""


def _launch_help() -> str:
    """Return the page of `tunesmith launch --help`."""
    return f"""\
usage: tunesmith launch KIND RECIPE [key=value ...] [options]

Train a recipe on one or more machines; results are the same as with `train`.

example:
  tunesmith launch local my-recipe.yaml --detach
  tunesmith status

kinds:
{_listed(LAUNCHES)}

  tunesmith launch KIND --help    options of a kind, with examples"""


def _listed(verbs: Iterable[str]) -> str:
    """Return one line for each command, with its purpose."""
    width = max(map(len, VERBS)) + 2
    return "\n".join(f"  {verb:<{width}}{VERBS[verb][1]}" for verb in verbs)


def _report(error: BaseException) -> None:
    """Print the message for an error."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return
    trace = "".join(traceback.format_exception(error))
    if os.environ.get("TUNESMITH_DEBUG") == "1":
        print(trace, file=sys.stderr)
    # Print nothing here, because the rank that failed prints the error.
    if isinstance(error, OtherRankError):
        return
    if not isinstance(error, TunesmithError):
        error = _machine_error(error) or _internal_error(error, trace)
    width = width_of(sys.stderr)
    for line in visible(error.text()).splitlines():
        # Paths are not broken, because users copy them.
        if line.startswith("  where: "):
            print(line, file=sys.stderr)
            continue
        # If the line of the fix is too long, write each alternative on a separate line.
        is_fix = line.startswith("  fix: ")
        is_long_fix = is_fix and len(line) > width
        shown = line.replace("; or ", ";\n    or ") if is_long_fix else line
        print(folded(shown, width, indent=4, between_clauses=is_fix), file=sys.stderr)


def _machine_error(error: BaseException) -> MachineError | None:
    """Convert an unexpected error to a MachineError if the machine lacks something.

    The machine may lack a package, memory, disk space or access to a path. Return None for other
    errors.
    """
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        # A missing module of tunesmith is an internal error: pip cannot install it.
        if package and not package.startswith("tunesmith"):
            return MachineError(
                f"the Python package {package} is missing", fix=pip_install(package)
            )
    if is_out_of_memory(error):
        why = first_line(error)[:300]
        fix = "use a smaller batch (--batch-size), a smaller model, or a machine with more memory"
        fix += "; if `ulimit -v` shows a limit, run `ulimit -v unlimited`"
        return MachineError("out of memory", where="this machine", why=why, fix=fix)
    where = str(error.filename or "") if isinstance(error, OSError) else ""
    full_disk = disk_fault(error)
    if full_disk is not None:
        if error is fault_of(sys.stdout):
            where = "standard output"
        fix = "free disk space (df -h), then run the same command again"
        return MachineError(full_disk, where=where, fix=fix, cause="disk")
    # Do not convert an error without a path, because the user would not know what to change.
    if not isinstance(error, OSError) or not where or error.errno not in _PATH_FAULTS:
        return None
    folder = shell_path(Path(where).parent)
    fix = f"check the types and the permissions with `ls -la {folder}`, or use another path"
    return MachineError(f"{where} cannot be used: {error.strerror}", where=where, fix=fix)


def _internal_error(error: BaseException, trace: str) -> TunesmithError:
    """Build the error for a bug in tunesmith, and write the traceback to a file.

    The traceback is not shown, because most users cannot use it.
    """
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="tunesmith-", suffix=".log", delete=False
        ) as file:
            file.write(f"tunesmith {__version__}, python {sys.version}\n{trace}")
        fix = f"report the error with the file {file.name}; TUNESMITH_DEBUG=1 prints the traceback"
    except OSError:
        print(trace, file=sys.stderr)
        fix = "report the error with the traceback above"
    message = (str(error).strip().splitlines() or ["no message"])[0]
    return TunesmithError(f"internal error: {type(error).__name__}: {message}", fix=fix)
