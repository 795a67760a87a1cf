"""What a client sees of a run does not depend on what the model did."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from millpond.hub.body import decode, encode
from millpond.hub.policy import Disclosure
from millpond.hub.projection import project_run
from millpond.hub.shapes import Context
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

CONTEXT = Context(Disclosure(), restricted=True)


def make(folder, *, lengths, generated, max_new_tokens, seal=True):
    lake = open_lake(folder, create=True)
    provenance = {"model": "secret/path", "weights_sha256": {"a": "0" * 64}, "fingerprint": "f"}
    provenance["capture"] = {"capture": {"max_new_tokens": max_new_tokens}}
    spec = lake.create_run("r", hooks=("blocks.0.hook_resid_post",), d_model=4, dtype="float32", provenance=provenance)
    writer = RunWriter(lake.run_folder("r"), spec)
    rng = np.random.default_rng(len(lengths))
    for number, (n, more) in enumerate(zip(lengths, generated, strict=True)):
        rows = rng.standard_normal((n + more, 4)).astype(np.float32)
        tokens = rng.integers(0, 9, n + more).astype(np.int32)
        positions = np.arange(n + more, dtype=np.int32)
        writer.append(CapturedRequest(f"p{number}", tokens, n, positions, {"blocks.0.hook_resid_post": rows}))
    writer.commit()
    if seal:
        table = pd.DataFrame({"id": [f"p{i}" for i in range(len(lengths))]})
        seal_run(lake.run_folder("r"), prompts=table, expected_rows=sum(lengths) + sum(generated))
    return lake["r"]


def view(run):
    return encode(project_run(run, handle=b"12345678", name="mine", model="m"), CONTEXT)


@pytest.mark.parametrize("seal", [True, False])
def test_what_was_generated_changes_nothing_that_a_client_sees(tmp_path, seal):
    one = view(make(tmp_path / "a", lengths=[3, 5], generated=[1, 7], max_new_tokens=8, seal=seal))
    other = view(make(tmp_path / "b", lengths=[3, 5], generated=[8, 2], max_new_tokens=8, seal=seal))
    assert one == other


def test_a_run_without_generation_shows_its_rows_when_it_is_sealed(tmp_path):
    sealed = decode(view(make(tmp_path / "a", lengths=[3, 5], generated=[0, 0], max_new_tokens=0)))
    assert (sealed.rows, sealed.prompts, sealed.state) == (8, 2, "sealed")
    run = make(tmp_path / "b", lengths=[3, 5], generated=[0, 0], max_new_tokens=0, seal=False)
    assert (decode(view(run)).rows, decode(view(run)).prompts) == (None, None)


def test_checksums_paths_and_provenance_are_not_in_it(tmp_path):
    found = json.loads(view(make(tmp_path / "a", lengths=[3], generated=[0], max_new_tokens=0))[1:])
    assert set(found) == {
        "handle", "name", "state", "model", "hooks", "d_model", "dtype", "prompts", "rows", "labels", "columns",
    }  # fmt: skip
    assert found["columns"] == ["id", "n_prompt_tokens", "n_rows", "n_tokens"]
    assert found["model"] == "m"
    assert "secret" not in json.dumps(found)
