import importlib.util
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from millpond.store.dtypes import STORED_AS
from millpond.store.lake import Lake, open_lake
from millpond.store.objects import open_storage
from millpond.store.run import Run
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")

_SPEC = importlib.util.spec_from_file_location("s3_server", Path(__file__).parents[2] / "tools" / "s3_server.py")
s3_server = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(s3_server)


class S3:
    """A running S3 server with a bucket."""

    bucket = "lakes"

    def __init__(self, kind, folder):
        self.folder = folder
        self.environment = s3_server.start(kind, folder)
        s3_server.make_bucket(self.environment, self.bucket)

    def options(self, endpoint=None):
        names = {"AWS_ENDPOINT_URL": "endpoint_url", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        options = {names[name]: value for name, value in self.environment.items() if name in names}
        return options | ({"endpoint_url": endpoint} if endpoint else {})

    def url(self, prefix):
        return f"s3://{self.bucket}/{prefix}"

    def kill_gateway(self):
        s3_server.kill(self.folder, "rgw", 9)

    def start_gateway(self):
        s3_server.start_gateway(self.folder)

    def storage(self, prefix, endpoint=None, **more):
        return open_storage(self.url(prefix), **self.options(endpoint), **more)


@pytest.fixture(scope="session")
def ceph(tmp_path_factory):
    server = S3("ceph", tmp_path_factory.mktemp("ceph") / "server")
    yield server
    s3_server.stop(server.folder)


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory):
    server = S3("seaweedfs", tmp_path_factory.mktemp("seaweedfs") / "server")
    yield server
    s3_server.stop(server.folder)


@dataclass
class Made:
    """A run together with everything that was put into it, kept apart from Millpond."""

    lake: Lake
    folder: Path
    stored: dict[str, np.ndarray]
    """Hook to rows as stored."""
    prompt: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    even: dict[str, np.ndarray]
    """Token label: prompt id to one boolean a token."""
    lengths: list[int]
    table: pd.DataFrame

    @property
    def run(self) -> Run:
        return self.lake["made"]

    def float32(self, hook: str) -> np.ndarray:
        """The rows of `hook` decoded with torch, not with Millpond."""
        import torch

        stored = self.stored[hook]
        if stored.dtype == np.uint16:
            return torch.from_numpy(stored.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
        return stored.astype(np.float32)

    def seal(self) -> Run:
        run = self._seal()
        self._reorder([int(name[1:]) for name in run.prompts["id"]])
        return run

    def _reorder(self, order) -> None:
        """Sealing keeps whole shards in front; the prompts, once in the order of their numbers, follow."""
        if not hasattr(self, "as_captured"):
            self.as_captured = (self.stored, self.token_id, self.position, self.lengths, self.table)
        stored, token_id, position, lengths, table = self.as_captured
        self.table = table.iloc[order].reset_index(drop=True)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
        rows = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in order] or [np.empty(0, int)])
        self.stored = {hook: values[rows] for hook, values in stored.items()}
        self.token_id, self.position = token_id[rows], position[rows]
        self.lengths = [lengths[number] for number in order]
        self.prompt = np.repeat(np.arange(len(order)), self.lengths)

    def _seal(self) -> Run:
        return seal_run(
            self.folder,
            prompts=self.table,
            prompt_labels=("source",),
            token_labels={"even": self.even},
            token_label_dtypes={"even": "bool"},
            expected_rows=len(self.prompt),
        )


def make(
    lengths, *, dtype="bfloat16", chunk_rows=8, shard_rows=32, segment_rows=50, d_model=4, folder=None, seed=0, **run
):
    """An open run with a prompt of each length, all positions captured; seal it with `.seal()`."""
    lake = open_lake(folder or Path(tempfile.mkdtemp()) / "lake", create=True)
    spec = lake.create_run(
        "made",
        hooks=HOOKS,
        d_model=d_model,
        dtype=dtype,
        provenance={"model": "toy"},
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
        **run,
    )
    writer = RunWriter(lake.run_folder("made"), spec, segment_rows=segment_rows)
    rng = np.random.default_rng(seed)
    rows = {hook: [np.empty((0, d_model), STORED_AS[dtype])] for hook in HOOKS}
    tokens, even = [], {}
    for number, n in enumerate(lengths):
        token_ids = rng.integers(0, 1000, n).astype(np.int32)
        acts = rng.standard_normal((len(HOOKS), n, d_model)).astype(np.float32)
        # finite bfloat16 bits straight from float32's upper half
        acts = (acts.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else acts.astype(dtype)
        for hook, values in zip(HOOKS, acts, strict=True):
            rows[hook].append(values)
        tokens.append(token_ids)
        even[f"p{number}"] = token_ids % 2 == 0
        writer.append(
            CapturedRequest(
                f"p{number}", token_ids, n, np.arange(n, dtype=np.int32), dict(zip(HOOKS, acts, strict=True))
            )
        )
    writer.commit()
    return Made(
        lake=lake,
        folder=lake.run_folder("made"),
        stored={hook: np.concatenate(values) for hook, values in rows.items()},
        prompt=np.repeat(np.arange(len(lengths)), lengths),
        position=np.concatenate([np.arange(n) for n in lengths]) if lengths else np.empty(0, int),
        token_id=np.concatenate(tokens) if tokens else np.empty(0, np.int32),
        even=even,
        lengths=list(lengths),
        table=pd.DataFrame(
            {"id": [f"p{i}" for i in range(len(lengths))], "source": [f"s{i % 3}" for i in range(len(lengths))]}
        ),
    )


LENGTHS = (5, 0, 1, 30, 17, 8, 0, 64, 3, 12, 9, 1, 22)


@pytest.fixture(scope="session")
def build():
    return make


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """The runs of `opened` and `sealed`, made once: copying them needs no syncs."""
    folder = tmp_path_factory.mktemp("templates")
    made = {state: make(LENGTHS, folder=folder / state) for state in ("open", "sealed")}
    made["sealed"].seal()
    return made


def copy(made, folder):
    shutil.copytree(made.lake.folder, folder)
    lake = open_lake(folder)
    return replace(made, lake=lake, folder=lake.run_folder("made"))


@pytest.fixture
def opened(templates, tmp_path):
    """An open run of 13 prompts and 172 rows, of which two prompts have none."""
    return copy(templates["open"], tmp_path / "lake")


@pytest.fixture
def sealed(templates, tmp_path):
    """The same run, sealed."""
    return copy(templates["sealed"], tmp_path / "lake")
