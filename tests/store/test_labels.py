import numpy as np
import pytest

from millpond.store.errors import InvalidInput, LabelNotFound, LakeCorrupt
from millpond.store.labels import label_dtype, write_token_label
from millpond.store.segment import RunWriter


def per_prompt(made, values):
    return {number: values[made.prompt == number] for number in range(len(made.lengths))}


@pytest.mark.parametrize("dtype", ["bool", "int64", "float32"])
def test_labels_added_after_sealing(sealed, dtype):
    values = (np.arange(172) % 5 - 2).astype(dtype)
    write_token_label(sealed.run.plan, "mine", per_prompt(sealed, values), dtype)
    run = sealed.run
    assert list(run.labels) == ["even", "mine", "source"]
    assert run.labels["mine"].dtype == dtype
    assert np.array_equal(run.labels["mine"].values, values)
    train, _ = run.split(0.5)
    rows = np.isin(sealed.prompt, train.prompts.index)
    assert np.array_equal(train.labels["mine"].values, values[rows])
    with pytest.raises(InvalidInput, match="label 'mine' exists in run 'made'; choose another name"):
        write_token_label(run.plan, "mine", per_prompt(sealed, values), dtype)


def test_a_refused_label_leaves_nothing(sealed):
    plan, values = sealed.run.plan, np.arange(172)
    short = per_prompt(sealed, values) | {4: np.arange(16)}
    with pytest.raises(InvalidInput, match="has 16 values for prompt number 4, whose rows reach position 16"):
        write_token_label(plan, "mine", short, "int64")
    for given, dtype in ((values, "bool"), (values * 0.5, "int64"), (values.astype(str), "int64")):
        with pytest.raises(InvalidInput, match=f"which {dtype} cannot hold"):
            write_token_label(plan, "mine", per_prompt(sealed, given), dtype)
    for name in ("", "a b", "../up", "é", "x" * 129, "1st"):
        with pytest.raises(InvalidInput, match="is not allowed"):
            write_token_label(plan, name, per_prompt(sealed, values), "int64")
    assert sorted(path.name for path in (sealed.folder / "labels").iterdir()) == ["even"]
    assert "mine" not in sealed.run.labels
    with pytest.raises(LabelNotFound, match="label 'mine' is not in run 'made', which has even, source"):
        sealed.run.labels["mine"]


def test_stored_types():
    names = {dtype: label_dtype("x", np.dtype(dtype)) for dtype in ("bool", "int8", "uint32", "float16", "float64")}
    assert names == {"bool": "bool", "int8": "int64", "uint32": "int64", "float16": "float32", "float64": "float32"}
    with pytest.raises(InvalidInput, match="use booleans, integers or floats"):
        label_dtype("x", np.dtype("U3"))


def test_a_label_of_an_open_run_does_not_pretend_to_grow(opened):
    write_token_label(opened.run.plan, "mine", per_prompt(opened, np.arange(172)), "int64")
    assert opened.run.labels["mine"].values[-1] == 171
    writer = RunWriter(opened.folder, opened.run.plan.spec)
    from millpond.store.segment import CapturedRequest

    rows = {hook: np.zeros((1, 4), np.uint16) for hook in opened.run.hooks}
    writer.append(CapturedRequest("late", np.array([1], np.int32), 1, np.array([0], np.int32), rows))
    writer.commit()
    with pytest.raises(
        LakeCorrupt, match=r"has 172 values, but run 'made' has 173 rows; .* add it again after sealing"
    ):
        opened.run.labels["mine"]
