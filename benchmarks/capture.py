"""What capturing costs: the same prompts through vLLM without the plugin, with it idle, and with it capturing.

The model is a Llama of about 126 M parameters with random weights, which the script makes. Times are the CPU
seconds of the process that runs the model, writing thread included, because wall time on a shared machine says
little; wall-time ratios are printed beside them. Two processes of the same engine may differ by more than capturing
costs, so there are two without the plugin, one started before the one with it and one after. A block of rounds runs
the first of them, every way of using the plugin, all these again in the opposite order, and the second; a ratio is of the sums.
`A/A` is the second over the first. The table shows medians over the blocks with the range of the middle half.
Rows land in a lake in the folder `--out`, and a round with them ends when all of them are committed.

A round has twice as many prompts as run at once, of different lengths, so that rows are written while others are
computed, as in a job. With `--prompts 32` all of them run at once, and nothing is computed while their rows are
written; what a commit costs however many rows it has is then twice as much of a round. A job's commit has 32,768 rows a
hook, that of a quick round about 8,600, so a round overstates what a job pays.

    python benchmarks/capture.py [--quick] [--prompts N] [--d-model N] [--eager] [--out DIR] [--device cuda]

A model's arithmetic grows with the square of its width, its rows with the width: `--d-model` shows what that means.

With `--device cuda` the model has 1.2 B parameters, CUDA graphs are on, and the ratios in the JSON line are of wall
time: the process that runs the model waits for the device.

The last line is JSON; `idle`, `one_hook`, `all_hooks`, `read_probe` and `read_codes` are time with the plugin over time
without; `all_over_idle` is `all_hooks` over `idle`, which are of one process. The reads keep, in place of the rows of
one hook, a probe's score or the 64 largest of an SAE's codes (8 latents a dimension); `bytes_a_row` says what each of
them stores. All of them run in an engine with taps at every layer. vllm-lens is installed without its dependencies into
a folder of its own; where that fails, its key is null.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, D_MODEL, VOCAB = 12, 768, 8192
SLOTS = 32
"""Prompts that run at once."""
LENS = "vllm-lens==1.3.0"


@dataclass(frozen=True)
class Work:
    """Prompts of one round, and how many tokens follow each."""

    prompts: list[list[int]]
    new_tokens: int

    @property
    def rows(self) -> int:
        """Rows of one hook: the last token has none."""
        return sum(len(prompt) + self.new_tokens - 1 for prompt in self.prompts)


def make_work(n_prompts: int, new_tokens: int) -> Work:
    """Prompts of 64 to 192 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(64, 193, n_prompts)
    return Work([rng.integers(0, VOCAB, int(length)).tolist() for length in lengths], new_tokens)


