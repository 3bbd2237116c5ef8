"""The playbook's old ways in: its scripts under `accelerate launch`, with its configs and run scripts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

import playbook
import run_multi
from accelerate_env import DEFAULTS, NOTHING, PREFIXES, read_launcher
from errors import lines_with
from launch.conftest import curve_of
from playbook import SCRIPTS
from ranks import free_port, run_ranks
from tunesmith.config.schema import Parallel
from tunesmith.tools.launch import deploy

FOLDER = Path(__file__).parents[3] / "scripts"
FULL, LORA, BIG, QLORA = SCRIPTS
# What the playbook's two configs say to accelerate, as its users have them.
OLD_COMMON = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "machine_rank": 0, "main_process_ip": "127.0.0.1",
    "mixed_precision": "bf16", "num_machines": 2, "num_processes": 2,
}  # fmt: skip
OLD_FSDP = {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_offload_params": False}
OLD: dict[str, dict[str, Any]] = {
    "full": OLD_COMMON | {
        "fsdp_config": OLD_FSDP | {
            "fsdp_reshard_after_forward": False, "fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT",
        },
        "parallelism_config": {
            f"parallelism_config_{key}_size": n for key, n in (("cp", 1), ("dp_replicate", 1), ("dp_shard", 2), ("tp", 1))
        },
    },
    "lora": OLD_COMMON | {
        "fsdp_config": OLD_FSDP | {
            "fsdp_sharding_strategy": "FULL_SHARD", "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_use_orig_params": True,
        },
    },
}  # fmt: skip


def old_config(folder: Path, name: str) -> Path:
    """The file of an old config; JSON is YAML."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(OLD[name] | {"main_process_port": free_port()}))
    return path


