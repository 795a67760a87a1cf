"""The example's labels against a scanner that knows neither `tokenize` nor the code under test."""

import ast
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="session")
def encoded(llama):
    """(file, ids, offsets) of every held-out file."""
    encodings = [llama.bpe.encode(file.text, add_special_tokens=False) for file in llama.held_out]
    return [(file, encoding.ids, encoding.offsets) for file, encoding in zip(llama.held_out, encodings, strict=True)]


@pytest.fixture(scope="session")
def labelled(llama):
    """(file, character labels) of every held-out file."""
    return [(file, llama.labels.character_labels(file.text)) for file in llama.held_out]


def assert_scanned(scan, text, labels, where=""):
    for name, values in scan(text).labels.items():
        wrong = np.flatnonzero(labels[name] != np.array(values, labels[name].dtype))
        assert not wrong.size, f"{where} {name} at {wrong[0]}: {text[max(0, wrong[0] - 60) : wrong[0] + 20]!r}"


def runs(text, values):
    """The stretches of characters that carry a bool label."""
    return [text[a:b] for a, b in np.flatnonzero(np.diff([False, *values, False])).reshape(-1, 2)]


def marked(llama, text, name):
    return "|".join(runs(text, llama.labels.character_labels(text)[name]))


def test_characters_of_the_held_out_files_are_as_scanned(labelled, scan):
    assert len(labelled) > 30
    for file, labels in labelled:
        assert_scanned(scan, file.text, labels, file.path)


def test_docstrings_of_the_held_out_files(labelled):
    found = 0
    for file, labels in labelled:
        nodes = [
            node
            for node in ast.walk(ast.parse(file.text))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ]
        nodes.sort(key=lambda node: node.body[0].lineno)
        literals = runs(file.text, labels["in_docstring"])
        assert [ast.literal_eval(literal) for literal in literals] == [
            ast.get_docstring(node, clean=False) for node in nodes
        ]
        found += len(literals)
    assert found > 500


HEADER = "class C:\n\t'é' \"\"\"doc\n\t\"\"\"  # c\n\tdef f(a, *, b=0x1F):\n\t\tr'''raw\\''''; x = (1.5e-3, [b'y'])\n"


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (HEADER, "in_docstring", "'é'|\"\"\"doc\n\t\"\"\"|r'''raw\\''''"),
        (HEADER, "in_string", "'é'|\"\"\"doc\n\t\"\"\"|r'''raw\\''''|b'y'"),
        (HEADER, "is_number", "0x1F|1.5e-3"),
        (HEADER, "is_keyword", "class|def"),
        (HEADER, "is_identifier", "C|f|a|b|x"),
        (HEADER, "in_comment", "# c"),
        ("'ééé'; 'ü'\n'no'\n", "in_docstring", "'ééé'"),
        ("class Éé: 'doc'; 'x'", "in_docstring", "'doc'"),
        ("'' # é\n", "in_docstring", "''"),
        ("def f(): 'é'; 'x'", "in_docstring", "'é'"),
        ("(  # c\n'a'  # '\n\"b\")", "in_docstring", "'a'|\"b\""),
        ("class A:\n  b'no'\nclass B:\n  f'no'\nasync def f():\n  'yes'", "in_docstring", "'yes'"),
        ("x = 1\n'no'\n", "in_docstring", ""),
        ("x = f'a{y + 1!r:>{w}}' f\"{[z for z in 'q']}\"\n", "in_string", "f'a{y + 1!r:>{w}}'|f\"{[z for z in 'q']}\""),
        ("x = f'a{y + 1!r:>{w}}' f\"{[z for z in 'q']}\"\n", "is_identifier", "x"),
        ("x = rf'{y}'\n", "is_keyword", ""),
        ("match = None\nprint(match)", "is_identifier", "match|print|match"),
        ("match = None\nprint(match)", "is_keyword", "None"),
        ("x = 1 # a\r\n# b\r\ny = '''\r\n'''\r\n", "in_comment", "# a|# b"),
        ("x = 'a\\\nb' \\\n  '#'  # '", "in_string", "'a\\\nb'|'#'"),
        ("x = 'a\\\nb' \\\n  '#'  # '", "in_comment", "# '"),
        ("été = 'à'; x = 3", "is_number", "3"),
    ],
)
def test_marked_text(llama, text, name, expected):
    assert marked(llama, text, name) == expected


