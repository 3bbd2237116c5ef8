"""The playbook's old ways in: its scripts under `accelerate launch`, with its configs and run scripts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import playbook
import run_multi
from accelerate_env import DEFAULTS, NOTHING, PREFIXES, read_launcher
from errors import holds, lines_with
from launch.conftest import curve_of
from namespaces import start_in
from playbook import SCRIPTS
from ranks import free_port, run_ranks
from tunesmith.config.schema import Parallel
from tunesmith.tools.launch import deploy
from waiting import wait_for
from warm import Warm, fork_in_place, fork_ranks

FOLDER = Path(__file__).parents[3] / "scripts"
FULL, LORA, BIG, QLORA = SCRIPTS
TIME = 300  # seconds, for processes that load torch on a busy machine
ROWS = [
    {"instruction": f"say {i}", "input": "loudly" if i % 3 else "", "output": f"{i}!"}
    for i in range(24)
]

# The playbook's two configs as its users have them, with what they typed in.
OLD_COMMON = {
    "compute_environment": "LOCAL_MACHINE", "debug": False, "distributed_type": "FSDP", "downcast_bf16": "no",
    "enable_cpu_affinity": False, "machine_rank": 0, "main_process_ip": "127.0.0.1", "main_training_function": "main",
    "mixed_precision": "bf16", "num_machines": 2, "num_processes": 2, "same_network": True, "tpu_env": [],
    "tpu_use_cluster": False, "tpu_use_sudo": False, "use_cpu": False,
}  # fmt: skip
OLD_FSDP = {
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_cpu_ram_efficient_loading": True, "fsdp_offload_params": False
}  # fmt: skip
OLD: dict[str, dict[str, Any]] = {
    "full": OLD_COMMON | {
        "rdzv_backend": "c10d",
        "fsdp_config": OLD_FSDP | {
            "fsdp_activation_checkpointing": False, "fsdp_reshard_after_forward": False, "fsdp_version": 2,
            "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        },
        "parallelism_config": {
            f"parallelism_config_{key}_size": n for key, n in (("cp", 1), ("dp_replicate", 1), ("dp_shard", 2), ("tp", 1))
        },
    },
    "lora": OLD_COMMON | {
        "rdzv_backend": "static",
        "fsdp_config": OLD_FSDP | {
            "fsdp_backward_prefetch": "BACKWARD_PRE", "fsdp_forward_prefetch": False, "fsdp_sharding_strategy": "FULL_SHARD",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_sync_module_states": True, "fsdp_use_orig_params": True,
        },
    },
}  # fmt: skip


def old_config(folder: Path, name: str) -> Path:
    """An old config's file; JSON is YAML."""
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
        ("FULL_SHARD", Parallel(replicate=1, shard=4)),
        ("SHARD_GRAD_OP", Parallel(replicate=1, shard=4)),
        ("NO_SHARD", Parallel(replicate=4, shard=1)),
        ("3", Parallel(replicate=4, shard=1)),
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
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {}),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"gradient_accumulation_steps": 4}),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"use_torch_compile": True}),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, {}),
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


def test_what_is_kept_on_the_host_and_what_is_unknown(tmp_path: Path) -> None:
    env = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_THING": "new"}
    found = read_launcher(env, set(), world=2, local_world=2)
    assert found.offload == ("parameters",)
    args = playbook.parser(LORA).parse_args([])
    run = playbook.make_recipe(LORA, args, folder=tmp_path, batches=2, asked=found)
    assert (run.train.cpu_offload, run.parallel.shard) == (("parameters",), 2)
    assert lines_with("\n".join(found.lines), "ACCELERATE_THING=new")


