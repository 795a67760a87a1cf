from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from millpond.store.errors import InvalidInput, LabelNotFound, LakeCorrupt
from millpond.store.labels import label_dtype, write_token_label
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

N = 13


def per_prompt(made, values):
    return {number: values[made.prompt == number] for number in range(len(made.lengths))}


@pytest.mark.parametrize("dtype", ["bool", "int64", "float32"])
def test_labels_of_the_capture_are_versions_too(sealed, dtype):
    values = (np.arange(172) % 5 - 2).astype(dtype)
    assert write_token_label(sealed.run.plan, "mine", per_prompt(sealed, values), dtype) == 1
    run = sealed.run
    assert list(run.labels) == ["even", "mine", "source"]
    assert run.labels["mine"].dtype == dtype
    assert np.array_equal(run.labels["mine"].values, values)
    train, _ = run.split(0.5)
    rows = np.isin(sealed.prompt, train.prompts.index)
    assert np.array_equal(train.labels["mine"].values, values[rows])
    assert write_token_label(run.plan, "mine", per_prompt(sealed, values[::-1]), dtype) == 2
    assert np.array_equal(sealed.run.labels["mine"].values, values[::-1])
    assert np.array_equal(sealed.run.labels["mine@1"].values, values)


def test_refused_labels_leave_nothing(sealed):
    plan, values = sealed.run.plan, np.arange(172)
    short = per_prompt(sealed, values) | {4: np.arange(16)}
    with pytest.raises(InvalidInput, match="has 16 values for prompt number 4, whose rows reach position 16"):
        write_token_label(plan, "mine", short, "int64")
    for given, dtype in ((values, "bool"), (values * 0.5, "int64"), (values.astype(str), "int64")):
        with pytest.raises(InvalidInput, match=f"which {dtype} cannot hold"):
            write_token_label(plan, "mine", per_prompt(sealed, given), dtype)
    for name in ("", "a b", "../up", "é", "x" * 129, "1st", "a@1", "prompt"):
        with pytest.raises(InvalidInput, match=r"is not allowed|is that of a row coordinate"):
            sealed.run.labels.add(name, np.arange(172))
    assert sorted(sealed.run.labels) == ["even", "source"]
    with pytest.raises(LabelNotFound, match=r"'mine' is not in run 'made', which has even, source; name one of these$"):
        sealed.run.labels["mine"]
    with pytest.raises(LabelNotFound, match="or make a label of that column"):
        sealed.run.labels["n_tokens"]
    assert sealed.run.labels.add("n_tokens", sealed.run.prompts[["id", "n_tokens"]]) == 1  # as that error says


def test_stored_types():
    names = {dtype: label_dtype("x", np.dtype(dtype)) for dtype in ("bool", "int8", "uint32", "float16", "float64")}
    assert names == {"bool": "bool", "int8": "int64", "uint32": "int64", "float16": "float32", "float64": "float32"}
    with pytest.raises(InvalidInput, match="use booleans, integers or floats"):
        label_dtype("x", np.dtype("U3"))


SCORE = np.linspace(-1, 1, N).astype(np.float32)


def prompt_inputs(made, folder):
    ids = [f"p{i}" for i in range(N)]
    frame = pd.DataFrame({"id": ids, "score": SCORE}).sample(frac=1, random_state=1)
    frame.to_parquet(folder / "scores.parquet")
    return {
        "array": SCORE,
        "series by id": frame.set_index("id")["score"],
        "series by number": pd.Series(SCORE)[::-1],
        "mapping": dict(zip(frame["id"], frame["score"], strict=True)),
        "frame": frame,
        "parquet": folder / "scores.parquet",
    }


def token_inputs(made, values, folder):
    lists = {f"p{i}": values[made.prompt == i] for i in range(N)}
    long = pd.DataFrame({"id": [f"p{i}" for i in made.prompt], "position": made.position, "score": values})
    long.sample(frac=1, random_state=2).to_parquet(folder / "tokens.parquet")
    lists_frame = pd.DataFrame({"id": lists.keys(), "score": lists.values()})
    return {"array": values, "mapping": lists, "lists": lists_frame, "long": folder / "tokens.parquet"}


@pytest.mark.parametrize("state", ["open", "sealed"])
@pytest.mark.parametrize("by", ["prompt", "token"])
def test_every_form_of_input_gives_the_same_label(request, tmp_path, state, by):
    made = request.getfixturevalue({"open": "opened"}.get(state, state))
    run = made.run
    if by == "prompt":
        forms, expected = prompt_inputs(made, tmp_path), SCORE[made.prompt]
    else:
        expected = np.random.default_rng(0).standard_normal(172).astype(np.float32)
        forms = token_inputs(made, expected, tmp_path)
    for number, (form, values) in enumerate(forms.items(), 1):
        assert run.labels.add("score", values, source=form) == number
        assert np.array_equal(run.labels["score"].values, expected), form
        assert np.array_equal(made.run.labels["score"].values, expected), form
    assert run.labels.versions("score") == tuple(range(1, len(forms) + 1))
    assert made.run.labels.token_labels.count("score") == (by == "token")
    view = run.select(where="score > 0.25", position=slice(1, None))
    kept = (expected > 0.25) & (made.position >= 1)
    assert np.array_equal(view.labels["score"].values, expected[kept])


def test_a_derived_label_from_a_label(sealed):
    run = sealed.run
    run.labels.add("odd", ~run.labels["even"])
    assert np.array_equal(run.labels["odd"].values, sealed.token_id % 2 == 1)


