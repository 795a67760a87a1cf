import hashlib

import numpy as np
import pandas as pd
import pytest

from millpond.store.errors import LakeCorrupt
from millpond.store.objects import open_storage
from millpond.store.prompts import read_prompt_table


def test_the_table_says_what_was_captured(sealed):
    table = sealed.run.prompts
    assert table["id"].tolist() == [f"p{i}" for i in range(13)]
    assert table["n_rows"].tolist() == table["n_tokens"].tolist() == sealed.lengths
    tokens = sealed.token_id[sealed.prompt == 3]
    assert table["sha256"][3] == hashlib.sha256(np.array(tokens, "<i4").tobytes()).hexdigest()
    assert table["source"].tolist() == sealed.table["source"].tolist()
    # any Parquet reader opens it
    path = sealed.folder / sealed.run.manifest.data.path / "prompts.parquet"
    assert pd.read_parquet(path)["n_rows"].sum() == 172


def test_damage_is_named(tmp_path):
    with pytest.raises(LakeCorrupt, match=r"prompts.parquet is missing"):
        read_prompt_table(open_storage(tmp_path))
    (tmp_path / "prompts.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(LakeCorrupt, match=r"prompts.parquet is no Parquet file"):
        read_prompt_table(open_storage(tmp_path))
    pd.DataFrame({"id": ["a"]}).to_parquet(tmp_path / "prompts.parquet")
    with pytest.raises(LakeCorrupt, match=r"has no column 'sha256'"):
        read_prompt_table(open_storage(tmp_path))