def make_model(folder: Path, device: str, d_model: int) -> int:
    """A Llama with random weights, of this width on a CPU and with 1.2 B parameters on a GPU; returns their number."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = (
        {
            "hidden_size": d_model,
            "intermediate_size": 4 * d_model,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": d_model // 64,
        }
        if device == "cpu"
        else {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    )
    config = LlamaConfig(
        vocab_size=VOCAB, num_key_value_heads=size["num_attention_heads"], max_position_embeddings=1024, **size
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_reads(lake: Any, d_model: int, hook: str) -> dict[str, tuple[Any, ...]]:
    """Runs that keep what a random probe and a random SAE read at `hook` in place of its rows: name to what is read."""
    import torch
    from safetensors.torch import save

    from millpond.capture.edits import Edits
    from millpond.capture.reads import Readers
    from millpond.store.artifacts import save_artifact, save_probe
    from millpond.store.reads import ReadProbe, ReadSaeTopk

    d_sae = 8 * d_model
    save_probe(lake, "probe", torch.randn(d_model), 0.0)
    shapes = {"W_enc": (d_model, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_model), "b_dec": (d_model,)}
    weights = save({name: torch.randn(shape) for name, shape in shapes.items()})
    save_artifact(
        lake, "sae", "sae", weights, config={"architecture": "topk", "k": 64, "d_in": d_model, "d_sae": d_sae}
    )
    readers = Readers(lake, d_model, "bfloat16", Edits(lake, d_model).sae)
    asked = {
        "read_probe": ReadProbe(artifact="probe", hook=hook),
        "read_codes": ReadSaeTopk(artifact="sae", hook=hook),
    }
    return {name: readers.resolve([read], [hook]) for name, read in asked.items()}


class Engine:
    """vLLM with Millpond's worker and some taps, or without Millpond."""

    def __init__(self, model: Path, *, lake: Path | None, hooks: list[str], eager: bool) -> None:
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        from millpond.capture.versions import worker_argument

        on_cpu = current_platform.is_cpu()
        millpond = {
            **dict([worker_argument()]),
            "additional_config": {
                "millpond": {"lake": str(lake), "hooks": hooks, **({} if on_cpu else {"edits_per_token": 0})}
            },
        }
        before = set(descendants(os.getpid()))
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(model),
                dtype="bfloat16",
                skip_tokenizer_init=True,
                enforce_eager=eager,
                enable_prefix_caching=False,
                max_model_len=256,
                max_num_seqs=SLOTS,
                max_num_batched_tokens=1024,
                kv_cache_memory_bytes=1 << 29 if on_cpu else 1 << 32,
                disable_log_stats=True,
                **(millpond if lake is not None else {}),
            )
        )
        started = [pid for pid in descendants(os.getpid()) if pid not in before]
        # the process that runs the model: the worker's own where there is one
        self._pids = [pid for pid in started if "Worker" in name_of(pid)] or started
        self._round = 0

    def measure(self, work: Work, run: str | None) -> tuple[float, float]:
        """CPU and wall seconds of one round; with `run`, until every row is durable in it."""
        cpu, wall = sum(map(cpu_seconds, self._pids)), time.perf_counter()
        self._drive(work, run)
        return sum(map(cpu_seconds, self._pids)) - cpu, time.perf_counter() - wall

    def _drive(self, work: Work, run: str | None) -> None:
        from vllm import SamplingParams

        self._round += 1
        for number, prompt in enumerate(work.prompts):
            name = f"{run}-{self._round}-{number}"
            wish = {"millpond": {"capture": {"id": name, "run": run}}} if run else None
            parameters = SamplingParams(
                temperature=0.0, max_tokens=work.new_tokens, ignore_eos=True, detokenize=False, extra_args=wish
            )
            self._engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        finished = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    finished.append((output.request_id, len(output.prompt_token_ids) + work.new_tokens))
            if run and (len(finished) >= 16 or not self._engine.has_unfinished_requests()):
                (answers,) = self._engine.collective_rpc("millpond_confirm", args=(finished,))
                assert all(answer["status"] == "kept" for answer in answers.values())
                finished = []
        if run:
            ((_, _, problem),) = self._engine.collective_rpc("millpond_commit")
            assert problem is None, problem

    def statistics(self) -> dict[str, float]:
        """The worker's counters."""
        (found,) = self._engine.collective_rpc("millpond_statistics")
        return dict(found)

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.engine_core.shutdown()


