"""The example's modules, and an independent scanner of Python to compare them with."""

import importlib
import keyword
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[2] / "examples" / "stdlib_llama"
MODULES = ("corpus", "tokenizer", "labels", "chunks", "prompts")
SCANNED = ("in_string", "in_comment", "is_keyword", "is_identifier", "is_number", "bracket_depth", "indentation")
PREFIXES = {"", "r", "u", "b", "f", "t", "br", "rb", "fr", "rf", "tr", "rt"}


@dataclass
class Scanner:
    """Labels Python one character at a time; valid source only."""

    text: str
    at: int = 0
    depth: int = 0
    widths: list[int] = field(default_factory=lambda: [0])
    code_ends: list[int] = field(default_factory=list)
    """Where each logical line ends."""

    def scan(self):
        n = len(self.text)
        self.labels = {name: [0] * n for name in SCANNED}
        line_begin, in_line = 0, False
        while self.at < n:
            char = self.text[self.at]
            if not in_line and (char not in " \t\f\r\n#"):
                in_line = True
                self.indent(line_begin)
            if char == "\n":
                self.at += 1
                if not self.depth:
                    self.code_ends += [self.at] * in_line
                    line_begin, in_line = self.at, False
            elif char == "\\":
                self.at = self.text.index("\n", self.at) + 1
            elif char == "#":
                while self.at < n and self.text[self.at] not in "\r\n":
                    self.mark("in_comment", self.at + 1)
            elif char in "([{)]}":
                self.depth += 1 if char in "([{" else -1
                self.at += 1
            elif char in "\"'":
                self.string(self.at)
            elif char.isdigit() or (char == "." and self.text[self.at + 1 : self.at + 2].isdigit()):
                self.number()
            elif char.isidentifier():
                self.word()
            else:
                self.at += 1
        if in_line:
            self.code_ends.append(n)
        self.fill()
        return self

    def mark(self, name, end):
        self.labels[name][self.at : end] = [1] * (end - self.at)
        self.at = end

    def word(self):
        end = self.at
        while end < len(self.text) and ("a" + self.text[end]).isidentifier():
            end += 1
        word = self.text[self.at : end]
        if self.text[end : end + 1] in {"'", '"'} and word.lower() in PREFIXES:
            self.string(end)
        else:
            self.mark("is_keyword" if word in keyword.kwlist else "is_identifier", end)

    def number(self):
        text, end = self.text, self.at
        if text[end] == "0" and text[end + 1 : end + 2].lower() in {"x", "o", "b"}:
            end += 2
            while text[end : end + 1] and text[end] in "0123456789abcdefABCDEF_":
                end += 1
        else:
            for part in ("", ".", "e", "j"):
                mantissa = end
                if part and text[end : end + 1].lower() == part:
                    end += 1
                    if part == "e" and text[end : end + 1] in {"+", "-"}:
                        end += 1
                elif part:
                    continue
                while text[end : end + 1].isdigit() or text[end : end + 1] == "_":
                    end += 1
                if part == "e" and not text[end - 1].isdigit():
                    end = mantissa
        self.mark("is_number", end)

    def string(self, quote):
        begin, prefix = self.at, self.text[self.at : quote].lower()
        end = self.string_end(quote, "f" in prefix or "t" in prefix)
        self.at = begin
        self.mark("in_string", end)

    def string_end(self, quote, formatted):
        mark = self.text[quote] * (3 if self.text[quote : quote + 3] in {"'''", '"""'} else 1)
        at = quote + len(mark)
        while not self.text.startswith(mark, at):
            if self.text[at] == "\\" or (formatted and self.text.startswith("{{", at)):
                at += 2
            elif formatted and self.text[at] == "{":
                at = self.field_end(at + 1)
            else:
                at += 1
        return at + len(mark)

    def field_end(self, at):
        """After the brace that closes a replacement field: expression, then `:` and a format."""
        depth = 0
        while depth or self.text[at] not in ":}":
            char = self.text[at]
            if char in "\"'":
                back = at
                while self.text[back - 1].isalpha():
                    back -= 1
                prefix = self.text[back:at].lower()
                at = self.string_end(at, prefix in PREFIXES and ("f" in prefix or "t" in prefix))
                continue
            if char == "#":
                at = self.text.index("\n", at)
                continue
            depth += (char in "([{") - (char in ")]}")
            at += 1
        while self.text[at] != "}":
            at = self.field_end(at + 1) if self.text[at] == "{" else at + 1
        return at + 1

    def indent(self, line_begin):
        width = len(self.text[line_begin : self.at].expandtabs(8))
        if width > self.widths[-1]:
            self.widths.append(width)
        while width < self.widths[-1]:
            self.widths.pop()
        self.labels["indentation"][line_begin] = len(self.widths)  # 0 means: as before

    def fill(self):
        """Carry levels forward, and work bracket depths out of the characters that are code."""
        level, depth = 1, 0
        for i, char in enumerate(self.text):
            level = self.labels["indentation"][i] or level
            self.labels["indentation"][i] = level - 1
            code = not (self.labels["in_string"][i] or self.labels["in_comment"][i])
            depth += code and char in "([{"
            self.labels["bracket_depth"][i] = depth
            depth -= code and char in ")]}"