@pytest.mark.parametrize(
    ("typed", "dtype"),
    [([], "float16"), (["--dtype", "bfloat16"], "bfloat16"), (["--dty=float32"], "float32")],
)
def test_variables_of_the_launch_reach_the_flags(
    typed: list[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    args = playbook.parser(LORA).parse_args(typed)
    playbook.read_settings(LORA, args, typed)
    assert args.dtype == dtype


@pytest.mark.parametrize("name", ["config_finetuning", "config_fsdp_lora"])
def test_nothing_is_typed_into_the_configs(name: str) -> None:
    file = FOLDER / "configs" / f"{name}.yaml"
    keys = {line.partition(":")[0].strip() for line in file.read_text().splitlines()}
    assert not keys & {"machine_rank", "main_process_ip"}
    found = read_launcher(variables(file), set(), world=2, local_world=2)
    assert found.parallel == Parallel(replicate=1, shard=2)


# --- training


@pytest.fixture
def words(tiny: Path, tmp_path: Path) -> list[str]:
    """Flags of a short run in fp32, without its batch and its folder."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    found = ["--model_name", str(tiny), "--data", str(tmp_path / "rows.json"), "--dtype", "float32"]
    return [*found, "--seq_length", "512", "--log_dir", str(tmp_path / "logs")]


def alone(script: str, words: list[str], out: Path) -> list[float]:
    """The losses of one process with a batch of 4."""
    flags = ["--batch_size", "4", "--output_dir", str(out), "--ranks", "1"]
    assert playbook.main(script, [*words, *flags]) == 0
    return [loss for loss, _ in curve_of(out)]


def check_run(script: str, words: list[str], model: Path, out: Path) -> None:
    """A run trained as one process does, and opens in PEFT or Transformers as it is."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # fp32: sums in another order
    assert [loss for loss, _ in curve_of(out)] == pytest.approx(
        alone(script, words, out.parent / "alone"), rel=1e-4
    )
    assert "### Instruction:" in AutoTokenizer.from_pretrained(out).chat_template
    if script == FULL:
        AutoModelForCausalLM.from_pretrained(out)
    else:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(out))


def run_rank(env: dict[str, str], script: str, words: list[str]) -> int:
    os.environ.update(env)
    return playbook.main(script, words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "config"),
    [
        pytest.param(LORA, "lora", marks=pytest.mark.nightly),
        (FULL, "full"),
        pytest.param(BIG, "lora", marks=pytest.mark.nightly),
        pytest.param(QLORA, "lora", marks=pytest.mark.nightly),
    ],
)
def test_a_script_under_an_old_config_is_one_process_with_their_batches(
    script: str, config: str, words: list[str], tiny: Path, tmp_path: Path
) -> None:
    """Two ranks with the variables that accelerate sets; each takes --batch_size examples a step."""
    out, env = tmp_path / "run", variables(old_config(tmp_path, config))
    flags = [*words, "--batch_size", "2", "--output_dir", str(out)]
    assert run_ranks(2, run_rank, env, script, flags) == [0, 0]
    check_run(script, words, tiny, out)


def start(*command: str | Path, **env: str) -> subprocess.Popen[str]:
    around = {k: v for k, v in os.environ.items() if not k.startswith("FINETUNING")}
    return subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=around | {"OMP_NUM_THREADS": "1"} | env, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    try:
        said = process.communicate(timeout=TIME)[0]
    finally:
        process.poll() is None and os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_ranks_of_a_script_share_its_batch_stop_and_go_on_as_one_process(
    words: list[str], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = [*words, "--num_epochs", "4"]
    flags = ["--batch_size", "4", "--output_dir", out, "--ranks", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = Warm([*words, *flags], program=FOLDER / f"{LORA}.py", prepare=fork_ranks, env=env)
    try:
        wait_for(lambda: len(curve_of(out)) >= 3, ranks)
        ranks.send_signal(signal.SIGTERM)
        said = "".join(ranks.communicate(TIME))
    finally:
        ranks.kill()
    assert ranks.returncode == 75, said
    assert "Effective batch size: 4\n" in said
    assert holds(said, "2 ranks")
    done = len(curve_of(out))
    assert len(lines_with(said, "SIGTERM", f"step {done}")) == 1, "one rank speaks"
    both = alone(LORA, words, out)
    assert 3 <= done < len(both) == 24
    check_run(LORA, words, tiny, out)


def test_another_launcher_says_how_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert playbook.main(LORA, ["--ranks", "2"]) == 2
    assert holds(capsys.readouterr().err, "--ranks")


# --- where a node stands


STEP = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu[3-4]", "SLURM_NODEID": "1",
        "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0"}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "place"),
    [
        (STEP, (2, 1, "gpu3", 24567)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "16"}, "--ntasks-per-node 1"),
        ({"SLURM_JOB_NUM_NODES": "2"}, "srun"),
        ({"MASTER_ADDR": "127.0.0.1"}, (2, 0, "127.0.0.1", 29500)),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4711"}, (2, 0, "127.0.0.1", 4711)),
        ({"MASTER_ADDR": "127.0.0.9"}, (2, 1, "127.0.0.9", 29500)),
        (
            {"MASTER_ADDR": "127.0.0.9", "PET_NNODES": "3", "PET_NODE_RANK": "2"},
            (3, 2, "127.0.0.9", 29500),
        ),
        ({"MASTER_ADDR": "127.0.0.9", "PET_NNODES": "3"}, "PET_NODE_RANK"),
        ({"PET_NNODES": "2"}, "MASTER_ADDR"),
        ({"PET_NNODES": "two"}, "PET_NNODES=two"),
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


