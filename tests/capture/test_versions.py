"""Every name of vLLM's that capture reads or wraps, looked up in vLLM's source: of the installed version, and any other.

`python -m tests.capture.test_versions FOLDER` checks the `vllm` package in FOLDER without installing it.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from millpond.capture import versions
from millpond.store.errors import InvalidInput

NAMES = {
    "v1/worker/gpu_model_runner.py": {
        "GPUModelRunner": "_prepare_inputs(scheduler_output, num_scheduled_tokens) input_ids input_batch "
        "intermediate_tensors max_num_tokens get_model model_memory_usage",
    },
    "v1/worker/gpu_input_batch.py": {"InputBatch": "req_ids num_computed_tokens_cpu"},
    "v1/worker/gpu/model_runner.py": {"GPUModelRunner": "prepare_inputs get_model model_memory_usage"},
    "v1/worker/gpu/input_batch.py": {"InputBatch": "req_ids num_scheduled_tokens num_computed_tokens_np input_ids"},
    "v1/worker/gpu_worker.py": {
        "Worker": "load_model execute_model(scheduler_output) use_v2_model_runner model_runner"
    },
    "v1/worker/cpu_worker.py": {"CPUWorker": "init_device model_runner"},
    "v1/core/sched/output.py": {
        "NewRequestData": "req_id prompt_token_ids sampling_params",
        "SchedulerOutput": "scheduled_new_reqs finished_req_ids",
    },
    "v1/engine/core.py": {"EngineCore": "preprocess_add_request(request)"},
    "v1/engine/core_client.py": {"MPClient": "core_engines", "AsyncMPClient": "call_utility_all_async(method)"},
    "v1/engine/parallel_sampling.py": {"ParentRequest": "_get_child_sampling_params(index)"},
    "v1/request.py": {"Request": "get_skip_reading_prefix_cache cache_salt prompt_token_ids sampling_params"},
    "v1/engine/async_llm.py": {"AsyncLLM": "generate(prompt, sampling_params, request_id)"},
    "entrypoints/openai/completion/serving.py": {
        "OpenAIServingCompletion": "completion_stream_generator request_output_to_completion_response"
    },
    "entrypoints/openai/chat_completion/serving.py": {"OpenAIServingChat": "chat_completion_stream_generator"},
    "entrypoints/openai/completion/protocol.py": {"CompletionRequest": "to_beam_search_params vllm_xargs"},
    "entrypoints/openai/chat_completion/protocol.py": {"ChatCompletionRequest": "to_beam_search_params vllm_xargs"},
    "config/parallel.py": {
        "ParallelConfig": "data_parallel_size prefill_context_parallel_size ubatch_size enable_dbo "
        "enable_expert_parallel worker_cls worker_extension_cls data_parallel_index _api_process_count"
    },
    "config/scheduler.py": {"SchedulerConfig": "async_scheduling max_num_batched_tokens max_num_seqs"},
    "config/compilation.py": {"CompilationConfig": "max_cudagraph_capture_size"},
    "config/model.py": {"ModelConfig": "enable_prompt_embeds is_encoder_decoder is_moe get_hidden_size hf_text_config"},
    "config/speculative.py": {"SpeculativeConfig": "enable_adaptive_verification"},
    "config/vllm.py": {"VllmConfig": "additional_config speculative_config"},
    "distributed/parallel_state.py": {"GroupCoordinator": "cpu_group ranks rank_in_group world_size is_first_rank"},
}
"""File to class to members; where arguments are named, a method's first ones after `self`."""


def members(tree: ast.Module, class_name: str) -> dict[str, list[str]]:
    """Names that a class defines or sets, with the arguments of methods."""
    (body,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    found: dict[str, list[str]] = {}
    for node in ast.walk(body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = [argument.arg for argument in node.args.args[1:]]
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name | ast.Attribute):
                    found.setdefault(target.id if isinstance(target, ast.Name) else target.attr, [])
    return found


def missing(package: Path) -> list[str]:
    """What of NAMES the `vllm` package in a folder does not have."""
    problems = []
    for file, classes in NAMES.items():
        tree = ast.parse((package / file).read_text())
        for class_name, wanted in classes.items():
            found = members(tree, class_name)
            for name, arguments in ((n.partition("(")[0], n.partition("(")[2]) for n in split(wanted)):
                given = [part for part in arguments.rstrip(")").split(", ") if part]
                if name not in found or found[name][: len(given)] != given:
                    problems.append(f"{file}: {class_name}.{name}")
    return problems


def split(names: str) -> list[str]:
    """At spaces that are not within parentheses."""
    parts = []
    for word in names.split(" "):
        if parts and parts[-1].count("(") > parts[-1].count(")"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    return parts


def test_the_installed_vllm_has_every_name_that_capture_uses() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = Path(next(iter(spec.submodule_search_locations)))
    assert missing(package) == []
    batch = members(ast.parse((package / "v1/worker/gpu/input_batch.py").read_text()), "InputBatch")
    assert "num_of_things" not in batch  # the look-up can fail


@pytest.mark.parametrize(
    ("installed", "argument"),
    [
        ("0.32.0", ("worker_cls", "millpond.capture.worker.TapWorker")),
        ("0.33.1+cu130", ("worker_extension_cls", "millpond.capture.worker.TapExtension")),
    ],
)
def test_each_version_is_tapped_in_its_own_way(
    monkeypatch: pytest.MonkeyPatch, installed: str, argument: tuple[str, str]
) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: installed)
    assert versions.worker_argument() == argument
    assert versions.is_supported_vllm()


@pytest.mark.parametrize("installed", ["0.31.9", "0.34.0", "0.3.2", "1.32.0"])
def test_other_versions_are_refused_by_number(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: installed)
    assert not versions.is_supported_vllm()
    with pytest.raises(InvalidInput, match=rf"vLLM {installed} is not supported; install 0\.32\.x or 0\.33\.x"):
        versions.worker_argument()


if __name__ == "__main__":
    print(missing(Path(sys.argv[1])) or "nothing is missing")