@pytest.mark.parametrize(
    ("text", "depths"),
    [
        ("a(b[1], {2: '('})\n", "01122211222222221"),
        ("x = (  # )\n  f'{y}')", "00001111111111111111"),
        ("()()", "1111"),
    ],
)
def test_bracket_depth(llama, text, depths):
    assert "".join(map(str, llama.labels.character_labels(text)["bracket_depth"])) == depths.ljust(len(text), "0")


@pytest.mark.parametrize(
    "lines",
    [
        # level and line: blank lines and comments have the level of the code above them
        ["0# top\n", "0if x:\n", "0    # above the body\n", "0\n", "1    y\n", "1# below\n", "0z"],
        ["0def f():\n", "1\tif x:\n", "2\t\ty\n", "2\n", "2  # c\n", "1\tz(\n", "1a)\n", "1\n"],
        ["0if x:\n", "1  y = [\n", "1z, '''\n", "1''']\n", "1  u = \\\n", "11\n", "0v\n", "0# c"],
        ["0if x:\n", "1  y\n", "0\\\n", "0z\n"],
        ["0if x:\r\n", "1  y\r\n", "1\r\n", "0z\r\n"],
        ["0class A: x = 1; y = 2\n", "0z"],
    ],
)
def test_indentation(llama, lines):
    expected = [int(line[0]) for line in lines for _ in line[1:]]
    assert llama.labels.character_labels("".join(line[1:] for line in lines))["indentation"].tolist() == expected


def test_nested_quotes_are_one_string(llama, scan):
    text = "x = f'{d['a'] + f'{(1)}' # c'\n}' + y\n"
    if sys.version_info < (3, 12):  # PEP 701
        with pytest.raises(SyntaxError):
            llama.labels.character_labels(text)
    else:
        assert marked(llama, text, "in_string") == text[4:-5]
        assert marked(llama, text, "is_identifier") == "x|y"
        assert_scanned(scan, text, llama.labels.character_labels(text))


def recorded(*tokens):
    """What `tokenize` of Python 3.14 yields: (name, string, start, end)."""
    return [SimpleNamespace(name=n, string=s, start=(1, a), end=(1, b)) for n, s, a, b in tokens]


def test_tokens_of_newer_pythons(llama, monkeypatch):
    """Recorded with CPython 3.14.2 from `x = f"a{f'{b}'+1}" + c`, so that the nesting is tested on every Python."""
    tokens = recorded(
        ("NAME", "x", 0, 1), ("OP", "=", 2, 3),
        ("FSTRING_START", 'f"', 4, 6), ("FSTRING_MIDDLE", "a", 6, 7), ("OP", "{", 7, 8),
        ("FSTRING_START", "f'", 8, 10), ("OP", "{", 10, 11), ("NAME", "b", 11, 12), ("OP", "}", 12, 13),
        ("FSTRING_END", "'", 13, 14), ("OP", "+", 14, 15), ("NUMBER", "1", 15, 16), ("OP", "}", 16, 17),
        ("FSTRING_END", '"', 17, 18), ("OP", "+", 19, 20), ("NAME", "c", 21, 22),
        ("NEWLINE", "\n", 22, 23), ("ENDMARKER", "", 23, 23),
    )  # fmt: skip
    names = {name: number for number, name in llama.labels.tokenize.tok_name.items()}
    names |= {
        name: names.get(name, 200 + i) for i, name in enumerate(("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"))
    }
    for token in tokens:
        token.type = names[token.name]
    text = "x = f\"a{f'{b}'+1}\" + c\n"
    before = llama.labels.character_labels(text)
    monkeypatch.setattr(llama.labels.tokenize, "tok_name", {number: name for name, number in names.items()})
    monkeypatch.setattr(llama.labels.tokenize, "generate_tokens", lambda _readline: iter(tokens))
    after = llama.labels.character_labels(text)
    assert marked(llama, text, "in_string") == "f\"a{f'{b}'+1}\""
    assert all((before[name] == after[name]).all() for name in llama.labels.TOKEN_LABELS)