def test_both_functions_of_the_cable_are_used_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    look = deploy.NodeFacts("a", (0, 0), True, ["roceP2p1s0f1", "rocep1s0f1"])
    monkeypatch.setattr(deploy, "read_facts", lambda host: look)
    environment = {"MASTER_ADDR": "127.0.0.1"}
    monkeypatch.setattr(os, "environ", environment)
    assert run_multi.find_place().nodes == 2
    assert environment["NCCL_IB_HCA"] == "=roceP2p1s0f1,rocep1s0f1"
    assert environment["NCCL_IB_MERGE_NICS"] == "1"
    assert environment["NCCL_SOCKET_IFNAME"] == "lo"
    del environment["MASTER_ADDR"]
    with pytest.raises(run_multi.Refused, match="MASTER_ADDR"):
        run_multi.find_place()


@pytest.mark.parametrize("name", ["3b", "8b", "70b"])
def test_on_the_host_a_run_script_enters_the_container_and_shows_no_token(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "docker").write_text('#!/bin/sh\nprintf "%s\\n" "$@"; echo "token $HF_TOKEN"\n')
    (tmp_path / "docker").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FINETUNING_CONTAINER": "4711"}
    given = ("--num_epochs", "2; reboot")
    process = start(FOLDER / f"run-multi-llama_{name}", *given, HF_TOKEN="hf_canary00", **env)
    *said, token = finish(process).splitlines()
    assert token == "token hf_canary00", "by the environment"
    assert not any("canary" in word for word in said)
    assert "4711" in said
    script = {"3b": FULL, "8b": LORA, "70b": BIG}[name]
    config = "config_finetuning.yaml" if name == "3b" else "config_fsdp_lora.yaml"
    assert said[-4:] == [config, f"{script}.py", *given], "words stay words"


def network(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def cable() -> Iterator[tuple[str, str]]:
    """Two network namespaces, a cable between their `port0`: 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2 (make cluster-tools)")
    a, b = (f"cable-{os.getpid()}-{side}" for side in "ab")
    try:
        for name in (a, b):
            network(f"netns add {name}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        network(f"link add port0 netns {a} type veth peer name port0 netns {b}")
        for i, name in enumerate((a, b)):
            network(f"-n {name} address add 10.77.0.{i + 1}/24 broadcast + dev port0")
            for link in ("lo", "port0"):
                network(f"-n {name} link set {link} up")
        yield a, b
    finally:
        for name in (a, b):
            subprocess.run(["ip", "netns", "delete", name], check=False)


def start_on(node: str) -> None:
    """`prepare` of a process on a node of the cable; what it becomes and starts is forked."""
    start_in(node)
    fork_in_place()


@pytest.mark.nightly
def test_a_run_script_on_two_nodes_meets_the_other_over_the_cable(
    words: list[str], tiny: Path, tmp_path: Path, cable: tuple[str, str]
) -> None:
    """What run-multi-llama_8b starts, as a test above says, in a process that is forked."""
    out = tmp_path / "run"
    flags = ["config_fsdp_lora.yaml", f"{LORA}.py", *words, "--batch_size", "2", "--output_dir"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "10.77.0.1"}
    options: dict[str, Any] = {"program": FOLDER / "run_multi.py", "env": env}
    nodes = [Warm([*flags, out], prepare=partial(start_on, node), **options) for node in cable]
    try:
        said = ["".join(node.communicate(TIME)) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    for rank, text in enumerate(said):
        assert holds(text, f"--machine_rank {rank}", "--main_process_ip 10.77.0.1")
        assert ("TRAINING COMPLETED" in text) == (rank == 0)
    check_run(LORA, words, tiny, out)
