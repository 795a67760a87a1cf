"""How fast autoencoders train, beside sae-lens, dictionary_learning and sparsify, interleaved in one process.

`python benchmarks/sae.py [--quick] [--write]` prints a table and a last line of JSON. It makes an
environment `.venv-sae-peers` with the peers in it (a few minutes, once) and runs itself there, so that all
use one PyTorch on the same batches: d_in 512, d_sae 4096, k 32, batch 4096, one thread. Planted sparse features:
4,096 unit directions that fire by Zipf's law, 28 a row.

Figures are CPU seconds unless their name says otherwise, because wall time on a shared machine says little, of things that
take turns in one process, and medians of ratios within a turn. In the JSON:

- `speedup_vs_*`: a training step of theirs over ours; of each round the medians.
- `gemm_fraction`: the encoder's bfloat16 product alone, into memory that is there, over our BatchTopK step.
  `gemm_fraction_fresh_memory`: the same with new memory for each product, most of which is the system clearing pages.
- `fvu_gap`: ours less dictionary_learning's FVU at exact k after as many steps. `l0_error`: of L0 at the exported threshold.
- `lake_over_ram`: whole trainings from the lake over whole trainings from memory, all threads counted, in the order lake,
  memory, memory, lake. `lake_over_ram_wall`: the same by wall time.
- `stream_vs_saelens`: rows a CPU second of `run.stream` over those of SAELens' cached store, from the second batch on.
- `two_workers`: tokens a second of **wall time** of two Dask workers over those of one, after the first steps.
  `two_unrelated`: the same of two trainings at once that do not know of each other, which is what the machine gives two
  processes. `two_workers_by_cpu`: by the workers' CPU seconds, in which waiting for each other does not count.
- `growth_exponent`: power of CPU seconds by tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-sae-peers"
D, S, K, BATCH, LR, WARMUP = 512, 4096, 32, 4096, 1e-3, 20
REQUIREMENTS = ["sae-lens==6.54.12", "nnsight==0.8.1", "natsort", "schedulefree", "simple-parsing"]
WITHOUT_DEPENDENCIES = ["dictionary-learning==0.1.0", "eai-sparsify==1.3.3"]
"""Their pins exclude each other; what they import is in the list above."""


def make_environment() -> Path:
    """The environment with the peers and what Millpond needs; returns its Python."""
    python = PEERS / "bin" / "python"
    stamp = PEERS / ".complete"
    if stamp.exists():
        return python
    import torch

    print(f"making {PEERS.name} with the peers ...", flush=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = [*project["dependencies"], *project["optional-dependencies"]["analysis"]]
    subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*pip, "install", "-q", f"torch=={torch.__version__}", *REQUIREMENTS, *ours], **quiet)
    subprocess.run([*pip, "install", "-q", "--no-deps", *WITHOUT_DEPENDENCIES], **quiet)
    # built against another torch, and imported by transformers if present
    subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio"], **quiet)
    stamp.touch()
    return python


def planted(n: int, seed: int) -> Any:
    """Rows (n, D), float32."""
    import numpy as np
    import scipy.sparse

    directions = np.random.default_rng(7).standard_normal((S, D)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rate = 1 / (np.arange(S) + 10.0) ** 0.8
    cumulative = np.cumsum(rate / rate.sum())
    rng = np.random.default_rng([seed, n])
    counts = rng.poisson(28, n)
    which = np.searchsorted(cumulative, rng.random(counts.sum()))
    size = (1 + np.abs(rng.standard_normal(len(which)))).astype(np.float32)
    codes = scipy.sparse.csr_matrix((size, which.clip(0, S - 1), np.concatenate([[0], np.cumsum(counts)])), (n, S))
    return np.asarray(codes @ directions, dtype=np.float32)


Step = Callable[[Any], Any]


def median(values: Iterable[float]) -> float:
    """The one in the middle, of an even number the mean of the two."""
    return statistics.median(values)


def ours(architecture: Any) -> tuple[Step, Any]:
    """Our training step of one architecture."""
    from millpond.analysis.sae.config import SaeConfig
    from millpond.analysis.sae.trainer import Trainer

    trainer = Trainer(SaeConfig(S, K, architecture=architecture, batch_size=BATCH, lr=LR, warmup=0, decay=0), D, 10**6)
    return trainer.step, trainer


def systems(x0: Any) -> dict[str, tuple[Step, Any]]:
    """Each system's training step and the object whose weights it trains."""
    import torch

    made = {f"millpond {name}": ours(name) for name in ("batchtopk", "topk", "matryoshka")}
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        LoggingConfig,
        SAETrainer,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig

    def saelens(sae: Any) -> tuple[Step, Any]:
        config = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=BATCH,
            lr=LR,
            lr_end=LR,
            autocast=False,
            logger=LoggingConfig(log_to_wandb=False),
        )
        trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

        def step(x: Any) -> None:
            trainer.step(x)
            trainer.n_training_steps += 1

        return step, trainer

    made["sae-lens batchtopk"] = saelens(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=S, k=float(K))))
    made["sae-lens topk"] = saelens(TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=S, k=K)))
    made["dictionary_learning batchtopk"] = dictionary_learning()
    from sparsify import SaeConfig as SparsifyConfig
    from sparsify import SparseCoder

    coder = SparseCoder(D, SparsifyConfig(num_latents=S, k=K))
    coder.b_dec.data = x0.mean(0)
    adam = torch.optim.Adam(coder.parameters(), lr=LR)

    def sparsify_step(x: Any) -> None:  # the body of sparsify's Trainer
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    made["sparsify topk"] = (sparsify_step, coder)
    return made


