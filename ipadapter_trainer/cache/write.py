"""`ipadapter cache`: run the frozen models over a data set once and store their outputs.

Processes take the shards in turn. A shard is written whole or not at all, so a run that was stopped resumes with the
missing ones, with any number of processes that see the same folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..data.buckets import assign, read_sizes
from ..data.examples import Example
from ..data.from_config import buckets_from_config, examples_from_config
from ..errors import CacheError, ConfigError, DataError
from ..files.provenance import trainer_version
from ..models.base_model import BaseModel
from ..models.from_config import base_model_from_config
from ..runtime.disk import show_bytes
from ..runtime.folder_lock import LOCK, NOTE, Say, lock_folder
from ..runtime.processes import check_precision, launched_on_cpu
from ..settings.config import TrainConfig
from .encode import encode_shards
from .files import MANIFEST, Manifest, ShardFile, ShardHeader, read_header, read_manifest, write_shard
from .plan import TABLES, CacheSettings, Shard, plan_shards

_TIMEOUT = timedelta(days=7)  # processes wait for each other only at the end, and some are slower


def write_cache(
    config: TrainConfig,
    *,
    say: Say = lambda line: None,
    progress_bar: bool = False,
    force: bool = False,
    _dtype: torch.dtype = torch.float16,
) -> Path:
    """Write the cache of a training to the folder `config.cache`, or the shards that are missing in it; returns the
    folder.

    Processes that `accelerate launch` started share the work. `say` gets the lines for the user. `force` starts
    although the disk has less room than the cache needs.

    Raises ConfigError without a folder; CacheError when the folder holds something else, when the disk has no room and
    for values that float16 cannot hold; DiskError when the disk refuses a file; DataError when no image can be read.
    """
    folder = config.cache
    if folder is None:
        raise ConfigError("Where shall the cache go? Name a folder with cache=...")
    state = PartialState(cpu=launched_on_cpu(), timeout=_TIMEOUT)
    assert state.device is not None
    check_precision(config.mixed_precision, state.device)
    say = say if state.is_main_process else lambda line: None
    with lock_folder(folder, say):
        base_model, examples = base_model_from_config(config, state.device), examples_from_config(config)
        manifest, shards = _plan(config, folder, base_model, examples, _dtype)
        settings = manifest.settings
        missing = [shard for shard in shards if _header(folder, settings, shard) is None]
        if manifest.complete and not missing:
            say(f"{folder} is complete: {len(examples):,} images. Train with cache={folder}")
            return folder
        say(_summary(config, base_model, shards, missing))
        if state.num_processes > 1:
            say(f"{state.num_processes} processes share the work.")
        _check_room(folder, sum(shard.bytes for shard in missing), force, say)
        lost = {shard.file for shard in missing}
        known = {file: shard for file, shard in manifest.shards.items() if file not in lost}
        manifest = replace(manifest, complete=False, shards=known)
        state.wait_for_everyone()  # all processes have looked for shards before the first one writes
        if state.is_main_process:
            for leftover in folder.glob("*/.*.tmp*"):  # of a run that was killed while it wrote
                leftover.unlink(missing_ok=True)
            manifest.save(folder)
        state.wait_for_everyone()
        part = missing[state.process_index :: state.num_processes]
        encoded = encode_shards(
            config, base_model, settings, examples, part, progress_bar=progress_bar and state.is_main_process
        )
        written = [
            (shard.file, write_shard(folder / shard.file, tensors, settings.digest, broken))
            for shard, tensors, broken in encoded
        ]
        known |= dict(gather_object(written))  # waits for all processes
        if state.is_main_process:
            _complete(folder, replace(manifest, shards=known), shards, say)
        state.wait_for_everyone()
    return folder


def _plan(
    config: TrainConfig, folder: Path, base_model: BaseModel, examples: Sequence[Example], dtype: torch.dtype
) -> tuple[Manifest, list[Shard]]:
    """The manifest in the folder, or a new one, and all shards. Raises CacheError when something else is in it."""
    settings = CacheSettings.of(config, examples, base_model)
    if (folder / MANIFEST).is_file():
        found = read_manifest(folder)
        if differences := settings.differences(found.settings):
            raise CacheError(
                f"{folder} holds the cache of other settings: {differences}. Choose another folder with cache=..., or "
                "delete this one."
            )
        if config.buckets:  # the same ones, although another batch_size may give up others
            buckets = assign(read_sizes(examples), found.buckets)
        else:
            buckets = buckets_from_config(config, examples)
        return found, plan_shards(settings, base_model, examples, buckets, dtype)
    if any(file.name not in (LOCK, NOTE) for file in folder.iterdir()):
        raise CacheError(f"cache {folder} is a folder with other files in it. Choose another folder.")
    buckets = buckets_from_config(config, examples)
    shards = plan_shards(settings, base_model, examples, buckets, dtype)
    dtypes = {"vae": base_model.vae_dtype, "text_encoders": base_model.dtype, "image_encoder": base_model.dtype}
    manifest = Manifest(
        complete=False,
        settings=settings,
        library=trainer_version(),
        base_model=base_model.name,
        encoded_in={part: str(dtype).removeprefix("torch.") for part, dtype in dtypes.items()},
        buckets=list(buckets.sizes),
        counts={table: sum(len(shard.rows) for shard in shards if shard.table == table) for table in TABLES},
        shards={},
        broken={},
    )
    return manifest, shards


def _header(folder: Path, settings: CacheSettings, shard: Shard) -> ShardHeader | None:
    """The header of a shard; None when it is not written."""
    header = read_header(folder / shard.file)
    same = header is not None and header.key == settings.digest and header.rows.tolist() == shard.rows.tolist()
    return header if same else None


def _summary(config: TrainConfig, base_model: BaseModel, shards: Sequence[Shard], missing: Sequence[Shard]) -> str:
    lines = [f"Caching the outputs of the encoders of {base_model.name} in {config.cache}"]
    names = {"captions": "distinct captions", "references": "other references", "images": "images"}
    for table, name in names.items():
        part = [shard for shard in shards if shard.table == table]
        if part:
            size = show_bytes(sum(shard.bytes for shard in part))
            lines.append(f"{sum(len(shard.rows) for shard in part):>12,} {name:<20}{size:>10}")
    lines.append(f"{len(shards):>12,} {'shards':<20}{show_bytes(sum(shard.bytes for shard in shards)):>10}")
    if len(missing) < len(shards):
        lines.append(f"Resuming: {len(shards) - len(missing)} of {len(shards)} shards are written already.")
    if config.crop == "random" and config.cache_variants == 1:
        lines.append("Every image keeps one random crop; cache_variants=4 would hold four of each.")
    return "\n".join(lines)


def _check_room(folder: Path, needed: int, force: bool, say: Say) -> None:
    free = shutil.disk_usage(folder).free
    if needed <= free:
        say(f"{show_bytes(needed)} to be written, {show_bytes(free)} free.")
    elif force:
        say(f"{show_bytes(needed)} to be written, but only {show_bytes(free)} free: continuing because of --force.")
    else:
        raise CacheError(
            f"The cache needs {show_bytes(needed)}, but the disk of {folder} has {show_bytes(free)} free. Choose a "
            "folder on another disk with cache=..., lower cache_variants, set cache_image_features=int8 or none, or "
            "start with --force."
        )


def _complete(folder: Path, manifest: Manifest, shards: Sequence[Shard], say: Say) -> None:
    """Save the manifest with the hashes of all shards and the rows that could not be read. Of shards, only those that
    an interrupted run wrote are read for their hashes.
    """
    files: dict[str, ShardFile] = {}
    broken: dict[str, dict[int, str]] = {table: {} for table in TABLES}
    for shard in shards:
        file = folder / shard.file
        if (header := _header(folder, manifest.settings, shard)) is None:
            raise CacheError(
                f"{file} is missing although all processes are done. All of them must write into one folder that "
                "every machine sees; run the same command again for what is missing."
            )
        broken[shard.table] |= header.broken
        files[shard.file] = manifest.shards.get(shard.file) or ShardFile.of(file.read_bytes())
    images, count = broken["images"], manifest.counts["images"]
    if len(images) == count:
        raise DataError(f"None of the {count} images can be read. The first: {images[0]}")
    manifest = replace(manifest, shards=files, broken=broken, complete=True)
    manifest.save(folder)
    reasons = [reason for rows in broken.values() for reason in rows.values()]
    if reasons:
        say(f"Could not be read and are left out: {len(reasons):,}, such as {reasons[0]}")
    say(f"Cached {count:,} images: {show_bytes(manifest.size)}. Train with cache={folder}")