def test_text_and_versions_of_a_captured_label(sealed):
    run = sealed.run
    run.labels.add("source", [f"new{i}" for i in range(N)])
    assert run.labels.versions("source") == (0, 1)
    assert run.labels["source"].values.tolist() == [f"new{i}" for i in sealed.prompt]
    assert run.labels["source@0"].values.tolist() == [f"s{i % 3}" for i in sealed.prompt]
    assert list(run.labels) == ["even", "source"]
    with pytest.raises(LabelNotFound, match="no version 2 in run 'made'; it has 0, 1"):
        run.labels["source@2"]


def grow(made):
    writer = RunWriter(made.folder, made.run.plan.spec)
    rows = {hook: np.zeros((1, 4), np.uint16) for hook in made.run.hooks}
    writer.append(CapturedRequest("late", np.array([1], np.int32), 1, np.array([0], np.int32), rows))
    writer.commit()


def test_labels_of_an_open_run_survive_growth_and_sealing(opened):
    tokens = np.arange(172)
    opened.run.labels.add("token", tokens)
    opened.run.labels.add("each", np.arange(N))
    first = opened.run
    grow(opened)
    run = opened.run
    assert np.array_equal(first.labels["token"].values, tokens)
    for name in ("token", "each"):
        with pytest.raises(InvalidInput, match=f"{name!r} has no value for prompt 'late' .1 such prompts"):
            run.labels[name]
        with pytest.raises(InvalidInput, match="no value for prompt 'late'"):
            run.select(where=f"{name} > 3")
    covered = run.select(run.labels.covers("token"))
    assert np.array_equal(covered.labels["token"].values, tokens)
    sealed = seal_run(opened.folder)
    covered = sealed.select(sealed.labels.covers("token"))
    by_row = {
        (int(made_p), int(pos)): value
        for made_p, pos, value in zip(opened.prompt, opened.position, tokens, strict=True)
    }
    found = covered.tokens.compute()
    names = sealed.prompts["id"].loc[found["prompt"].values]
    keys = [(int(name[1:]), int(pos)) for name, pos in zip(names, found["position"].values, strict=True)]
    assert covered.labels["token"].values.tolist() == [by_row[key] for key in keys]
    assert covered.labels["each"].values.tolist() == [key[0] for key in keys]


def test_labels_of_a_view_cover_its_prompts(sealed):
    run = sealed.run
    train, test = run.split(0.4, seed=1)
    kept = np.isin(sealed.prompt, train.prompts.index)
    for values in (np.arange(len(train.prompts)), np.arange(train.n_rows)):
        train.labels.add("part", values)
    fresh = sealed.run.select(np.isin(np.arange(N), train.prompts.index))
    assert np.array_equal(fresh.labels["part"].values, np.arange(kept.sum()))
    assert np.array_equal(sealed.run.labels.covers("part"), np.isin(np.arange(N), train.prompts.index))
    with pytest.raises(InvalidInput, match="'part' has no value for prompt"):
        test.labels["part"]
    with pytest.raises(InvalidInput, match="a view of whole prompts"):
        run.select(position=0).labels.add("rows", np.arange(run.select(position=0).n_rows), by="token")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(12), "got 12 values; this view has 13 prompts and 172 rows"),
        (np.zeros((13, 2)), "an array of shape .13, 2. is no label"),
        ({f"p{i}": 1 for i in range(12)}, "prompt 'p12' has no value .1 such prompts."),
        ({f"p{i}": 1 for i in range(14)}, "prompt 'p13' is not in this view"),
        (pd.Series([1] * 14, index=[f"p{i}" for i in range(13)] + ["p3"]), "'p3' is given more than once"),
        ([None] + ["a"] * 12, "value number 0 is missing"),
        ([1, "a"] + ["a"] * 11, "it mixes int, str"),
        (np.array(["2020-01-01"] * 13, "M8[D]"), "cannot be a label"),
        (pd.DataFrame({"id": ["p0"], "other": [1]}), "has no column 'x'; it has id, other"),
        (pd.DataFrame({"prompt": ["p0"], "x": [1]}), "has no column 'id'"),
        (pd.DataFrame({"id": ["p0"] * 2, "position": [0, 0], "x": [1, 2]}), "position 0 of prompt 'p0' is given more"),
        (pd.DataFrame({"id": ["p0"], "position": [0], "x": [1]}), "position 1 of prompt 'p0' has no value"),
        (pd.DataFrame({"id": ["q"], "position": [0], "x": [1]}), "prompt 'q' is not in this view"),
        ({f"p{i}": np.arange(3) for i in range(13)}, "prompt 'p0' has values of shape .3,., but rows up to position 4"),
        ("nowhere.parquet", "'nowhere.parquet' cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(opened, values, message):
    with pytest.raises(InvalidInput, match=message) as caught:
        opened.run.labels.add("x", values)
    assert "\n" not in str(caught.value)
    assert list(opened.run.labels) == []


def test_racing_additions_all_get_versions(sealed):
    with ThreadPoolExecutor(6) as pool:
        versions = list(pool.map(lambda i: sealed.run.labels.add("x", np.full(N, i)), range(12)))
    assert sorted(versions) == list(range(1, 13))
    for number, version in enumerate(versions):
        assert set(sealed.run.labels[f"x@{version}"].values) == {number}


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_table_is_named(opened, damage):
    opened.run.labels.add("x", np.arange(N) * 17)
    (path,) = (opened.folder / "labels" / "x").glob("data-*.parquet")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if damage == "remove" else path.write_bytes(data)
    with pytest.raises(LakeCorrupt, match="missing" if damage == "remove" else "checksum"):
        opened.run.labels["x"]
