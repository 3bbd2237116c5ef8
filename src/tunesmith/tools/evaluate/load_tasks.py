"""Find and load tasks of lm-evaluation-harness, with their rows, before any model is loaded."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from tunesmith.distributed.ranks import started_as
from tunesmith.errors import DataError, MachineError, UsageError, first_line
from tunesmith.host.packages import pip_install, require

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    class LoadedNames(TypedDict):
        """The tasks and groups of some names; `group_map`: the children of each group."""

        tasks: dict[str, Task]
        groups: dict[str, Group]
        group_map: dict[str, list[str]]


TASKS_OPTION = "--tasks"
_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their rows.

    Attributes:
        items: what lm-eval's `simple_evaluate` takes: its tasks, and its groups of tasks.
        names: of these.
        tasks: each task by its name, those of groups among them.
    """

    manager: "TaskManager"
    items: "list[Task | Group]"
    names: list[str]
    tasks: "dict[str, Task]"

    def prompts(self, limit: int | None) -> dict[str, list[str]]:
        """The text of each row that is scored, by task; a row without one has an empty text.

        Args:
            limit: the first rows of each task.
        """
        prompts: dict[str, list[str]] = {}
        for name, task in self.tasks.items():
            prompts[name] = []
            for row in islice(task.eval_docs, limit):
                text = task.doc_to_text(row)
                # Some tasks have their text in the choices, of which this is the number.
                prompts[name].append(text if isinstance(text, str) else "")
        return prompts


def load_tasks(specs: Sequence[str]) -> LoadedTasks:
    """The tasks that `specs` name, with their rows; lm-eval reads and downloads these itself.

    Raises: as `evaluate_tasks`.
    """
    if started_as() is not None:
        what = "eval --tasks runs in one process"
        raise UsageError(what, where=TASKS_OPTION, fix="run it without torchrun")
    require("lm-eval", module="lm_eval", where=TASKS_OPTION, fix="use --data for your own rows")
    folders = []
    for spec in specs:
        if _is_path(spec):
            if not Path(spec).exists():
                fix = "use the path of a task's YAML file, or of a folder of them"
                raise UsageError(f"there is no {spec}", where=f"{TASKS_OPTION} {spec}", fix=fix)
            if Path(spec).is_dir():
                folders.append(spec)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise _missing_package("lm-eval", error) from error
    # To look through lm-eval's own 14,000 takes seconds.
    manager = TaskManager(include_path=folders, include_defaults=_needs_default_tasks(specs))
    names: list[str] = []
    for spec in specs:
        names += _names_of(spec, manager)
    items: dict[str, Task | Group] = {}
    tasks: dict[str, Task] = {}
    children: set[str] = set()
    for name in dict.fromkeys(names):
        loaded = _load_task(name, manager)
        for task_name, task in loaded["tasks"].items():
            _check_task(task_name, task)
        items |= loaded["groups"] | loaded["tasks"]
        tasks |= loaded["tasks"]
        for group_children in loaded["group_map"].values():
            children.update(group_children)
    # A task that stands in a group too is scored once, with its group.
    items = {name: item for name, item in items.items() if name not in children}
    try:
        manager.load(list(items.values()))
    except ValueError as error:
        fix = "name groups that have no task in common"
        raise UsageError(
            "two groups contain the same task", where=TASKS_OPTION, why=first_line(error), fix=fix
        ) from error
    return LoadedTasks(manager, list(items.values()), list(items), tasks)


def _is_path(spec: str) -> bool:
    """Tell whether it is a file or a folder, there or not: a plain word is a task's name."""
    return "/" in spec or spec.endswith(_YAML)


def _needs_default_tasks(specs: Sequence[str]) -> bool:
    """Tell if tasks that come with lm-eval may be meant: by name, or by a group in a folder."""
    for spec in specs:
        if not _is_path(spec):
            return True
        path = Path(spec)
        if path.is_dir() and any(map(_holds_group, path.glob("**/*.yaml"))):
            return True
    return False