@pytest.fixture(scope="session")
def llama():
    """The example's modules, its held-out files and a tokenizer trained as the example trains its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        modules = {name: importlib.import_module(name) for name in MODULES}
        files = modules["corpus"].read_stdlib()
        tokenizer = modules["tokenizer"].train_tokenizer(file.text for file in files if not file.held_out)
        held_out = [file for file in files if file.held_out]
        yield SimpleNamespace(**modules, folder=FOLDER, held_out=held_out, bpe=tokenizer)
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def scan():
    """The function that scans a text: its `.labels` are lists by character, its `.code_ends` ends of lines."""
    return lambda text: Scanner(text).scan()


def byte_alphabet():
    """The characters that stand for bytes in a byte-level BPE (Radford et al. 2019, `bytes_to_unicode`)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


@pytest.fixture(scope="session")
def spelled_characters(llama):
    """The function (text, ids) that finds each token's labelled character from the bytes it spells."""
    return lambda text, ids: brute_characters(llama.bpe, text, ids)


def brute_characters(bpe, text, ids):
    """Each token's labelled character, from the bytes that the tokens spell."""
    alphabet = byte_alphabet()
    owner = [i for i, char in enumerate(text) for _ in char.encode()]
    encoded = text.encode()
    at, found = 0, []
    for token in ids:
        n = len(spelled := bytes(alphabet[c] for c in bpe.id_to_token(token)))
        assert spelled == encoded[at : at + n]
        touched = range(owner[at], owner[at + n - 1] + 1)
        found.append(next((i for i in touched if not text[i].isspace()), touched[0]))
        at += n
    assert at == len(owner)
    return found


LOGICAL_LINES = (
    "x = 1\n",
    "# note: é\n",
    "\n",
    "   \n",
    "y = '''a\n  # b\n'''\n",
    "f(a,\n  [2,  # (\n\n 3])\n",
    "été = 'ü' \\\n  \"#\"\n",
    "z = f'{x!r:>{y}} {{}}'\n",
    "import os; del os  # it's \\\n",
    "x = 0x_Fe + 1_0.5e-3j - .5\n",
    "s = rb'\\'' + B'\"'\n",
    "t = " + repr("long word " * 60) + "\n",
    "u = " + "+".join(["x"] * 300) + "\n",
    "v = [\n" + "  'é😀',\n" * 90 + "]\n",
    "w = '" + "😀é漢" * 100 + "'\n",
)
ENDS = ("end\n", "end", "end  # é", "end\n\n  # é")


@pytest.fixture(scope="session")
def sources():
    """A strategy of valid Python files: logical lines in nested blocks."""
    block = lambda items: ["if x:\n", *("\t" + line for item in items for line in item), "\tpass\n"]
    items = st.recursive(
        st.sampled_from(LOGICAL_LINES).map(lambda line: [line]),
        lambda inner: st.lists(inner, max_size=4).map(block),
        max_leaves=6,
    )
    return st.tuples(st.lists(items, max_size=12), st.sampled_from(ENDS)).map(
        lambda parts: "".join(line for item in parts[0] for line in item) + parts[1]
    )