def dictionary_learning() -> tuple[Step, Any]:
    """Its BatchTopK trainer."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    trainer = BatchTopKTrainer(
        steps=10**6, activation_dim=D, dict_size=S, k=K, layer=0, lm_name="x", lr=LR, warmup_steps=WARMUP,
        device="cpu", seed=0,
    )  # fmt: skip
    done = [0]

    def step(x: Any) -> None:
        trainer.update(done[0], x)
        done[0] += 1

    return step, trainer


def compare_steps(batches: list[Any], rounds: int) -> dict[str, list[float]]:
    """Median CPU seconds of a step of each system in each of some rounds, in which they take turns."""
    found = systems(batches[0])
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, (step, _) in found.items():
            each = []
            for x in batches if name.startswith("millpond") else batches[:2]:
                started = time.process_time()
                step(x)
                each.append(time.process_time() - started)
            if number:  # the first compiles, and allocates
                times[name].append(median(each))
    return times


def compare_with_product(batches: list[Any], rounds: int) -> dict[str, float]:
    """Our BatchTopK step after step in turn with the encoder's bfloat16 product alone, on one thread.

    `fraction` is the median, over the turns, of the CPU seconds of the product over those of the step. The product is
    written into memory that is there and holds what the machine can do; `fresh` is the same with 33 MB of new memory
    for each, as one writes it without care, of which the system's clearing of pages is as large a part, and an unsteady one.
    """
    import torch

    step, _ = ours("batchtopk")
    encoder, half = torch.randn(S, D).bfloat16(), batches[0].bfloat16()
    out = torch.empty(BATCH, S, dtype=torch.bfloat16)

    def seconds(call: Callable[[], Any]) -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    turns = []
    for number in range(rounds + 2):
        for x in batches:
            turn = (
                seconds(lambda x=x: step(x)),
                seconds(lambda: torch.mm(half, encoder.T, out=out)),
                seconds(lambda: torch.mm(half, encoder.T)),
            )
            if number > 1:
                turns.append(turn)
    return {
        "step": median([turn[0] for turn in turns]),
        "product": median([turn[1] for turn in turns]),
        "product, fresh": median([turn[2] for turn in turns]),
        "fraction": median([turn[1] / turn[0] for turn in turns]),
        "fresh": median([turn[2] / turn[0] for turn in turns]),
    }


def fvu_at_k(x: Any, w_enc: Any, b_enc: Any, w_dec: Any, b_dec: Any) -> float:
    """Held-out FVU with exactly K * rows latents of each batch: dictionaries at equal L0, whatever their threshold."""
    import torch

    squared = 0.0
    with torch.no_grad():
        for part in x.split(BATCH):
            acts = ((part - b_dec) @ w_enc + b_enc).relu()
            cut = acts.flatten().topk(K * len(part)).values.min()
            squared += float(((acts * (acts >= cut)) @ w_dec + b_dec - part).square().sum())
    return squared / float((x - x.mean(0)).square().sum())


def compare_quality(train: Any, test: Any, steps: int) -> dict[str, float]:
    """FVU after the same number of steps on the same batches, and L0 at our exported threshold."""
    import numpy as np
    import torch

    from millpond.analysis import BatchTopKSae

    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train)))
    batches = [train[part] for part in order.split(BATCH)]
    step, trainer = dictionary_learning()
    torch.manual_seed(0)
    for number in range(steps):
        step(batches[number % len(batches)].clone())
    ae = trainer.ae
    theirs = fvu_at_k(test, ae.encoder.weight.T, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec)
    sae = BatchTopKSae(S, K, batch_size=BATCH, lr=LR, warmup=WARMUP / steps, decay=0, n_threads=1, progress=False)
    sae.fit((batches[number % len(batches)].numpy() for number in range(steps)), tokens=steps * BATCH)
    ours = fvu_at_k(test, *(torch.from_numpy(w) for w in (sae.W_enc_, sae.b_enc_, sae.W_dec_, sae.b_dec_)))
    l0 = float((sae.encode(test.numpy()) > 0).sum() / len(test))
    return {"ours": ours, "theirs": theirs, "l0": l0}


def make_lake(folder: Path, x: Any) -> Any:
    """A sealed run of the rows, float32 so that the bytes are those in memory."""
    import numpy as np
    import pandas as pd

    from millpond.store.lake import open_lake
    from millpond.store.seal import seal_run
    from millpond.store.segment import CapturedRequest, RunWriter

    lake = open_lake(folder, create=True)
    hook = "blocks.0.hook_resid_post"
    spec = lake.create_run("planted", hooks=(hook,), d_model=D, dtype="float32", provenance={"model": "planted"})
    writer = RunWriter(lake.run_folder("planted"), spec)
    rows, ids = 1024, []
    for number, start in enumerate(range(0, len(x), rows)):
        part = x[start : start + rows]
        ids.append(f"p{number}")
        tokens = np.zeros(len(part), np.int32)
        writer.append(CapturedRequest(ids[-1], tokens, len(part), np.arange(len(part), dtype=np.int32), {hook: part}))
    writer.commit()
    return seal_run(
        lake.run_folder("planted"), prompts=pd.DataFrame({"id": ids}), token_labels={}, token_label_dtypes={}
    )


def train_seconds(X: Any, steps: int, **options: Any) -> tuple[float, float]:
    """CPU seconds of all threads, and wall seconds, of a training of `steps` steps, with all it does before and after."""
    from millpond.analysis import BatchTopKSae

    cpu, wall = time.process_time(), time.perf_counter()
    sae = BatchTopKSae(S, K, batch_size=BATCH, n_threads=1, progress=False, lr=LR, **options)
    sae.fit(X, tokens=steps * BATCH, epochs=100)
    return time.process_time() - cpu, time.perf_counter() - wall


def lake_over_ram(run: Any, x: Any, steps: int, rounds: int) -> tuple[float, float]:
    """Training from the lake over training from memory, by CPU seconds and by wall time; medians over the rounds.

    A round is lake, memory, memory, lake, so that a drift of the machine falls on both. The CPU seconds are those of all
    threads, the reading one included, which wall time hides where a second core is idle. The buffer holds an eighth
    of the rows.
    """
    rows, options = run["blocks.0.hook_resid_post"], {"buffer_bytes": x.nbytes // 8}
    train_seconds(rows, 4, **options)  # imports, compiled loops, the page cache
    train_seconds(x, 4)
    ratios = []
    for _ in range(rounds):
        first = train_seconds(rows, steps, **options)
        memory = train_seconds(x, steps), train_seconds(x, steps)
        last = train_seconds(rows, steps, **options)
        ratios.append([(first[i] + last[i]) / (memory[0][i] + memory[1][i]) for i in (0, 1)])
    return median(cpu for cpu, _ in ratios), median(wall for _, wall in ratios)


def stream_rates(run: Any, x: Any, folder: Path, rounds: int) -> tuple[float, float, float]:
    """Rows a CPU second of `run.stream` and of SAELens' cached ActivationsStore over the same rows, in turn.

    Medians, and the median of their ratios. Both mix 65,536 rows, and both count from their second batch on.
    """
    import numpy as np
    import torch
    from datasets import Array2D, Dataset, Features, Sequence, Value, disable_progress_bars
    from sae_lens import ActivationsStore
    from sae_lens.cache_activations_runner import CacheActivationsRunner

    disable_progress_bars()
    context, name = 128, "blocks.0.hook_resid_post"
    features = Features(
        {name: Array2D(shape=(context, D), dtype="float32"), "token_ids": Sequence(Value("int32"), length=context)}
    )
    blocks = torch.from_numpy(np.asarray(x)).view(-1, context, D)
    cached = Dataset.from_dict(
        {name: blocks, "token_ids": torch.zeros(len(blocks), context, dtype=torch.int32)}, features=features
    )
    out = folder / "saelens"
    cached.save_to_disk(str(out / ".tmp_shards" / "shard_00000"), num_shards=1)
    CacheActivationsRunner._consolidate_shards(out / ".tmp_shards", out, copy_files=False)

    def rate(batches: Iterator[Any], count: int) -> float:
        next(batches)
        started, taken = time.process_time(), 0
        for _ in range(count):
            taken += len(next(batches))
        return taken / (time.process_time() - started)

    rates = []
    for _ in range(rounds):
        stream = run.stream(name, BATCH, buffer_rows=65_536)
        found = rate(stream, 2 * len(x) // BATCH)
        store = ActivationsStore(
            model=None, dataset=None, streaming=False, hook_name=name, hook_head_index=None, context_size=context, d_in=D,
            n_batches_in_buffer=65_536 // context, total_training_tokens=len(x), store_batch_size_prompts=32,
            train_batch_size_tokens=BATCH, prepend_bos=False, normalize_activations="none", device=torch.device("cpu"),
            dtype="float32", cached_activations_path=str(out),
        )  # fmt: skip
        rates.append((found, rate(store, len(x) // BATCH - 4)))  # on past its first buffer
    return median(r[0] for r in rates), median(r[1] for r in rates), median(r[0] / r[1] for r in rates)


class WorkerRates(NamedTuple):
    """What two workers of one thread gain, each figure the median over rounds of two such rates over that of one."""

    one: float
    """Tokens a second of wall time with one worker."""
    together: float
    """Two workers that train one autoencoder, by wall time."""
    unrelated: float
    """Two trainings at once that know nothing of each other, added up, by wall time: what the machine gives."""
    by_cpu: float
    """As `together`, by CPU seconds of the workers: what the exchange costs to compute, without what it waits."""


def worker_rates(run: Any, steps: int, rounds: int) -> WorkerRates:
    """One, two, and two unrelated trainings take turns on Dask workers that stay up.

    Each worker takes a batch of the same size, so two do twice the work a step. Wall time runs from the fifth step to the
    last, so that start, compiled loops, the first chunks and the threshold at the end are outside; CPU seconds are
    those of the workers' processes over a whole training, less those of a training of 5 steps.
    """
    from distributed import Client, LocalCluster

    from millpond.analysis import BatchTopKSae

    rows = run["blocks.0.hook_resid_post"]
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def cluster(workers: int) -> Any:
            made = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
            return stack.enter_context(Client(stack.enter_context(made), set_as_default=False))

        alone, other, pair = cluster(1), cluster(1), cluster(2)

        def fit(client: Any, count: int) -> tuple[float, float]:
            """Tokens a second of wall time, and CPU seconds of the workers."""
            workers, folder = len(client.scheduler_info(n_workers=-1)["workers"]), tempfile.mkdtemp(dir=out)
            before = sum(client.run(time.process_time).values())
            sae = BatchTopKSae(S, K, batch_size=BATCH, lr=LR, n_threads=1, log_every=5, checkpoint_every=10**6)
            sae.fit(rows, tokens=count * BATCH * workers, epochs=100, client=client, out=folder)
            spent = sum(client.run(time.process_time).values()) - before
            lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
            return _later_rate(lines) if count > 5 else 0.0, spent

        for client in (alone, other, pair):
            fit(client, 2)  # imports, compiled loops, the page cache
        found = []
        for _ in range(rounds):
            short = fit(alone, 5)[1], fit(pair, 5)[1]
            first, together = fit(alone, steps), fit(pair, steps)
            with ThreadPoolExecutor(2) as pool:
                unrelated = list(pool.map(lambda client: fit(client, steps)[0], (alone, other)))
            again, last = fit(pair, steps), fit(alone, steps)
            one = (first[0] + last[0]) / 2
            cpu = (first[1] + last[1]) / 2 - short[0], (together[1] + again[1]) / 2 - short[1]
            found.append((one, (together[0] + again[0]) / 2 / one, sum(unrelated) / one, 4 * cpu[0] / cpu[1]))
    return WorkerRates(*(median(each) for each in zip(*found, strict=True)))


def _later_rate(lines: list[dict[str, float]]) -> float:
    """Tokens a second from the first to the last line."""
    seconds = [line["tokens"] / line["tokens_per_second"] for line in (lines[0], lines[-1])]
    return (lines[-1]["tokens"] - lines[0]["tokens"]) / (seconds[1] - seconds[0])


def growth(run: Any, most: int) -> list[tuple[int, float, float]]:
    """Tokens, CPU seconds and resident GB on the way to `most` tokens of a small autoencoder over the lake."""
    from millpond.analysis.sae.config import SaeConfig
    from millpond.analysis.sae.fit import Learner, train
    from millpond.analysis.sae.together import SourceSpec

    marks = [mark for mark in (1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000) if mark <= most]
    config = SaeConfig(256, 8, batch_size=BATCH, lr=LR, n_threads=1, buffer_bytes=64 << 20)
    spec = SourceSpec([run["blocks.0.hook_resid_post"]], config)
    found = []
    source, started = spec.open(), time.process_time()
    seen, batches = 0, source.batches

    def counted(step: int) -> Iterator[Any]:
        nonlocal seen
        for batch in batches(step):
            seen += BATCH
            if len(found) < len(marks) and seen >= marks[len(found)]:
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9
                found.append((seen, time.process_time() - started, resident))
            yield batch

    source.batches = counted  # type: ignore[method-assign]
    train(source, [Learner("", config, (0,))], marks[-1] + BATCH, None, progress=False)
    return found


def exponent(points: list[tuple[int, float, float]]) -> float:
    """Power b of CPU seconds ~ tokens**b, by least squares over the logarithms."""
    xs, ys = [math.log(p[0]) for p in points], [math.log(p[1]) for p in points]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def estimate_gpu() -> str:
    """What one H100 needs for 500M tokens of d_in 4096, d_sae 65,536, BatchTopK 64, batch 8192; not measured."""
    d_in, d_sae, k, batch, tokens = 4096, 65_536, 64, 8192, 500_000_000
    gemm = 2 * d_in * d_sae / 400e12
    select = 3 * 2 * d_sae / 2.0e12
    gather = 5 * 4 * k * d_in / 1.0e12
    update = 8 * 4 * 2 * d_in * d_sae / 2.0e12 / batch
    token = gemm + select + gather + update
    return (
        "No GPU was at hand; an estimate for one H100, d_in 4096, d_sae 65,536, BatchTopK 64, batch 8,192, in microseconds a "
        f"token: encoder 2 * 4096 * 65,536 FLOP at 400 TFLOP/s (990 on the data sheet) {1e6 * gemm:.2f}; selection, the "
        "65,536 bfloat16 products written, compared and scanned, 3 * 2 * 65,536 bytes at 2 TB/s (of 3.35) "
        f"{1e6 * select:.2f}; exact values, decoder, slopes and two weight gradients, 5 * 64 rows of 4 * 4096 bytes at "
        f"1 TB/s {1e6 * gather:.2f}; gradients, norms and Adam, 8 passes over 2 * 4096 * 65,536 float32 a batch at 2 TB/s "
        f"{1e6 * update:.2f}. Together {1e6 * token:.2f}: {1 / token:,.0f} tokens/s, 500M tokens in "
        f"{tokens * token / 3600:.1f} h, {gemm / token:.0%} of the GEMM at that rate."
    )


def measure(quick: bool) -> tuple[list[str], dict[str, float]]:
    """Everything; lines of Markdown and the figures."""
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    n = 262_144 if quick else 1_048_576
    x, test = planted(n, 1), torch.from_numpy(planted(16_384, 2))
    rows = torch.from_numpy(x)
    lines = ["| system | CPU ms/step | tokens/s/core | millpond is |", "|-|-|-|-|"]
    batches = [rows[i * BATCH : (i + 1) * BATCH].clone() for i in range(4)]
    product = compare_with_product(batches, 8 if quick else 20)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        seconds = compare_steps(batches, 4 if quick else 10)
    speedups = {}
    for name, each in seconds.items():
        base = seconds["millpond topk" if "topk" in name.split() else "millpond batchtopk"]
        speedups[name] = median(theirs / our for theirs, our in zip(each, base, strict=True))
        times = "" if name.startswith("millpond") else f"{speedups[name]:.1f}x"
        lines.append(f"| {name} | {1e3 * median(each):.1f} | {BATCH / median(each):,.0f} | {times} |")
    lines += [
        "",
        f"In turn with the encoder's bfloat16 product, a step of BatchTopK {1e3 * product['step']:.1f} ms, the product "
        f"{1e3 * product['product']:.1f} ms ({BATCH / product['product']:,.0f} tokens/s), into fresh memory "
        f"{1e3 * product['product, fresh']:.1f} ms; medians of the ratios {product['fraction']:.3f} and {product['fresh']:.3f}.",
    ]
    steps = 48 if quick else 256
    quality = compare_quality(rows, test, steps)
    lines.append("")
    lines.append(
        f"FVU at exactly k = {K} after {steps} steps: {quality['ours']:.4f}, dictionary_learning {quality['theirs']:.4f}; "
        f"L0 at the exported threshold on held-out rows: {quality['l0']:.2f}."
    )
    with tempfile.TemporaryDirectory() as folder:
        run = make_lake(Path(folder) / "lake", x)
        cpu, wall = lake_over_ram(run, x, 128 if quick else 256, 3 if quick else 5)
        stream, saelens, times = stream_rates(run, x[:262_144], Path(folder), 3 if quick else 5)
        workers = worker_rates(run, 30 if quick else 100, 3)
        points = growth(run, 5_000_000 if quick else 20_000_000)
    lines += [
        f"Training from the lake over training from memory, CPU seconds of all threads: {cpu:.3f}; wall time: {wall:.3f}.",
        f"run.stream: {stream:,.0f} rows/s/core; SAELens' cached ActivationsStore on the same rows: {saelens:,.0f} "
        f"({times:.1f}x).",
        f"Dask workers of one thread: one {workers.one:,.0f} tokens a second of wall time, two {workers.together:.2f}x, two "
        f"trainings unrelated to each other {workers.unrelated:.2f}x; two by the workers' CPU seconds {workers.by_cpu:.2f}x.",
        "Tokens, CPU seconds, resident GB (d_sae 256): "
        + "; ".join(f"{tokens / 1e6:.0f}M {spent:.1f} s {memory:.2f} GB" for tokens, spent, memory in points)
        + ".",
        estimate_gpu(),
    ]
    figures = {
        "speedup_vs_saelens": speedups["sae-lens batchtopk"],
        "speedup_vs_dictionary_learning": speedups["dictionary_learning batchtopk"],
        "speedup_vs_sparsify": speedups["sparsify topk"],
        "gemm_fraction": product["fraction"],
        "gemm_fraction_fresh_memory": product["fresh"],
        "fvu_gap": quality["ours"] - quality["theirs"],
        "l0_error": abs(quality["l0"] - K) / K,
        "lake_over_ram": cpu,
        "lake_over_ram_wall": wall,
        "stream_vs_saelens": times,
        "two_workers": workers.together,
        "two_workers_by_cpu": workers.by_cpu,
        "two_unrelated": workers.unrelated,
        "growth_exponent": exponent(points),
    }
    return lines, {name: round(value, 4) for name, value in figures.items()}


def write_section(lines: list[str]) -> None:
    """Replace the section "SAE training" of docs/benchmarks.md."""
    path = ROOT / "docs" / "benchmarks.md"
    text = path.read_text() if path.exists() else "# Benchmarks\n"
    title = "## SAE training"
    before, _, after = text.partition(title)
    _, mark, rest = after.partition("\n## ")
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    head = f"`python benchmarks/sae.py`, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of {model}, one thread."
    path.write_text(
        before.rstrip() + f"\n\n{title}\n\n{head}\n\n" + "\n".join(lines) + "\n" + (mark + rest if mark else "")
    )


def main() -> None:
    """Measure, print, and with `--write` keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps and tokens, a few minutes")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    if Path(sys.prefix).resolve() != PEERS.resolve():
        python = make_environment()
        environment = os.environ | {
            "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        raise SystemExit(subprocess.run([str(python), __file__, *sys.argv[1:]], env=environment).returncode)
    lines, figures = measure(arguments.quick)
    print("\n".join(lines))
    if arguments.write:
        write_section(lines)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