def _holds_group(file: Path) -> bool:
    """Tell whether a YAML file is of a group of tasks, which may name tasks of other files."""
    text = file.read_text(errors="replace")
    return re.search(r"^group:", text, re.MULTILINE) is not None


def _names_of(spec: str, manager: "TaskManager") -> list[str]:
    """List the names that lm-eval's `load` takes for one of the words of --tasks."""
    if not _is_path(spec):
        names = manager.match_tasks([spec])
        if not names:
            raise _unknown_task(spec, manager)
        return list(names)
    path = Path(spec)
    if not path.is_dir():
        if _holds_group(path):
            what = f"{spec} is a group, not a task"
            why = "lm-eval finds a group by its name, or with the files of its folder"
            fix = f"use the folder: {path.parent}/"
            raise UsageError(what, where=f"{TASKS_OPTION} {spec}", why=why, fix=fix)
        return [str(path)]
    names = []
    for name in (*manager.all_groups, *manager.all_subtasks):
        file = manager.task_index[name].yaml_path
        # The manager lists tasks of all folders: only those below this one are meant.
        if file is not None and file.is_relative_to(path):
            names.append(name)
    if not names:
        what = f"{spec} has no task"
        why = "no .yaml file in it has `task: NAME`"
        fix = "give a folder of task files, or a name that `lm-eval ls tasks` prints"
        raise UsageError(what, where=f"{TASKS_OPTION} {spec}", why=why, fix=fix)
    return names


def _unknown_task(name: str, manager: "TaskManager") -> UsageError:
    nearest = difflib.get_close_matches(name, manager.all_tasks, n=3)
    fix = "`lm-eval ls tasks` prints all names"
    if Path(name).is_dir():
        fix = f"for the folder write {name}/"
    elif nearest:
        fix = f"did you mean {', '.join(nearest)}? {fix}"
    return UsageError(f"there is no task {name}", where=f"{TASKS_OPTION} {name}", fix=fix)


def _load_task(name: str, manager: "TaskManager") -> "LoadedNames":
    """Load a name with lm-eval: `tasks` and `groups` by name, and `group_map`, the children of
    each group."""
    where = f"{TASKS_OPTION} {name}"
    try:
        loaded: LoadedNames = manager.load([name])
    except ImportError as error:
        raise _missing_package(name, error) from error
    except (ConnectionError, FileNotFoundError) as error:
        # A file that is not there, the Hub out of reach, a data set that it does not have.
        fix = "with a network the rows are downloaded once; a YAML's own data_files are looked for "
        fix += "from this folder"
        what = f"the rows of the task {name} are not available"
        raise DataError(what, where=where, why=first_line(error), fix=fix) from error
    except Exception as error:
        # A task may hold code of its own, which may raise anything.
        what = f"the task {name} cannot be loaded"
        why = f"{type(error).__name__}: {first_line(error)}"
        fix = "fix its file, or remove it"
        raise UsageError(what, where=where, why=why, fix=fix) from error
    return loaded


def _check_task(name: str, task: "Task") -> None:
    """UsageError for a task that runs a model's code, or is not of text alone."""
    why = ""
    fix = "remove it"
    if getattr(task, "UNSAFE_CODE", False):
        why = "it executes code written by the model on this machine"
        fix = "remove it, or run it with lm_eval in a container"
    elif getattr(task, "MULTIMODAL", False):
        why = "its rows contain images or audio"
    if why:
        raise UsageError(
            f"the task {name} is not supported", where=f"{TASKS_OPTION} {name}", why=why, fix=fix
        )


def _missing_package(name: str, error: ImportError) -> MachineError:
    package = error.name or "the package"
    return MachineError(
        f"{name} needs a package that is not installed",
        where=f"{TASKS_OPTION} {name}",
        why=first_line(error),
        fix=f"{pip_install(package)}; for a task of lm-eval's own its extras too, such as "
        "pip install 'lm-eval[ifeval]'",
    )
