"""Search for launched runs, which `status`, `logs` and `stop` look up by name or by run directory,
and the files that a launch writes to the run directory.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tunesmith.checkpoint.claim import check_run_dir, is_run
from tunesmith.config.dump import dump
from tunesmith.config.paths import inputs_of
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.files import find_similar_path, write_atomically
from tunesmith.launch.docker_job import DockerJob
from tunesmith.launch.job import FOLDER, LAUNCHED_RECIPE, Job, holds_run, is_locked, saved_jobs
from tunesmith.launch.local_job import LocalJob
from tunesmith.launch.slurm_job import SlurmJob
from tunesmith.launch.swarm_job import SwarmJob
from tunesmith.run_dir import SWEEP

# Class of each kind of launch. The kind is the first word of a job's name: `swarm-my-run-1f3a5c`.
JOB_CLASSES: dict[str, type[Job]] = {
    "local": LocalJob,
    "docker": DockerJob,
    "slurm": SlurmJob,
    "swarm": SwarmJob,
}


def with_runs_of_folders(words: Sequence[str]) -> list[str]:
    """Replace each folder that contains runs by its run directories.

    Other words are kept. The order is kept, and duplicates are removed.
    """
    named = []
    for word in words:
        folder = Path(word)
        # The folder of a sweep contains runs but is not a run itself, although a running sweep
        # locks it.
        runs = []
        if not holds_run(folder) or (folder / SWEEP).is_file():
            # Search the subfolders that are not runs too.
            for path in sorted([*folder.glob("*/"), *folder.glob("*/*/")]):
                if holds_run(path) and (path.parent == folder or not holds_run(path.parent)):
                    runs.append(str(path))
        named += runs or [word]
    return list(dict.fromkeys(named))


def is_at_work(run_dir: Path) -> bool:
    """Return whether a process of this machine trains in the run directory.

    Also return True if a process was launched but has not locked the directory yet.
    """
    if is_locked(run_dir):
        return True
    # Without this folder, nothing was launched here.
    was_launched = (run_dir / FOLDER).is_dir()
    return was_launched and any(job.is_alive() for job in jobs_of(str(run_dir)))


def safe_value(value: str, where: str) -> str:
    """Return the value if it can be written to a shell script or a Docker stack file.

    Raise UsageError if the value has a control character. A newline would end the line of the
    script, and other control characters would change how a terminal shows the script.
    """
    if not value.isprintable():
        raise UsageError(
            f"{value!r} contains a line break or another control character",
            where=where,
            fix="remove the character from the value",
        )
    return value


def name_of_run(kind: str, run_dir: str) -> str:
    """Return a job name that is unique for a run directory, such as `swarm-my-run-1f3a5c`."""
    # Use only lowercase letters, digits and "-", which are allowed in all Docker names.
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(run_dir).lower())[:30].strip("-")
    digest = hashlib.sha256(os.fsencode(run_dir)).hexdigest()
    return "-".join(filter(None, (kind, slug, digest[:6])))


def agent_words(recipe: Path, *, debug: bool = False, **flags: object) -> list[str]:
    """Return the arguments of `python` that start the node agent with a recipe.

    Args:
        flags: flags of the node agent with their values.
    """
    words = ["-m", "tunesmith.launch.node"]
    for flag, value in flags.items():
        words += [f"--{flag}", str(value)]
    if debug:
        words.append("--debug")
    return [*words, "--", "train", str(recipe)]


def recipe_file(run_dir: str) -> Path:
    """Return the path to which `write_recipe` writes the recipe of a run directory."""
    return Path(run_dir, FOLDER, LAUNCHED_RECIPE)


def write_recipe(run: Run) -> Path:
    """Write the resolved recipe to the run directory, where all nodes read it.

    Raise UsageError if a run is active in the directory, because a rank of this run may still read
    the file.
    """
    file = recipe_file(safe_value(run.output_dir, "output_dir"))
    check_free(run.output_dir)
    check_run_dir(Path(run.output_dir), inputs_of(run).values())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, dump(run))
    return file


def check_free(run_dir: str) -> None:
    """Raise UsageError if a job is queued or running in the run directory, or if it is locked."""
    for job in (*jobs_of(run_dir), Job("", run_dir)):
        # If the job queue or daemon does not answer, `check_ended` raises MachineError, because the
        # state of the job is unknown. Ignore this error. The last `Job` of the loop still checks
        # whether a process has locked the run directory.
        with suppress(MachineError):
            job.check_ended()


def all_jobs() -> list[Job]:
    """Return all saved jobs, the newest last. Files that cannot be read are skipped."""
    jobs = []
    for job in saved_jobs():
        kind = job.name.partition("-")[0]
        if kind in JOB_CLASSES:
            jobs.append(JOB_CLASSES[kind](**vars(job)))
    return jobs


def jobs_of(run_dir: str) -> list[Job]:
    """Return the saved jobs of a run directory, the newest last."""
    return [job for job in all_jobs() if job.is_in(run_dir)]


def find_job(word: str) -> Job:
    """Return the job whose name is `word`, or the newest job of the run directory `word`.

    If the run was started without `launch`, return a job without a name.

    Raise UsageError if there is no such job and no such run.
    """
    jobs = all_jobs()
    named = [job for job in jobs if job.name == word] or jobs_of(word)
    if named:
        return named[-1]
    if is_run(Path(word)) or is_locked(Path(word)):
        return Job("", os.path.realpath(word))
    fix = "list all jobs with `tunesmith status`"
    near = find_similar_path(Path(word))
    if near and holds_run(near):
        fix = f"did you mean {near}?"
    raise UsageError(
        f"{word} is neither one of your jobs nor a run directory",
        where="command line",
        why=f"known jobs: {', '.join(job.name for job in jobs[-5:]) or 'none'}",
        fix=fix,
    )