@pytest.mark.parametrize("text", ["x = 1\ry = 2\r", "\ufeffx = 1\n"])
def test_texts_with_ambiguous_columns_are_refused(llama, text):
    with pytest.raises(ValueError, match=r"read it with tokenize\.open"):
        llama.labels.character_labels(text)


def test_invalid_source_is_refused(llama):
    with pytest.raises(SyntaxError):
        llama.labels.character_labels("x = (")


def test_other_line_ends_inside_a_string(llama):
    text = "x = '\x0b\x0c\x1c\x85\u2028\u2029'\ny = (2)\n"
    assert marked(llama, text, "is_number") == "2"
    assert marked(llama, text, "is_identifier") == "x|y"


def test_warnings_of_the_labelled_text_are_its_own(llama):
    text = "x = '\\d' is 'y'\n"
    assert marked(llama, text, "is_keyword") == "is"


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("argparse.py", "class A: pass\n", (True, False, "argparse")),
        ("asyncio/locks.py", "def f():\n  async def g(): 'class B: pass'\n", (False, True, "asyncio")),
        ("xml/etree/__init__.py", "def f():\n  if x:\n    class A: pass\n", (True, False, "xml")),
    ],
)
def test_file_labels(llama, path, text, expected):
    assert tuple(llama.labels.file_labels(path, text).values()) == expected
    assert list(llama.labels.file_labels(path, text)) == ["defines_class", "has_async_def", "package"]


def test_tokens_take_the_label_of_their_first_visible_character(llama, encoded, spelled_characters):
    for file, ids, offsets in encoded:
        assert llama.labels.labelled_characters(file.text, offsets).tolist() == spelled_characters(file.text, ids)


@given(text=st.text(alphabet=st.sampled_from("ab1 \t\n\"'#(é€😀\u00a0\r_+"), min_size=1, max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_alignment_of_any_text(llama, spelled_characters, text):
    encoding = llama.bpe.encode(text, add_special_tokens=False)
    found = llama.labels.labelled_characters(text, encoding.offsets)
    assert found.tolist() == spelled_characters(text, encoding.ids)


def test_token_labels_are_those_of_their_characters(llama):
    text = "def f():  # é\n    return ' x '\n"
    encoding = llama.bpe.encode(text, add_special_tokens=False)
    pieces = [text[a:b] for a, b in encoding.offsets]
    labels = llama.labels.token_labels(text, encoding.offsets)
    assert [p for p, yes in zip(pieces, labels["is_keyword"], strict=True) if yes] == ["def", " return"]
    assert "".join(p for p, yes in zip(pieces, labels["in_string"], strict=True) if yes) == " ' x '"
    assert labels["indentation"].tolist() == [0] * (pieces.index("\n") + 1) + [1] * (
        len(pieces) - pieces.index("\n") - 1
    )


def test_special_tokens_cannot_be_labelled(llama):
    with pytest.raises(ValueError, match="token 0 spans no character"):
        llama.labels.labelled_characters("x", llama.bpe.encode("x").offsets)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
def test_characters_of_any_source_are_as_scanned(llama, scan, sources, data):
    text = data.draw(sources)
    assert_scanned(scan, text, llama.labels.character_labels(text))