def variables(config: Path, *flags: str) -> dict[str, str]:
    """What `accelerate launch --config_file CONFIG` adds to the environment, by its own functions."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = launch_command_parser().parse_args(["--config_file", str(config), *flags, "script.py"])
    found = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    return {name: value for name, value in found.items() if name.startswith(PREFIXES)}


# --- what accelerate's variables ask for


@pytest.mark.parametrize("name", OLD)
def test_each_variable_of_an_old_config_is_honoured_or_named_as_ignored(tmp_path: Path, name: str):
    env = variables(old_config(tmp_path, name))
    found = read_launcher(env, set(), world=2, local_world=1)
    assert found.parallel == Parallel(replicate=1, shard=2)
    assert found.flags == {"dtype": "bfloat16"}
    named = [line.partition("=")[0] for line in found.lines]
    assert len(named) == len({*named}), "each in one line"
    # The others say what they switch on, or nothing.
    silent = {*env} - {*named}
    silent -= {n for n in silent if env[n].lower() in NOTHING or env[n] in (DEFAULTS.get(n), "1")}
    switches = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"}
    assert silent - switches <= {"FSDP_RESHARD_AFTER_FORWARD", "FSDP_SHARDING_STRATEGY"}
    assert any("FSDP_STATE_DICT_TYPE" in line and "ignored" in line for line in found.lines)
    if name == "full":
        assert any(line.startswith("FSDP_RESHARD_AFTER_FORWARD=false ") for line in found.lines)
        assert "PARALLELISM_CONFIG_DP_SHARD_SIZE=2: parallel.shard 2" in found.lines
        # Sizes that do not make the ranks are ignored by name.
        other = read_launcher(env, set(), world=8, local_world=8)
        assert other.parallel == Parallel(replicate=1, shard=8)
        assert lines_with("\n".join(other.lines), 2, 8)


@pytest.mark.parametrize(
    ("strategy", "parallel"),
    [
        ("SHARD_GRAD_OP", Parallel(replicate=1, shard=4)),
        ("NO_SHARD", Parallel(replicate=4, shard=1)),
        ("HYBRID_SHARD", Parallel(replicate=2, shard=2)),
    ],
)
def test_a_sharding_strategy_is_a_mesh(tmp_path: Path, strategy: str, parallel: Parallel) -> None:
    env = variables(old_config(tmp_path, "lora"), "--fsdp_sharding_strategy", strategy)
    assert read_launcher(env, set(), world=4, local_world=2).parallel == parallel


@pytest.mark.parametrize(
    ("env", "flags"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"dtype": "float16"}),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"gradient_accumulation_steps": 4}),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"use_torch_compile": True}),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {"gradient_checkpointing": True},
        ),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}),
    ],
)
def test_a_variable_sets_a_flag_unless_it_was_typed(
    env: dict[str, str], flags: dict[str, Any]
) -> None:
    assert read_launcher(env, set(), world=2, local_world=2).flags == flags
    typed = read_launcher(env, set(flags), world=2, local_world=2)
    assert typed.flags == {}
    assert all(lines_with("\n".join(typed.lines), f"--{flag}") for flag in flags)


# --- training


def run_rank(env: dict[str, str], script: str, words: list[str]) -> int:
    os.environ.update(env)
    return playbook.main(script, words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "config"),
    [(FULL, "full"), pytest.param(LORA, "lora", marks=pytest.mark.nightly)],
)
def test_a_script_under_an_old_config_is_one_process_with_their_batches(
    script: str, config: str, tiny: Path, tmp_path: Path
) -> None:
    """Two ranks with the variables that accelerate sets; each takes --batch_size examples a step."""
    rows = [{"instruction": f"say {i}", "input": "", "output": f"{i}!"} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["--model_name", str(tiny), "--data", str(tmp_path / "rows.json"), "--dtype", "float32"]
    words += ["--seq_length", "512", "--log_dir", str(tmp_path / "logs")]
    env = variables(old_config(tmp_path, config))
    both = [*words, "--batch_size", "2", "--output_dir", str(tmp_path / "run")]
    assert run_ranks(2, run_rank, env, script, both) == [0, 0]
    alone = [*words, "--batch_size", "4", "--output_dir", str(tmp_path / "alone"), "--ranks", "1"]
    assert playbook.main(script, alone) == 0
    losses, expected = ([loss for loss, _ in curve_of(tmp_path / n)] for n in ("run", "alone"))
    assert losses == pytest.approx(expected, rel=1e-4)  # fp32: sums in another order
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" if script == FULL else tiny)
    if script == LORA:
        PeftModel.from_pretrained(model, str(tmp_path / "run"))


# --- where a node stands


STEP = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu[3-4]", "SLURM_NODEID": "1",
        "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0"}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "place"),
    [
        (STEP, (2, 1, "gpu3", 24567)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "16"}, "--ntasks-per-node 1"),
        ({"SLURM_JOB_NUM_NODES": "2"}, "srun"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4711"}, (2, 0, "127.0.0.1", 4711)),
        ({"MASTER_ADDR": "127.0.0.9"}, (2, 1, "127.0.0.9", 29500)),
        (
            {"MASTER_ADDR": "127.0.0.9", "PET_NNODES": "3", "PET_NODE_RANK": "2"},
            (3, 2, "127.0.0.9", 29500),
        ),
        ({"PET_NNODES": "2"}, "MASTER_ADDR"),
        ({}, (1, 0, "127.0.0.1", 0)),
    ],
)
def test_a_slurm_step_or_the_first_node_s_address_says_where_a_node_stands(
    env: dict[str, str],
    place: tuple[object, ...] | str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = '#!/bin/sh\n[ "$*" = "show hostnames gpu[3-4]" ] && echo gpu3 && echo gpu4\n'
    (tmp_path / "scontrol").write_text(script)
    (tmp_path / "scontrol").chmod(0o755)
    look = deploy.NodeFacts("a", (0, 0), False, [])
    monkeypatch.setattr(deploy, "read_facts", lambda host: look)
    path = f"{tmp_path}:{os.environ['PATH']}"
    monkeypatch.setattr(os, "environ", env | {"PATH": path})
    if isinstance(place, tuple):
        assert run_multi.find_place() == place
        return
    with pytest.raises(run_multi.Refused, match=place):
        run_multi.find_place()


def test_on_the_host_a_run_script_enters_the_container_and_shows_no_token(tmp_path: Path) -> None:
    (tmp_path / "docker").write_text('#!/bin/sh\nprintf "%s\\n" "$@"; echo "token $HF_TOKEN"\n')
    (tmp_path / "docker").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FINETUNING_CONTAINER": "4711"}
    command = [FOLDER / "run-multi-llama_8b", "--num_epochs", "2; reboot"]
    said = subprocess.check_output(command, text=True, env=env | {"HF_TOKEN": "hf_canary00"})
    *words, token = said.splitlines()
    assert token == "token hf_canary00", "by the environment"
    assert not any("canary" in word for word in words)
    assert "4711" in words
    assert words[-4:] == ["config_fsdp_lora.yaml", f"{LORA}.py", *command[1:]], "words stay words"
