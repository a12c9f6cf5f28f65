"""Models by name: a local path, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path, PurePath

from ipadapter_core.assets import MODEL, emoji_folder

from ..errors import BaseModelError
from .published_models import PUBLISHED_MODELS, PublishedModel, download_command, model_at
from .weight_names import VOCABULARY, WEIGHT_SUFFIXES, choose_weights, missing_files

# OWNER/REPOSITORY, and a folder inside it.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(/[\w.-]+)*")
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")
_PART_FILES = ("config.json", "model.safetensors")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_CONFIGS = (".json", ".txt")
TIMEOUT = 20  # seconds for the Hub's first answer

log = logging.getLogger(__name__)


def find_model(name: Path) -> Path:
    """The local path of a base model or image encoder. A path that exists is returned as it is; a Hub id
    (`OWNER/REPOSITORY`, or `OWNER/REPOSITORY/FOLDER`) is looked up in the Hub's cache, else downloaded into it; the
    emoji model comes with this package. Other names are returned unchanged.

    Raises BaseModelError for a Hub id that is neither cached nor can be downloaded.
    """
    if name.exists():
        return name
    if name == Path("assets/emoji") / MODEL:
        return emoji_folder() / MODEL
    return hub_folder(name) if is_hub_id(name) else name


def refuse_missing(*names: Path | None) -> None:
    """Raises BaseModelError for published models that are missing or incomplete, all at once, with the command that
    downloads them; and for a missing path that has the name of a published model.
    """
    given = [name for name in names if name is not None]
    models = [model for name in given if (model := model_at(name)) is not None and model.lacking()]
    if models:
        found = "; ".join(f"{model.place}: {_what_is_missing(model)}" for model in models)
        raise BaseModelError(f"{found}. Run {download_command(models)}.")
    for name in given:
        model = next((model for model in PUBLISHED_MODELS if model.name in (name.name, name.stem)), None)
        if model is not None and not name.exists() and not is_hub_id(name):
            get = download_command([model])
            raise BaseModelError(f"{name}: {_no_such(name)}. The published one is {model.place}; {get} downloads it.")


def _what_is_missing(model: PublishedModel) -> str:
    return f"incomplete, without {', '.join(model.lacking())}" if model.place.is_dir() else _no_such(model.place)


def _no_such(path: Path) -> str:
    return "no such file" if path.suffix in WEIGHT_SUFFIXES else "no such folder"


def is_hub_id(name: PurePath) -> bool:
    """Whether a path that does not exist can be a Hub id; if its first folder exists it is a mistyped path."""
    return (
        _HUB_ID.fullmatch(name.as_posix()) is not None
        and name.suffix not in WEIGHT_SUFFIXES
        and name.parts[0] != "models"
        and not Path(name.parts[0]).exists()
    )


def hub_folder(name: PurePath) -> Path:
    """The folder of a Hub id: from the cache, without network, when it is complete there; else downloaded.

    Raises BaseModelError when neither works, or when the repository has no such model.
    """
    from huggingface_hub import snapshot_download

    repository, inside = "/".join(name.parts[:2]), "/".join(name.parts[2:])
    cached = cached_snapshot(repository)
    if cached is not None and not missing_files(cached / inside, _needed_files(cached / inside)):
        return cached / inside
    with _hub_errors(repository, f"{name.as_posix()}: no such folder, and"):
        wanted = _wanted(_files_of(repository), inside)
        if not wanted:
            where = f"no folder {inside!r} with weights" if inside else "no weights of a base model or an image encoder"
            raise BaseModelError(f"{name.as_posix()}: {repository} on the Hugging Face Hub has {where}.")
        log.warning("Downloading %s from the Hugging Face Hub into its cache.", repository)
        with _progress_bars():
            return Path(snapshot_download(repository, allow_patterns=wanted)) / inside


def download(model: PublishedModel) -> None:
    """Download the missing files of a published model into the folder that the configs name.

    Raises BaseModelError with the reason when that fails.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(model.repository, f"{model.place}: not downloaded;"):
        wanted = set(model.missing()).intersection(_files_of(model.repository))
        with _progress_bars():
            snapshot_download(model.repository, allow_patterns=sorted(wanted), local_dir=model.folder)
    if lacking := model.missing():
        raise BaseModelError(
            f"{model.place}: {model.repository} on the Hugging Face Hub has no {', '.join(lacking)}. Set the config to "
            "another model."
        )


