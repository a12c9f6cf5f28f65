"""The parts of a model folder: `from_pretrained`, with errors that name the file and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ipadapter_core import AdapterError, looks_like
from ipadapter_core.file_types import EMPTY, LFS_POINTER, WEB_PAGE, download_again, file_type, unexpected_type
from ipadapter_core.tensors import check_weights

from ..errors import BaseModelError
from .weight_files import PAGE, open_weights
from .weight_names import choose_weights

T = TypeVar("T")


def from_config(kind: type[T], config: Mapping[str, Any], **changes: Any) -> T:
    """diffusers' `from_config`, which is typed as if it returned a tuple."""
    return cast("Any", kind).from_config(dict(config), **changes)


def freeze(network: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A network in evaluation mode, without gradients, on a device and in a dtype.

    On the CPU its weights, which are views of their file, are copied. Copies survive a change of the file, and are
    aligned: sums over unaligned weights may round differently, so a folder and a single file would not be equal.
    """
    network.requires_grad_(False).eval()
    nn.Module.to(network, device, dtype)  # diffusers' own `to` warns of modules to keep in float32; there are none
    if device.type == "cpu":
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
    return network


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a part, see `choose_weights`. Raises BaseModelError when there are none."""
    names = [path.name for path in folder.iterdir()]
    chosen = choose_weights(names)
    if not chosen:
        found = ", ".join(sorted(names)) or "nothing"
        raise BaseModelError(f"{folder}: no weights (found: {found}). Download the folder again.")
    return [folder / name for name in chosen]


def load_part(kind: Any, folder: Path, source: str = PAGE, **options: Any) -> Any:
    """`from_pretrained` without network: a config, a tokenizer, a preprocessor, or a model with all of its weights.

    `source` is where to download it from, for messages. Raises BaseModelError for what cannot be read, naming the
    file.
    """
    for file in sorted(folder.glob("[!.]*.json")):
        read_json(file, source)
    if not issubclass(kind, nn.Module):
        return _from_pretrained(kind, folder, folder, source, **options)
    files = weight_files(folder)
    names = [name for file in files for name in open_weights(file, f"{kind.__name__} weights", source).infos]
    if ".fp16" in files[0].name:
        options["variant"] = "fp16"
    return load_network(kind, folder, names, files[0] if len(files) == 1 else folder, source, **options)


def load_network(
    kind: type[nn.Module], folder: Path | None, names: Sequence[str], file: Path, source: str = PAGE, **options: Any
) -> Any:
    """`from_pretrained` for a model; `names` are those of the tensors in `file`.

    Raises BaseModelError for weights that are missing, of another shape, zero or not finite.
    """
    if issubclass(kind, PreTrainedModel):
        options["ignore_mismatched_sizes"] = True  # they are named below
    try:
        network, info = _from_pretrained(kind, folder, file, source, output_loading_info=True, **options)
    except BaseModelError as error:
        raise BaseModelError(f"{error} {file.name} looks like {looks_like(names)}.") from error
    missing = sorted(info["missing_keys"])
    other_shape = sorted(
        str(key) if isinstance(key, str) else f"{key[0]} ({list(key[1])})" for key in info["mismatched_keys"]
    )
    if missing or other_shape:
        what = (
            f"lacks {len(missing)} of the tensors"
            if missing
            else f"has {len(other_shape)} tensors of other shapes than those"
        )
        raise BaseModelError(
            f"{file}: {what} that its config names, such as {(missing or other_shape)[0]} (it looks like "
            f"{looks_like(names)}; expected {kind.__name__} weights). Download it and its config.json again from "
            f"{source}."
        )
    check_values(network, str(file))
    return network


def check_values(network: nn.Module, origin: str) -> None:
    """Raises BaseModelError for weights that are zero or not finite; `origin` is their file."""
    try:
        check_weights(network.state_dict(), origin)
    except AdapterError as error:
        raise BaseModelError(str(error)) from error


def _from_pretrained(kind: Any, folder: Path | None, origin: Path, source: str, **options: Any) -> Any:
    try:
        with quiet_libraries():
            return kind.from_pretrained(None if folder is None else str(folder), local_files_only=True, **options)
    except Exception as error:  # of any class, from three libraries
        reason = " ".join(str(error).split()).split(". If you want", 1)[0][:300]
        raise BaseModelError(
            f"{origin}: cannot be read as {kind.__name__} ({reason}). Download it again from {source}."
        ) from error


def load_tokenizer(folder: Path, vocabulary: int | None = None, source: str = PAGE) -> CLIPTokenizer:
    """Read a tokenizer; `vocabulary` is the text encoder's number of tokens.

    Raises BaseModelError for files that are missing, damaged or of another model, naming them.
    """
    if not (folder / "tokenizer.json").is_file():
        _check_merges(folder, source)
    tokenizer: CLIPTokenizer = load_part(CLIPTokenizer, folder, source)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise BaseModelError(
            f"{folder / 'tokenizer_config.json'}: model_max_length is {tokenizer.model_max_length!r}, expected a "
            f"number. Download it again from {source}."
        )
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise BaseModelError(
            f"{folder}: a tokenizer of {len(tokenizer)} tokens; the text encoder has {vocabulary}. They belong to "
            f"different models: download the folder again from {source}."
        )
    return tokenizer


def _check_merges(folder: Path, source: str) -> None:
    """Refuse an incomplete merges.txt, with which a tokenizer would split words differently, without an error."""
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise BaseModelError(f"{folder / name}: is missing. Download it from {source}.")
    merges = folder / "merges.txt"
    if file_type(merges) in (EMPTY, LFS_POINTER, WEB_PAGE):
        raise BaseModelError(str(unexpected_type(merges, "the merges of a tokenizer", download_again(source))))
    tokens = read_json(folder / "vocab.json", source)
    # Every other token is a single byte, with or without the end of a word, or a special one.
    expected = sum(len(token.removesuffix("</w>")) > 1 and not token.startswith("<") for token in tokens)
    lines = merges.read_text(encoding="utf-8", errors="replace").splitlines()
    found = sum(len(line.split()) == 2 and not line.startswith("#version") for line in lines)
    if found < expected:
        raise BaseModelError(
            f"{merges}: damaged: it has {found} merges, vocab.json needs {expected}. Download it again from {source}."
        )


def read_json(file: Path, source: str = PAGE) -> dict[str, Any]:
    """A JSON object. Raises BaseModelError that names the file and what it is."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(f"{file}: is missing. Download it from {source}.") from None
    except ValueError as error:
        if file_type(file).is_failed_download:
            raise BaseModelError(str(unexpected_type(file, "a JSON file", download_again(source)))) from error
        raise BaseModelError(f"{file}: damaged JSON ({error}). Download it again from {source}.") from error
    if not isinstance(content, dict):
        raise BaseModelError(f"{file}: holds no JSON object. Download it again from {source}.")
    return content


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence what transformers and diffusers log about weights; what counts is raised."""
    libraries = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    for library, _ in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in libraries:
            library.set_verbosity(verbosity)
