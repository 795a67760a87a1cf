"""The example's prompts: how files are cut, and what the script writes."""

import ast
import os
import subprocess
import sys
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def brute_chunks(llama, scan, text, max_tokens):
    """{start: (end, n_tokens)} from the scanner's lines, encoding each alone: no token crosses a line."""

    def encode(start, end):
        return llama.bpe.encode(text[start:end], add_special_tokens=False)

    starts = [0, *(end for end in scan(text).code_ends if end < len(text)), len(text)]
    sizes = [len(encode(a, b).ids) for a, b in pairwise(starts)]
    chunks, i = {}, 0
    while i < len(sizes):
        n, start = 1, starts[i]
        while i + n < len(sizes) and 1 + sum(sizes[i : i + n + 1]) <= max_tokens:
            n += 1
        end, size = starts[i + n], sum(sizes[i : i + n])
        if size >= max_tokens:  # one line is too long: the most of its tokens that its beginning encodes to
            line = encode(start, end)
            ends = [start + line.offsets[k][1] for k in range(max_tokens - 1)]
            size = next(k for k in range(len(ends), 0, -1) if encode(start, ends[k - 1]).ids == line.ids[:k])
            end = ends[size - 1]
            assert len(text[end : ends[-1]].split()) <= 1, "more than a word too short"
        chunks[start] = (end, 1 + size)
        i += n
    return {start: (end, n_tokens) for start, (end, n_tokens) in chunks.items() if n_tokens >= 16}


def assert_chunks(llama, scan, text, max_tokens):
    encoding = llama.bpe.encode(text, add_special_tokens=False)
    chunks = llama.chunks.cut_chunks(text, encoding.ids, encoding.offsets, llama.bpe, max_tokens)
    bos = llama.bpe.token_to_id("<|bos|>")
    for chunk in chunks:
        assert llama.bpe.encode(text[chunk.start : chunk.end]).ids == [bos, *encoding.ids[chunk.first : chunk.last]]
        assert 16 <= chunk.n_tokens == 1 + chunk.last - chunk.first <= max_tokens
    for a, b in pairwise(chunks):
        assert a.end <= b.start
        assert a.last <= b.first
    expected = brute_chunks(llama, scan, text, max_tokens)
    assert {chunk.start: (chunk.end, chunk.n_tokens) for chunk in chunks} == expected
    return chunks


@pytest.mark.parametrize(("max_tokens", "every"), [(16, 12), (61, 4), (256, 1)])
def test_chunks_of_held_out_files(llama, scan, max_tokens, every):
    chunks = [chunk for file in llama.held_out[::every] for chunk in assert_chunks(llama, scan, file.text, max_tokens)]
    assert len(chunks) > 100


@given(data=st.data(), max_tokens=st.integers(16, 300))
@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
def test_chunks_of_any_source(llama, scan, sources, data, max_tokens):
    assert_chunks(llama, scan, data.draw(sources), max_tokens)


def test_too_small_a_budget_is_refused(llama):
    with pytest.raises(ValueError, match="at least 16"):
        llama.chunks.cut_chunks("x", [5], [(0, 1)], llama.bpe, 15)


def test_a_tokenizer_that_crosses_lines_is_refused(llama):
    with pytest.raises(ValueError, match="straddles"):
        llama.chunks.cut_chunks("x\ny\n", [5, 6], [(0, 3), (3, 4)], llama.bpe)


@pytest.fixture(scope="session")
def written(llama, tmp_path_factory):
    """The script's output for 8,000 held-out tokens: (table, what it printed, its tokenizer's folder)."""
    folder = tmp_path_factory.mktemp("prompts")
    llama.bpe.save(str(folder / "tokenizer.json"))
    out = folder / "prompts.parquet"
    script = [sys.executable, llama.folder / "prompts.py", "--out", out, "--model", folder]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*script, "--tokens", "8000", "--max-tokens", "128"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return pq.read_table(out), done.stdout, folder


def test_the_written_prompts(llama, scan, spelled_characters, written):
    table, printed, _ = written
    assert table.schema == llama.prompts.SCHEMA
    rows = table.to_pylist()
    texts = {file.path: file.text for file in llama.held_out}
    total = sum(len(row["token_ids"]) for row in rows)
    assert 8000 <= total < 8000 + 128
    assert f"{len(rows)} prompts, {total:,} tokens" in printed
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["path"] for row in rows}) > 20
    for path in {row["path"] for row in rows}:
        scanned = scan(texts[path]).labels
        scanned["in_docstring"] = llama.labels.character_labels(texts[path])["in_docstring"].tolist()
        kinds = [type(node).__name__ for node in ast.walk(ast.parse(texts[path]))]
        for row in (row for row in rows if row["path"] == path):
            assert row["id"] == f"{path}:{row['start']}"
            assert texts[path].startswith(row["text"], row["start"])
            assert row["token_ids"] == llama.bpe.encode(row["text"]).ids
            assert row["defines_class"] == ("ClassDef" in kinds)
            assert row["has_async_def"] == ("AsyncFunctionDef" in kinds)
            assert row["package"] == path.split("/")[0].removesuffix(".py")
            characters = spelled_characters(row["text"], row["token_ids"][1:])
            for name in llama.labels.TOKEN_LABELS:
                expected = [scanned[name][row["start"] + i] for i in characters]
                assert row[name] == [0, *expected], (row["id"], name)


def test_too_few_tokens_are_said(llama, written, tmp_path, monkeypatch, capsys):
    file = next(file for file in llama.held_out if file.path == "argparse.py")
    monkeypatch.setattr(llama.prompts, "read_stdlib", lambda: [file])
    out = tmp_path / "p.parquet"
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--out", str(out), "--model", str(written[2])])
    llama.prompts.main()
    table = pq.read_table(out)
    total = sum(map(len, table["token_ids"].to_pylist()))
    assert f"the held-out files give only {total:,} of the 200,000 tokens asked for" in capsys.readouterr().out
    assert table["start"].to_pylist() == sorted(table["start"].to_pylist())
    assert total > 0.9 * len(llama.bpe.encode(file.text).ids)


def test_the_training_split_is_disjoint(llama, written, tmp_path, monkeypatch):
    kept = llama.corpus.SourceFile("abc.py", "x = [1, 2, 3, 4, 5, 6, 7, 8]\n" * 20)
    assert not kept.held_out
    monkeypatch.setattr(llama.prompts, "read_stdlib", lambda: [llama.held_out[0], kept])
    out = tmp_path / "p.parquet"
    monkeypatch.setattr(
        sys, "argv", ["prompts.py", "--out", str(out), "--model", str(written[2]), "--split", "train", "--tokens", "1"]
    )
    llama.prompts.main()
    assert pq.read_table(out)["path"].to_pylist() == ["abc.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{folder}/none"], "no tokenizer at"),
        (["--model", "{folder}/broken"], "is not a tokenizer"),
        (["--max-tokens", "15"], "--max-tokens is 15; it must be at least 16"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--out", "{folder}/none/p.parquet"], "no folder"),
    ],
)
def test_errors_are_one_line(llama, written, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    given_arguments = [argument.format(folder=tmp_path) for argument in arguments]
    monkeypatch.setattr(
        sys, "argv", ["prompts.py", "--out", str(tmp_path / "p"), "--model", str(written[2]), *given_arguments]
    )
    with pytest.raises(SystemExit) as raised:
        llama.prompts.main()
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
