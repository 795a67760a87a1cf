import re
from pathlib import Path

import numpy as np
import pytest

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
    from millpond.store.manifest import LabelRecord, Manifest, Part, RunSpec

    text = DOCUMENT.read_text()
    for record in (RunSpec, Part, Manifest, LabelRecord):
        for field in record.model_fields:
            assert f"`{field}`" in text, field