def hub_command(model: PublishedModel) -> str:
    """The command of huggingface_hub that downloads a published model to its place."""
    return f"{hub_tool()} download {model.repository} {' '.join(model.files)} --local-dir {model.folder.as_posix()}"


def hub_tool() -> str:
    """The command line of the installed huggingface_hub: `hf`, or `huggingface-cli` before 0.34."""
    return "hf" if entry_points(group="console_scripts", name="hf") else "huggingface-cli"


@contextmanager
def _hub_errors(repository: str, what: str) -> Iterator[None]:
    """Turn every error of the Hub into a BaseModelError: `what`, then the reason."""
    try:
        yield
    except BaseModelError:
        raise
    except Exception as error:  # which classes huggingface_hub and its network library raise differs by version
        raise BaseModelError(f"{what} {hub_reason(error, repository)}") from error


def hub_reason(error: BaseException, repository: str) -> str:
    """Why a request to the Hub failed, in a sentence or two."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    page, login = f"https://huggingface.co/{repository}", f"{hub_tool()} {'auth ' if hub_tool() == 'hf' else ''}login"
    if isinstance(error, GatedRepoError):
        return f"{repository} is gated. Accept its terms at {page}, then run `{login}`."
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hugging Face Hub has no {repository}. If it is private, run `{login}`."
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{repository} on the Hugging Face Hub has no such file."
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full. Make room and run the same command again."
    reason = " ".join(str(error).split())[:150] or type(error).__name__
    return f"the Hugging Face Hub cannot be reached ({reason})."


def _files_of(repository: str) -> list[str]:
    """The names of a repository's files. Without network it fails at once; a download retries for half a minute."""
    from huggingface_hub import HfApi

    return [file.rfilename for file in HfApi().model_info(repository, timeout=TIMEOUT).siblings or []]


def cached_snapshot(repository: str) -> Path | None:
    """The newest snapshot in the Hub's cache, complete or not; None when there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)
        return None if partial is None else Path(partial)


def _needed_files(folder: Path) -> list[str]:
    """The files that a model in a folder is read from; those of a base model by its model_index.json."""
    index = folder / "model_index.json"
    if not index.is_file():
        return list(_PART_FILES)
    given = {part for part, library in json.loads(index.read_text(encoding="utf-8")).items() if library and library[0]}
    parts = [f"{part}/{file}" for part in given.intersection(_PARTS) for file in _PART_FILES]
    tokenizers = [f"{part}/{file}" for part in given.intersection(_TOKENIZERS) for file in VOCABULARY]
    return ["scheduler/scheduler_config.json", *parts, *tokenizers]


def _wanted(files: Sequence[str], inside: str) -> list[str]:
    """The files of a repository that belong to the base model or encoder in its folder `inside`; [] when none do."""
    names = [file.removeprefix(f"{inside}/") for file in files if not inside or file.startswith(f"{inside}/")]
    is_base = "model_index.json" in names
    wanted = []
    for part in _PARTS if is_base else ("",):
        in_part = [PurePath(name).name for name in names if str(PurePath(name).parent) == (part or ".")]
        wanted += [f"{part}/{name}".lstrip("/") for name in choose_weights(in_part)]
    if not wanted:
        return []
    depth = 2 if is_base else 1
    wanted += [name for name in names if name.endswith(_CONFIGS) and len(PurePath(name).parts) <= depth]
    return [f"{inside}/{name}".lstrip("/") for name in wanted]


@contextmanager
def _progress_bars() -> Iterator[None]:
    """Show the progress of downloads, even if progress bars are disabled for the loading of parts."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    enable_progress_bars()
    try:
        yield
    finally:
        if were_disabled:
            disable_progress_bars()
