import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.store import second_implementation as second
from tests.store.conftest import HOOKS

from millpond.store.compaction import compact
from millpond.store.objects import open_storage
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.verify import verify_run

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_snippet_opens_a_sealed_run_without_millpond(build, tmp_path, dtype):
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert "millpond." not in snippet
    made = build([5, 0, 40], dtype=dtype, folder=tmp_path / "lake")
    made.seal()
    names = {"run_folder": str(made.folder)}
    exec(snippet, names)
    assert np.array_equal(names["activations"], made.float32("blocks.0.hook_resid_post"))
    assert np.array_equal(names["tokens"], made.token_id)


def test_the_document_names_every_field():
    from millpond.store.configuration import LakeConfiguration
    from millpond.store.manifest import LabelRecord, Manifest, Part, RunSpec
    from millpond.store.retention import Retention
    from millpond.store.versions import VersionRecord

    text = DOCUMENT.read_text()
    for record in (RunSpec, Part, Manifest, LabelRecord, LakeConfiguration, Retention, VersionRecord):
        for field in record.model_fields:
            assert f"`{field}`" in text, field


def test_a_second_implementation_reads_and_writes_an_open_run(build, tmp_path):
    """It knows the document only: pages, commits behind them, an empty one, an id that was committed twice."""
    made = build([7, 0, 40, 13, 25], folder=tmp_path / "lake")
    compact(open_storage(made.folder))
    again = RunWriter(made.folder, made.lake.spec("made"), compact_every=0)
    rng = np.random.default_rng(5)
    late = {}
    for name, n in (("p2", 6), ("late", 33)):
        rows = {hook: rng.integers(0, 1 << 14, (n, 4), np.uint16) for hook in HOOKS}
        steps = np.arange(n, dtype=np.int32)
        again.append(CapturedRequest(name, steps, n, steps, rows))
        late[name] = rows
    again.commit()
    (made.folder / "commits" / f"{'f' * 32}.json").write_bytes(b"")
    ids, found = second.read_open_run(made.folder)
    assert ids == [*made.run.prompts["id"]] == ["p0", "p1", "p2", "p3", "p4", "late"]
    for hook in HOOKS:
        assert np.array_equal(found[hook], np.concatenate([made.stored[hook], late["late"][hook]]))

    prompts = pd.DataFrame({"id": ["theirs", "p0", "more"], "sha256": "0" * 64, "n_prompt_tokens": [50, 2, 9]})
    prompts = prompts.assign(n_tokens=prompts["n_prompt_tokens"], n_rows=prompts["n_prompt_tokens"])
    rows = {hook: rng.integers(0, 1 << 14, (61, 4), np.uint16) for hook in HOOKS}
    position = np.concatenate([np.arange(n) for n in prompts["n_rows"]])
    second.commit_segment(made.folder, f"{'f' * 31}0", prompts, rows, position, position * 3)
    ours = [*range(50), *range(52, 61)]  # p0 is taken
    run = made.run
    assert [*run.prompts["id"]] == [*ids, "theirs", "more"] == second.read_open_run(made.folder)[0]
    assert verify_run(run).problems == []
    for hook in HOOKS:
        assert np.array_equal(run.to_numpy(hook, "bfloat16").view(np.uint16)[-59:], rows[hook][ours])
        assert np.array_equal(second.read_open_run(made.folder)[1][hook][-59:], rows[hook][ours])
    assert np.array_equal(run.tokens["token_id"].values[-59:], position[ours] * 3)
    compact(open_storage(made.folder))
    assert [*made.run.prompts["id"]] == second.read_open_run(made.folder)[0]
    sealed = seal_run(made.folder)
    assert verify_run(sealed).problems == []
    assert sorted(sealed.prompts["id"]) == sorted([*ids, "theirs", "more"])
