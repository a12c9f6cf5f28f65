"""The parts of a model folder: `from_pretrained`, with a sentence that names the file for what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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

_MODELS = {  # class -> what its weights look like
    "UNet2DConditionModel": "a UNet",
    "AutoencoderKL": "a VAE",
    "CLIPTextModel": "a text encoder",
    "CLIPTextModelWithProjection": "a text encoder",
    "CLIPVisionModelWithProjection": "an image encoder (CLIP vision)",
    "CLIPModel": "an image encoder (CLIP vision)",
}


class ChosenWeights(NamedTuple):
    """The weight files of a part that `from_pretrained` reads, and the variant to ask it for."""

    files: list[Path]
    variant: str | None


def chosen_weights(folder: Path) -> ChosenWeights:
    """Safetensors before pickles, full precision before fp16.

    Raises BaseModelError when there are none.
    """
    chosen = choose_weights(p.name for p in folder.iterdir())
    if chosen is not None:
        return ChosenWeights([folder / name for name in chosen.names], chosen.variant)
    found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise BaseModelError(f"{folder}: no weights (found: {found}). Download the folder again.")


def load_part(kind: Any, folder: Path, source: str = PAGE, **options: Any) -> Any:
    """`from_pretrained` without network: a config, a tokenizer, a preprocessor, or a model with all of its weights.

    `source` is where to download it from, for messages. Raises BaseModelError for what cannot be read, naming the
    file.
    """
    for file in sorted(folder.glob("[!.]*.json")):
        read_json(file, source)
    if not issubclass(kind, nn.Module):
        return _from_pretrained(kind, folder, source, **options)
    files, variant = chosen_weights(folder)
    names = [name for file in files for name in open_weights(file, _expected(kind), source).infos]
    where = files[0] if len(files) == 1 else folder
    if variant:
        options["variant"] = variant
    return load_network(kind, folder, names, where, source, **options)


def load_network(
    kind: type[nn.Module], folder: Path | None, names: Sequence[str], file: Path, source: str = PAGE, **options: Any
) -> Any:
    """`from_pretrained` for a model, which must get all of its weights; `names` are those of the tensors in `file`."""
    if issubclass(kind, PreTrainedModel):
        options["ignore_mismatched_sizes"] = True  # they are refused by name
    try:
        network, info = _from_pretrained(kind, folder, source, output_loading_info=True, **options)
    except BaseModelError:
        _check_model(kind, names, file, source)
        raise
    _check_network(network, info, names, file, source)
    return network


def _expected(kind: type[nn.Module]) -> str:
    return f"{kind.__name__} weights"


def _from_pretrained(kind: Any, folder: Path | None, source: str, **options: Any) -> Any:
    try:
        with quiet_libraries():
            return kind.from_pretrained(None if folder is None else str(folder), local_files_only=True, **options)
    except Exception as error:  # of any class, from three libraries
        reason = " ".join(str(error).split()).split(". If you want", 1)[0][:300]
        raise BaseModelError(
            f"{folder or ''}: cannot be read as {kind.__name__} ({reason}). Download it again from {source}."
        ) from error


def _check_network(network: nn.Module, info: Any, names: Sequence[str], file: Path, source: str = PAGE) -> None:
    """Refuse a network that did not get all of its weights, or gets broken ones, after `from_pretrained` with
    `output_loading_info`, which is `info`; `names` are those of the tensors in `file`.

    Raises BaseModelError that says which model the file holds, or which weights are missing, zero or not finite.
    """
    missing = sorted(info["missing_keys"])
    other_shape = sorted(
        str(key) if isinstance(key, str) else f"{key[0]} ({list(key[1])})" for key in info["mismatched_keys"]
    )
    if missing or other_shape:
        _check_model(type(network), names, file, source)
        what = (
            f"lacks {len(missing)} of the tensors"
            if missing
            else f"has {len(other_shape)} tensors of other shapes than those"
        )
        raise BaseModelError(
            f"{file}: {what} that its config names, such as {(missing or other_shape)[0]}. Download it and its "
            f"config.json again from {source}."
        )
    try:
        check_weights(network.state_dict(), str(file))
    except AdapterError as error:
        raise BaseModelError(str(error)) from error


def _check_model(kind: type[nn.Module], names: Sequence[str], file: Path, source: str = PAGE) -> None:
    """Raises BaseModelError when the names of the tensors in `file` are those of another model than `kind`."""
    expected, found = _MODELS[kind.__name__], looks_like(names)
    if found != expected:
        raise BaseModelError(
            f"{file}: looks like {found}; expected {_expected(kind)}. Download it again from {source}."
        )


def load_tokenizer(folder: Path, vocabulary: int | None = None, source: str = PAGE) -> CLIPTokenizer:
    """Read a tokenizer. `vocabulary` is the number of tokens that the text encoder knows.

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
            f"{folder}: a tokenizer of {len(tokenizer)} tokens; the text encoder knows {vocabulary}. They belong to "
            f"different models: download the folder again from {source}."
        )
    return tokenizer


def _check_merges(folder: Path, source: str) -> None:
    """Without some of its merges a tokenizer splits words into other tokens, and no library notices."""
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise BaseModelError(f"{folder / name}: is missing. Download it from {source}.")
    merges = folder / "merges.txt"
    if file_type(merges) in (EMPTY, LFS_POINTER, WEB_PAGE):
        raise BaseModelError(str(unexpected_type(merges, "the merges of a tokenizer", download_again(source))))
    tokens = read_json(folder / "vocab.json", source)
    # Every other token is a single byte, which may end a word, or one of the special ones.
    expected = sum(len(token.removesuffix("</w>")) > 1 and not token.startswith("<") for token in tokens)
    lines = merges.read_text(encoding="utf-8", errors="replace").splitlines()
    found = sum(len(line.split()) == 2 and not line.startswith("#version") for line in lines)
    if found < expected:
        raise BaseModelError(
            f"{merges}: damaged: it has {found} merges, vocab.json needs {expected}. Download it again from {source}."
        )


def read_json(file: Path, source: str = PAGE) -> dict[str, Any]:
    """A JSON object. Raises BaseModelError that names the file and says what it is."""
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
    """Without the tables that transformers and diffusers log about weights: what counts is raised."""
    libraries = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    for library, _ in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in libraries:
            library.set_verbosity(verbosity)
