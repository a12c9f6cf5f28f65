"""Every language says all that the English texts say; tests/comfy compares those with the nodes."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("ja", "zh")  # as ComfyUI names them; it shows the English texts in the others
NODES = json.loads((ROOT / "tests" / "comfy" / "schema.snapshot.json").read_text(encoding="utf-8"))
NUMBER = re.compile(r"\d+(?:\.\d+)?")
WORD = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_./-]*[A-Za-z0-9_]")
# A file, an input, a model: a capital letter inside, a digit, an underscore, a path.
IDENTIFIER = re.compile(r".[A-Z]|[0-9_/]|^\.")
NAMES = {"Kolors", "Pony", "Mad", "Scientist", "insightface", "ipadapter", "onnxruntime", "plus", "portrait", "precise"}


def flat(entry, path=()):
    """The texts of a file by where they stand: (node, "inputs", name, "tooltip") -> text."""
    if isinstance(entry, dict):
        return {key: text for name, part in entry.items() for key, text in flat(part, (*path, name)).items()}
    return {path: entry}


def texts(language):
    return flat(json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8")))


ENGLISH = texts("en")
TITLES = {ENGLISH[node, "display_name"]: node for node in NODES}
TITLE = re.compile("|".join(re.escape(title) for title in sorted(TITLES, key=len, reverse=True)))
each_language = pytest.mark.parametrize("language", LANGUAGES)


def has_word(text, word):
    """Letters of another script may touch it: they are none of the word."""
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])", text) is not None


def unchanged(path, english):
    """The words of an English text that its translation repeats: identifiers, names, inputs, choices."""
    node, part, name, *_ = (*path, "")
    text = TITLE.sub(" ", english)
    words = {word for word in WORD.findall(text) if IDENTIFIER.search(word) or word in NAMES}
    words |= {word for word in re.findall(r"[Ss]ee (\w+)", text) if word in NODES[node]["inputs"]}
    if part == "inputs":
        for owner, entry in NODES[node]["inputs"].items():
            # Those of the node's other inputs may be words of every day, unless they are several.
            choices = [choice for choice in entry.get("choices", []) if owner == name or " " in choice]
            words |= {choice for choice in choices if has_word(text, choice)}
    return words


def test_these_are_the_languages():
    files = {folder.name: {file.name for file in folder.iterdir()} for folder in (ROOT / "locales").iterdir()}
    assert files == {language: {"nodeDefs.json"} for language in ("en", *LANGUAGES)}


@each_language
def test_a_language_has_every_text_and_no_other(language):
    """In the order of the English ones, so that the files can be read side by side."""
    assert list(texts(language)) == list(ENGLISH)


@each_language
def test_every_text_is_translated(language):
    """A name may stay where it needs no translation, such as IP-Adapter."""
    found = texts(language)
    assert [path for path, text in found.items() if text != text.strip() or not text] == []
    prose = [path for path, english in ENGLISH.items() if path[-1] != "name" or " " in english]
    assert [path for path in prose if found[path].isascii()] == []


@each_language
def test_numbers_stay(language):
    found = texts(language)
    lost = {
        path: Counter(NUMBER.findall(text)) - Counter(NUMBER.findall(found[path])) for path, text in ENGLISH.items()
    }
    assert {path: numbers for path, numbers in lost.items() if numbers} == {}


@each_language
def test_identifiers_and_choices_stay(language):
    """Of inputs the label is translated, of which the next test tells."""
    found = texts(language)
    prose = {path: unchanged(path, text) for path, text in ENGLISH.items() if path[-1] != "name"}
    lost = {path: [word for word in words if not has_word(found[path], word)] for path, words in prose.items()}
    assert {path: words for path, words in lost.items() if words} == {}


@each_language
def test_nodes_and_inputs_are_named_as_they_are_shown(language):
    """In the quotation marks of the language: "node", and "label" (input)."""
    found = texts(language)
    for path, english in ENGLISH.items():
        if path[-1] != "display_name":
            titles = {found[TITLES[title], "display_name"] for title in TITLE.findall(english)}
            assert titles <= set(re.findall(r"[“「]([^“”「」]+)[”」]", found[path])), path
        for label, name in re.findall(r"[“「]([^“”「」]+)[”」]\W([a-z0-9_]+)\W", found[path]):
            labels = {text for where, text in found.items() if where[1:] == ("inputs", name, "name")}
            assert label in labels, (path, name)


@each_language
def test_names_tell_things_apart(language):
    found = texts(language)
    groups = {node: [found[node, "inputs", name, "name"] for name in NODES[node]["inputs"]] for node in NODES}
    groups["the nodes"] = [found[node, "display_name"] for node in NODES]
    assert [group for group, names in groups.items() if len(set(names)) < len(names)] == []


@pytest.mark.parametrize("language", ("en", *LANGUAGES))
def test_nothing_reads_as_message_syntax(language):
    """To ComfyUI's frontend these mean plurals, links and what is filled in."""
    assert [path for path, text in texts(language).items() if set(text) & set("{}@|")] == []
