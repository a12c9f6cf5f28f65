"""A workflow file stores widget values by position: every old id has the inputs, widgets and outputs it had."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

FILES = {"ipadapter_file", "embeds"}  # lists of files
KEYS = ("default", "min", "max", "step", "multiline")


def inputs(types):
    """In order: group, name, type or choices, and what decides about the widget."""
    described = []
    for group in ("required", "optional"):
        for name, (kind, *rest) in types.get(group, {}).items():
            options = rest[0] if rest else {}
            shown = "files" if name in FILES else kind
            described.append(
                (
                    group,
                    name,
                    shown,
                    {key: options[key] for key in KEYS if options.get(key) is not None and options[key] is not False},
                )
            )
    return described


def test_all_37_ids(peer, old):
    assert set(old) == set(peer.nodes)
    assert len(old) == 37


def test_inputs_and_outputs(peer, old):
    for name, theirs in peer.nodes.items():
        ours = old[name].GET_NODE_INFO_V1()
        assert inputs(ours["input"]) == inputs(theirs.INPUT_TYPES()), name
        assert tuple(ours["output"]) == tuple(theirs.RETURN_TYPES), name
        assert tuple(ours["output_name"]) == tuple(getattr(theirs, "RETURN_NAMES", theirs.RETURN_TYPES)), name
        assert ours["display_name"] == peer.titles[name]
        assert ours["output_node"] == getattr(theirs, "OUTPUT_NODE", False)
        assert ours["deprecated"]
        assert ours["category"] == "image prompt/old names"


def test_every_description_names_the_node_to_use_instead(pack, old):
    """Short, and by the name in the menu."""
    titles = sorted((cls.define_schema().display_name for cls in pack.classes), key=len, reverse=True)
    assert len(old) == 37
    for name, node in old.items():
        description = node.GET_NODE_INFO_V1()["description"]
        before, _, instead = description.partition(" In new ones use ")
        assert before == "Of ComfyUI_IPAdapter_plus, for old workflows." and len(description) < 140, description
        named = []
        for title in titles:  # longest first: Image Prompt is a part of others
            if title in instead:
                named.append(title)
                instead = instead.replace(title, "")
        assert named, f"{name}: {description}"
        assert not re.search("[A-Z]", instead), f"{name} names a node that there is not: {description}"


def test_other_packs_can_call_an_instance_of_the_class(peer, old):
    """They take the class out of NODE_CLASS_MAPPINGS and call its method, by name or by FUNCTION, in any style."""
    for name, theirs in peer.nodes.items():
        assert old[name].FUNCTION == theirs.FUNCTION
        assert old[name].RETURN_TYPES is not None
        method = getattr(old[name](), theirs.FUNCTION)
        wanted = list(inspect.signature(getattr(theirs, theirs.FUNCTION)).parameters.items())[1:]
        found = dict(inspect.signature(method).parameters)
        assert list(found) == [parameter for parameter, _ in wanted], name
        for parameter, described in wanted:
            assert found[parameter].default == described.default, f"{name}.{parameter}"


def test_choices_are_lists_as_hosts_read_them(old):
    kinds = old["IPAdapterAdvanced"]().INPUT_TYPES()["required"]["weight_type"][0]
    assert kinds[0] == "linear" and len(kinds) == 15


def test_the_old_names_hold_to_the_registrys_rules():
    """As test_schema asks of our own nodes."""
    forbidden = r"subprocess|os\.system|os\.environ|torch\.load|pickle|requests|urllib|huggingface_hub|eval\(|exec\("
    files = sorted((Path(__file__).resolve().parents[3] / "nodes" / "legacy").glob("*.py"))
    assert files
    for file in files:
        text = file.read_text(encoding="ascii")
        assert len(text.splitlines()) <= 300, file.name
        assert not re.search(forbidden, text), file.name