def descendants(pid: int) -> list[int]:
    """Processes below `pid`."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def name_of(pid: int) -> str:
    """How the process calls itself."""
    return Path(f"/proc/{pid}/cmdline").read_text()


def cpu_seconds(pid: int) -> float:
    """User and system seconds of all its threads, to the nanosecond: /proc tells whole hundredths."""
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) makes of a process's number on Linux


Seconds = tuple[float, float]
"""CPU and wall time."""


def palindrome(
    rounds: Mapping[str, Callable[[], Seconds]], first: Callable[[], Seconds], last: Callable[[], Seconds]
) -> dict[str, Seconds]:
    """One block: `first` (A), all `rounds`, these in the opposite order, `last` (Z); seconds of each, those of two rounds added."""
    opening = first()
    there = {name: one() for name, one in rounds.items()}
    back = {name: rounds[name]() for name in reversed(list(rounds))}
    closing = last()
    both = {name: (there[name][0] + back[name][0], there[name][1] + back[name][1]) for name in rounds}
    return {"A": opening, "Z": closing, "without": (opening[0] + closing[0], opening[1] + closing[1]), **both}


def ratios(blocks: list[dict[str, Seconds]], over: str, under: str, clock: int) -> list[float]:
    """Of each block, the time of `over` by that of `under`; clock 0 is the CPU's, 1 the wall's."""
    return [block[over][clock] / block[under][clock] for block in blocks]


def hugging_face(model_folder: Path, work: Work, out: Path) -> None:
    """Peer: transformers with output_hidden_states, padded batches of prompts of like length, rows written to files."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval().to(device)
    batches = np.array_split(np.argsort([len(prompt) for prompt in work.prompts]), max(len(work.prompts) // 16, 1))

    def one_round() -> int:
        rows = 0
        for number, batch in enumerate(batches):
            prompts = [work.prompts[int(index)] for index in batch]
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
            with torch.no_grad():
                generated = model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=work.new_tokens,
                    min_new_tokens=work.new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    output_hidden_states=True,
                    return_dict_in_generate=True,
                )
            for layer in range(len(generated.hidden_states[0]) - 1):
                states = torch.cat([step[layer + 1] for step in generated.hidden_states], 1).cpu()
                kept = [states[k, longest - len(prompt) :] for k, prompt in enumerate(prompts)]
                joined = torch.cat(kept).view(torch.uint16).numpy()
                rows += len(joined) if layer == 0 else 0
                with (out / f"{number}-{layer}.npy").open("wb") as handle:
                    np.save(handle, joined)
                    handle.flush()
                    os.fsync(handle.fileno())
        return rows

    timed(one_round, work)


def lens(model_folder: Path, work: Work, out: Path) -> None:
    """Peer: vllm-lens, whose activations come back to the client and are written to files there."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model_folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=SLOTS,
        max_num_batched_tokens=1024,
        kv_cache_memory_bytes=1 << 29,
        enable_prefix_caching=False,
    )
    parameters = SamplingParams(
        temperature=0.0,
        max_tokens=work.new_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={"output_residual_stream": list(range(LAYERS))},
    )

    def one_round() -> int:
        rows = 0
        outputs = llm.generate([{"prompt_token_ids": p} for p in work.prompts], parameters, use_tqdm=False)
        for number, output in enumerate(outputs):
            stream = output.activations["residual_stream"]
            rows += stream.shape[1]
            with (out / f"{number}.bin").open("wb") as handle:
                handle.write(stream.contiguous().view(-1).view(dtype=stream.dtype).float().numpy().tobytes())
                handle.flush()
                os.fsync(handle.fileno())
        return rows

    timed(one_round, work)


def timed(one_round: Callable[[], int], work: Work) -> None:
    """Print rows and the seconds of the better of two rounds after a warm-up, as JSON."""
    one_round()
    best = (float("inf"), float("inf"))
    for _ in range(2):
        pids = [os.getpid(), *descendants(os.getpid())]
        pids = [pid for pid in pids if "EngineCore" not in name_of(pid)]  # it spins while the worker computes
        cpu, wall = sum(map(cpu_seconds, pids)), time.perf_counter()
        rows = one_round()
        best = min(best, (sum(map(cpu_seconds, pids)) - cpu, time.perf_counter() - wall))
    assert rows >= work.rows, (rows, work.rows)
    print(json.dumps({"rows": rows, "cpu": best[0], "wall": best[1]}))


def peer(name: str, arguments: argparse.Namespace, model: Path, folder: Path, environment: dict[str, str]) -> Any:
    """Run a peer in a process of its own; None if it fails."""
    command = [sys.executable, __file__, "--peer", name, "--model", str(model), "--out", str(folder)]
    command += ["--quick"] if arguments.quick else []
    command += ["--prompts", str(arguments.prompts)] if arguments.prompts else []
    (folder / name).mkdir()
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"{name} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def install_lens(folder: Path) -> bool:
    """vllm-lens without its dependencies: it asks for another vLLM and Python than the ones it runs with here."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--ignore-requires-python"]
    return subprocess.run([*command, "--target", str(folder), LENS], capture_output=True, check=False).returncode == 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="5 blocks of 64 prompts and 8 tokens in place of 12 of 96 and 16"
    )
    parser.add_argument("--prompts", type=int, help="of a round")
    parser.add_argument("--blocks", type=int, help="how many")
    parser.add_argument("--d-model", type=int, default=D_MODEL, help="width on a CPU, a multiple of 64")
    parser.add_argument("--eager", action="store_true", help="without torch.compile (and CUDA graphs)")
    parser.add_argument("--out", type=Path, help="folder of the lake and the peers' files; a temporary one by default")
    parser.add_argument("--threads", type=int, default=1, help="of the model's arithmetic on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what the installed vLLM is built for")
    parser.add_argument("--peer", choices=["hugging-face", "vllm-lens"], help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prompts, new_tokens = (64, 8) if arguments.quick else (96, 16)
    work = make_work(arguments.prompts or prompts, new_tokens)
    if arguments.peer:
        run_peer = {"hugging-face": hugging_face, "vllm-lens": lens}[arguments.peer]
        run_peer(arguments.model, work, arguments.out / arguments.peer)
        return
    blocks = arguments.blocks or (5 if arguments.quick else 12)
    os.environ |= {
        "OMP_NUM_THREADS": str(arguments.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
    from millpond.capture.versions import set_environment

    set_environment()
    folder = Path(tempfile.mkdtemp(prefix="millpond-benchmark-", dir=arguments.out))
    try:
        measure(arguments, work, blocks, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(arguments: argparse.Namespace, work: Work, n_blocks: int, folder: Path) -> None:
    """Every comparison, the table and the JSON line."""
    from vllm.platforms import current_platform

    import millpond

    device = "cpu" if current_platform.is_cpu() else "cuda"
    if device != arguments.device:
        raise SystemExit(f"--device is {arguments.device}, but the installed vLLM is built for {device}")
    parameters = make_model(folder / "model", device, arguments.d_model)
    config = json.loads((folder / "model" / "config.json").read_text())
    layers, d_model = config["num_hidden_layers"], config["hidden_size"]
    every = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
    one = [every[layers // 2]]
    lake = millpond.open(folder / "lake", create=True)
    for name, hooks in {"one": one, "all": every}.items():
        lake.create_run(name, hooks=tuple(hooks), d_model=d_model, dtype="bfloat16")
    for name, reads in make_reads(lake, d_model, one[0]).items():
        lake.create_run(name, hooks=(), reads=reads, d_model=d_model, dtype="bfloat16")
    tokens = sum(map(len, work.prompts))
    print(
        f"{parameters / 1e6:.0f} M parameters, bfloat16, {'eager' if arguments.eager else 'compiled'}, {device}, "
        f"{arguments.threads} thread; a round is {len(work.prompts)} prompts, {tokens} tokens and {work.new_tokens} more each"
    )
    engines: dict[str, Engine] = {}
    blocks: list[dict[str, Seconds]] = []
    try:
        for name, tapped in {"first": [], "tapped": every, "last": []}.items():
            there = folder / "lake" if tapped else None
            engines[name] = Engine(folder / "model", lake=there, hooks=tapped, eager=arguments.eager)

        def measured(engine: str, run: str | None) -> Callable[[], Seconds]:
            return lambda: engines[engine].measure(work, run)

        runs = {
            "idle": None,
            "one_hook": "one",
            "all_hooks": "all",
            "read_probe": "read_probe",
            "read_codes": "read_codes",
        }
        variants = {name: measured("tapped", run) for name, run in runs.items()}
        palindrome(variants, measured("first", None), measured("last", None))  # warm
        for _ in range(n_blocks):
            blocks.append(palindrome(variants, measured("first", None), measured("last", None)))
        before, started = engines["tapped"].statistics(), time.perf_counter()
        cpu, wall = min(engines["tapped"].measure(work, "all") for _ in range(3))
        after, elapsed = engines["tapped"].statistics(), time.perf_counter() - started
    finally:
        for engine in engines.values():
            engine.close()
    record: dict[str, Any] = {}
    print(f"{'':14}{'CPU, with / without':>28}{'wall':>28}")
    print(f"{'A/A':14}" + line(blocks, "Z", "A"))
    for name in runs:
        print(f"{name:14}" + line(blocks, name, "without"))
        record[name] = round(statistics.median(ratios(blocks, name, "without", 0 if device == "cpu" else 1)), 4)
    print(f"{'all_over_idle':14}" + line(blocks, "all_hooks", "idle"))
    record["all_over_idle"] = round(
        statistics.median(ratios(blocks, "all_hooks", "idle", 0 if device == "cpu" else 1)), 4
    )
    changed = {name: after[name] - before[name] for name in after}
    rows, size = work.rows * layers, work.rows * layers * d_model * 2
    print(
        f"all_hooks: {rows / wall:,.0f} rows/s, {size / wall / 1e6:.0f} MB/s; share of its rounds' wall time: planning and "
        f"taking rows {(changed['plan_seconds'] + changed['take_seconds']) / elapsed:.1%}, writing thread busy "
        f"{changed['writer_seconds'] / elapsed:.1%}, engine waiting for the lake {changed['wait_seconds'] / elapsed:.1%}"
    )
    record["bytes_a_row"] = {name: lake.spec(name).row_bytes() for name in ("one", "read_probe", "read_codes")}
    print("bytes a row: " + ", ".join(f"{name} {count}" for name, count in record["bytes_a_row"].items()))
    record |= {"rows_per_s": round(rows / wall), "mb_per_s": round(size / wall / 1e6, 1)}
    found = {"hugging-face": peer("hugging-face", arguments, folder / "model", folder, {})}
    environment = {"PYTHONPATH": f"{folder / 'lens'}:{os.environ.get('PYTHONPATH', '')}", "VLLM_PLUGINS": "activations"}
    installed = device == "cpu" and install_lens(folder / "lens")
    found["vllm-lens"] = peer("vllm-lens", arguments, folder / "model", folder, environment) if installed else None
    for name, result in found.items():
        ratio_of = ("cpu", cpu) if device == "cpu" else ("wall", wall)
        speedup = None if result is None else round(result[ratio_of[0]] / ratio_of[1], 2)
        record["speedup_vs_" + {"hugging-face": "hf", "vllm-lens": "vllm_lens"}[name]] = speedup
        told = (
            "could not be run"
            if result is None
            else f"{result['cpu'] / cpu:.2f}x its CPU time, {result['wall'] / wall:.2f}x its wall time"
        )
        print(f"all_hooks against {name}: {told}")
    print(json.dumps(record))


def line(blocks: list[dict[str, Seconds]], over: str, under: str) -> str:
    """Medians with quartiles, of CPU and of wall time."""
    told = ""
    for clock in (0, 1):
        low, middle, high = statistics.quantiles(ratios(blocks, over, under, clock), n=4, method="inclusive")
        told += f"{middle:14.3f} [{low:.3f}, {high:.3f}]"
    return told


if __name__ == "__main__":
    main()
