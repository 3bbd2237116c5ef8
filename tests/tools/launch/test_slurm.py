"""The batch script of `launch slurm`: what is in it, and that no value can add to it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import check_shown, lines_with, refuses
from invoke import invoke
from recipes import recipe
from tunesmith.config.load import from_mapping, load_recipe
from tunesmith.config.schema import Run, Source
from tunesmith.errors import UsageError
from tunesmith.launch.slurm_job import run_slurm
from tunesmith.tools.launch import slurm
from tunesmith.tools.launch.inputs import recipe_inputs
from tunesmith.tools.launch.slurm import JobRequest

CANARIES = {"HF_TOKEN": "hf_CANARY0123456789", "WANDB_API_KEY": "canary-of-wandb"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("slurm")
    values = recipe(folder, folder, held=False, output_dir="/shared/runs/my-run")
    return from_mapping(values, where="test", base=folder)


def parts(script: str) -> tuple[list[str], list[str], str]:
    """The directives, the lines of values, and the rest, which is the same for every job."""
    head, body = script.partition(slurm.BODY)[::2]
    assert body == ""
    directives, values = head.split("\n\n")
    shebang, comment, *directives = directives.splitlines()
    assert shebang.startswith("#!/bin/bash")
    assert comment.startswith("# Written by")
    return directives, values.splitlines(), slurm.BODY


@pytest.mark.parametrize(
    "name", ['a" --uid=0 "', "a' b", "$(id)", "`id`", "a;id", "a#b", "%j", "-x"]
)
def test_no_value_adds_a_directive_or_a_command(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_MINE", name)
    request = JobRequest(nodes=2, gpus_per_node="1")
    script = slurm.render_script(replace(run, output_dir=f"/shared/{name}"), request)
    directives, values, _ = parts(script)
    words = [shlex.split(line.removeprefix("#SBATCH ")) for line in directives]
    assert {len(word) for word in words} == {1}
    assert words[0] == [f"--job-name={name}"]
    assert not [word for (word,) in words if word.startswith("--uid")]
    shell = "\n".join([*values, 'printf "%s\\0" "$run" "$NCCL_MINE"'])
    done = subprocess.run(["/bin/bash", "-c", shell], capture_output=True, check=True, env={})
    assert done.stdout.decode().split("\0")[:2] == [f"/shared/{name}", name]
    assert done.stderr == b""


def test_the_script_is_shell_and_asks_for_what_was_given(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = JobRequest(
        nodes=2, partition="gpu", account="me", qos="high", time="12:00:00", constraint="h100", mem="500G", cpus_per_task="16",
        gpus_per_node="h100:8", exclusive=True, setup=("module load cuda",), sbatch=("--reservation=tuesday",), max_requeues=3,
    )  # fmt: skip
    script = slurm.render_script(run, request)
    directives, values, _ = parts(script)
    assert [line.removeprefix("#SBATCH ") for line in directives] == [
        "--job-name=my-run", "--output=/shared/runs/my-run/launch/slurm-%j.log", "--open-mode=append", "--nodes=2",
        "--ntasks-per-node=1", "--export=NONE", "--partition=gpu", "--account=me", "--qos=high", "--time=12:00:00",
        "--constraint=h100", "--mem=500G", "--cpus-per-task=16", "--gpus-per-node=h100:8",
        "--signal=B:USR1@300", "--requeue", "--exclusive", "--reservation=tuesday",
    ]  # fmt: skip
    assert {"module load cuda", "ranks=8"} <= {*values}
    (path,) = [line.split("=")[1].split(":") for line in values if line.startswith("export PATH=")]
    assert path == os.environ["PATH"].split(":")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    once = slurm.render_script(run, JobRequest(gpus_per_node="0", max_requeues=0))
    assert {"#SBATCH --no-requeue", "#SBATCH --signal=B:USR1@300"} <= {*parts(once)[0]}


def test_a_container_gets_what_the_run_reads_and_writes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/only/here")
    image = "registry#org/image:1"
    script = slurm.render_script(run, JobRequest(gpus_per_node="1", container=image))
    values = dict(line.removeprefix("export ").partition("=")[::2] for line in parts(script)[1])
    assert values["python"] == "python3"
    assert "PYTHONPATH" not in values
    mounts = [*map(str, recipe_inputs(run)), "/shared/runs", values["HF_HOME"]]
    flags = shlex.split(values["container"].strip("()"))
    assert flags == [
        f"--container-image={image}", "--container-mounts=" + ",".join(f"{path}:{path}" for path in mounts),
        "--no-container-mount-home",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "output_dir", "where", "name"),
    [
        ({"gpus_per_node": None}, "", "--gpus-per-node", ""), ({"gpus_per_node": "eight"}, "", "--gpus-per-node", "eight"),
        ({"time": "2h"}, "", "--time", "2h"), ({"partition": "a\nb"}, "", "--partition", ""),
        ({"sbatch": ("--x\n#SBATCH --uid=0",)}, "", "--sbatch-arg", ""), ({"setup": ("a\nb",)}, "", "--setup", ""),
        ({"container": "i"}, "/shared/a:/etc,b/run", "--container", "/shared/a:/etc,b"),
        ({}, "/shared/a\\b", "output_dir", ""),  # the log would be lost
    ],
)  # fmt: skip
def test_values_that_no_script_can_hold_are_refused(
    run: Run, changes: dict[str, Any], output_dir: str, where: str, name: str
) -> None:
    with refuses(UsageError, where=where, names=[name] if name else []):
        slurm.render_script(
            replace(run, output_dir=output_dir or run.output_dir),
            JobRequest(**({"gpus_per_node": "1"} | changes)),
        )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("2:30", 150), ("2:30:00", 9000), ("1-12", 129_600), ("1-12:30", 131_400), ("1-12:30:15", 131_415),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    """The six forms of sbatch(1), --time."""
    assert slurm.limit_seconds(text) == seconds


@pytest.mark.parametrize(
    ("recipe", "request_of", "seconds"),
    [
        ("llama3.1-8b-lora", {}, 300), ("llama3.1-8b-lora", {"time": "4"}, 60), ("llama3.1-8b-lora", {"time": "12:00:00", "warning": 900}, 900),
        ("llama3.3-70b-full", {"time": "12:00:00"}, 1800), ("llama3.3-70b-full", {"time": "1:00:00"}, 900),  # a quarter
    ],
)  # fmt: skip
def test_the_warning_comes_early_enough_to_save_and_leaves_time_to_train(
    recipe: str, request_of: dict[str, Any], seconds: int
) -> None:
    run = load_recipe(recipe)
    assert slurm.warning_of(run, JobRequest(**request_of)) == seconds
    with refuses(UsageError, where="--warn-before", names=["600 s", "400 s"]):
        slurm.warning_of(run, JobRequest(time="10", warning=400))


def test_rendered_it_is_a_script_with_its_recipe_and_nothing_is_submitted(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no sbatch
    monkeypatch.chdir(tmp_path)
    out, rows = tmp_path / "run", tmp_path / "elsewhere.jsonl"
    on_cluster = recipe(tiny, tmp_path, held=False)
    on_cluster["data"]["train"]["source"] = str(rows)
    (tmp_path / "recipe.yaml").write_text(json.dumps(on_cluster))
    command = ("launch", "slurm", "recipe.yaml", "--gpus-per-node", "4", "--partition", "other")
    said = invoke(*command, "--render")
    assert said.code == 0
    assert lines_with(said.err, "data.train.source", rows)
    assert "#SBATCH --partition=other\n" in said.out
    assert "#SBATCH --gpus-per-node=4\n" in said.out
    assert f"\nrun={out}\n" in said.out
    assert not out.exists(), "a script that is only printed leaves no run directory"
    head = "run=" + said.out.partition("\nrun=")[2].partition("\nranks=")[0]
    subprocess.run(["/bin/bash", "-c", head], env={"PATH": "/usr/bin:/bin"}, check=True)
    assert load_recipe(out / "launch/recipe.yaml").data.train[0].source == str(rows)
    shutil.rmtree(out)
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    done = invoke(*command)
    assert done.code == 2
    check_shown(done.err, where="PATH", names=["sbatch"])


def test_what_the_nodes_would_miss_is_refused_before_the_queue(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = JobRequest(gpus_per_node="1")
    words = ["my recipe.yaml", "train.duration=2 epochs"]
    fetch = "tunesmith fetch 'my recipe.yaml' 'train.duration=2 epochs'"
    elsewhere = replace(run, model=replace(run.model, name="owner/model"))
    with refuses(UsageError, names=["owner/model"], fix=[fetch]):
        slurm.check_reach(elsewhere, request, words)
    own = replace(request, setup=("export HF_HOME=/scratch",))
    slurm.check_reach(elsewhere, own, words)
    rows = (Source(source="owner/rows"),)
    with refuses(UsageError, names=["owner/rows"]):
        slurm.check_reach(replace(run, data=replace(run.data, train=rows)), request, words)
    monkeypatch.setenv("WANDB_API_KEY", CANARIES["WANDB_API_KEY"])
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    logged = replace(run, log=replace(run.log, wandb=True))
    with refuses(UsageError, where="log.wandb", names=["WANDB_API_KEY"]):
        slurm.check_reach(logged, request, words)
    (tmp_path / "netrc").touch()
    slurm.check_reach(logged, request, words)


def test_a_mesh_of_other_ranks_than_the_job_has_is_refused_before_the_queue(
    tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(tiny, tmp_path, held=False)))
    words = ("launch", "slurm", file, "--nodes", "2", "--gpus-per-node", "4", "parallel.shard=3")
    done = invoke(*words)
    assert done.code == 2
    check_shown(done.err, where="parallel", names=[8, 3])
    assert not (tmp_path / "run" / "launch").exists()


def run_job(folder: Path, srun: list[str], nodes: str = "1") -> subprocess.CompletedProcess[str]:
    """The script of a job under bash, with a srun of these lines."""
    run = from_mapping(recipe(folder, folder, held=False), where="test", base=folder)
    for name, lines in {"srun": srun, "scontrol": ["echo requeued"]}.items():
        (folder / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
        (folder / name).chmod(0o755)
    request = JobRequest(gpus_per_node="0", setup=(f"export PATH={folder}:$PATH",))
    words = ["bash", "--norc", "-c", slurm.render_script(run, request)]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_NODELIST": "node1"}
    env = os.environ | job
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=60, check=False)


@pytest.mark.parametrize(
    ("code", "saves", "stops"),
    [(137, False, False), (143, True, False), (137, True, True)],
)
def test_a_killed_job_goes_back_if_it_came_further_and_nobody_asked_to_stop(
    tmp_path: Path, code: int, saves: bool, stops: bool
) -> None:
    (tmp_path / "run/launch").mkdir(parents=True)
    checkpoint, stop_file = tmp_path / "run/checkpoint-9", tmp_path / "run/launch/stop-7"
    lines = [f"mkdir {checkpoint}", f"touch {checkpoint}/manifest.json"] * saves
    done = run_job(tmp_path, [*lines, *[f"touch {stop_file}"] * stops, f"kill -{code - 128} $$"])
    assert done.returncode == code, done.stderr
    assert ("requeued" in done.stdout) == (saves and not stops), done.stdout
    assert not stop_file.exists()


# Lines of srun, the nodes of the job, and its exit code.
ENDS = {
    "the final weights of a shorter run before": (["exit 0"], "1", 1),
    "a node without the folder": (["exit 2"], "2", 2),
}


@pytest.mark.parametrize(("srun", "nodes", "code"), ENDS.values(), ids=ENDS)
def test_a_job_that_has_not_finished_does_not_end_with_0(tmp_path, srun, nodes, code):
    (tmp_path / "run/launch").mkdir(parents=True)
    (tmp_path / "run/final").mkdir()
    (tmp_path / "run/launch/slurm-7.log").touch()
    (tmp_path / "run/launch/recipe.yaml").write_text(
        json.dumps(recipe(tmp_path, tmp_path, held=False))
    )
    manifest = {"step": 1, "last_step": 1, "files": {}}
    (tmp_path / "run/final/manifest.json").write_text(json.dumps(manifest))
    done = run_job(tmp_path, srun, nodes)
    assert done.returncode == code, done.stderr


def test_the_line_of_sbatch_with_the_wrong_option_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "sbatch: unrecognized option '--foo'\nTry \"sbatch --help\" for more information\n"
    done = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr("tunesmith.launch.slurm_job.try_on", lambda *_: done)
    assert "--foo" in run_slurm("sbatch")[2]


def test_a_stop_that_came_before_the_start_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run/launch").mkdir(parents=True)
    (tmp_path / "run/launch/stop-7").touch()
    done = run_job(tmp_path, ["echo trained"])
    assert done.returncode == 75, done.stderr
    assert "tunesmith stop" in done.stdout
    assert "trained" not in done.stdout
    assert not (tmp_path / "run/launch/stop-7").exists()


SENT = {
    "HF_HOME": "/shared/hf", "NCCL_IB_PKEY": "1", "NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0", "UCX_TLS": "rc",
    "TUNESMITH_DEBUG": "1", "TUNESMITH_HEARTBEAT_SECONDS": "300", "TUNESMITH_CACHE": "/shared/cache",
}  # fmt: skip
NOT_SENT = CANARIES | {
    "MY_SECRET": "canary", "TUNESMITH_HUB_PASSWORD": "canary", "TUNESMITH_ANYTHING": "canary", "TUNESMITH_RESTART": "canary",
    "NCCL_AUTH_TOKEN": "canary", "UCX_SECRET": "canary", "GLOO_API_KEY": "canary", "NCCL_NOTE": "hf_CANARY0123456789",
}  # fmt: skip


def test_a_script_has_named_variables_and_no_secret(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (SENT | NOT_SENT).items():
        monkeypatch.setenv(name, value)
    script = slurm.render_script(run, JobRequest(gpus_per_node="1"))
    exported = re.findall(r"^export ((?:HF_HOME|NCCL|GLOO|UCX|TUNESMITH)\w*)=(.*)$", script, re.M)
    assert dict(exported) == SENT
    assert "canary" not in script.lower()
