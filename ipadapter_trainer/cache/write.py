"""`ipadapter cache`: run the frozen models over a data set once and store their outputs.

Processes take the shards in turn. A shard is written whole or not at all, so a run that was stopped resumes with the
missing ones, with any number of processes that see the same folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data.buckets import assign, read_sizes
from ..data.from_config import buckets_from_config, examples_from_config
from ..data.images import is_readable
from ..errors import CacheError, ConfigError
from ..files.provenance import trainer_version
from ..models.from_config import base_model_from_config
from ..runtime.disk import show_bytes
from ..runtime.folder_lock import LOCK, NOTE, Say, lock_folder
from ..runtime.processes import check_precision, connect
from ..settings.config import TrainConfig
from .encode import encode_shards
from .files import MANIFEST, Manifest, open_shard, read_manifest, replaced_image, write_shard
from .plan import TABLES, Shard, cache_rows, cache_settings, plan_shards
from .read import StoredRows


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
    state = connect()
    assert state.device is not None
    check_precision(config.mixed_precision, state.device)
    say = say if state.is_main_process else lambda line: None
    with lock_folder(folder, say):
        for leftover in (*folder.glob(".manifest-*.tmp*"), *folder.glob("*/.shard-*.tmp*")):  # of a killed run
            leftover.unlink(missing_ok=True)
        base_model, examples = base_model_from_config(config, state.device), examples_from_config(config)
        settings, found = cache_settings(config, examples, base_model), None
        if (folder / MANIFEST).is_file():
            found = read_manifest(folder, settings)
            settings = found.settings
        elif any(file.name not in (LOCK, NOTE) for file in folder.iterdir()):
            raise CacheError(f"cache {folder} has other files in it, and no {MANIFEST}. Choose another folder.")
        if found is not None and found.buckets and config.buckets:
            # The same ones, although another batch_size may give up others.
            buckets = assign(read_sizes(examples), found.buckets)
        else:
            buckets = buckets_from_config(config, examples)
        shards = plan_shards(settings, base_model, examples, buckets, _dtype)
        manifest = found or Manifest(settings, [], [], trainer_version(), base_model.name, config.mixed_precision)
        manifest = replace(manifest, shards=[shard.file for shard in shards], buckets=list(buckets.sizes))
        sources = cache_rows(settings, examples)
        missing = [shard for shard in shards if not _is_written(folder, settings, shard, sources)]
        if missing:
            say(f"Caching the outputs of the encoders of {base_model.name} in {folder}")
            if state.num_processes > 1:
                say(f"{state.num_processes} processes share the work.")
            _announce(folder, shards, missing, force, say)
        state.wait_for_everyone()  # all processes have looked for shards before the first one writes
        if state.is_main_process and manifest != found:
            manifest.save(folder)
        state.wait_for_everyone()
        part = missing[state.process_index :: state.num_processes]
        progress_bar = progress_bar and state.is_main_process
        encoded = encode_shards(config, base_model, settings, examples, part, progress_bar=progress_bar)
        for shard, tensors, broken in encoded:
            write_shard(folder / shard.file, tensors, settings, broken)
        state.wait_for_everyone()
        if state.is_main_process:
            broken = StoredRows(folder, manifest, sources).broken
            if broken:
                say(f"Could not be read and are left out: {len(broken):,}, such as {next(iter(broken.values()))}")
            size = show_bytes(sum((folder / file).stat().st_size for file in manifest.shards))
            say(f"{folder} is complete: {len(examples):,} images, {size}. Train with cache={folder}")
        state.wait_for_everyone()
    return folder


def _is_written(folder: Path, settings: Mapping[str, Any], shard: Shard, sources: Sequence[Any]) -> bool:
    """Whether a shard is as planned, its images are the same, and those that are unreadable still are."""
    try:
        tensors, broken = open_shard(folder / shard.file, settings)
    except CacheError:
        return False
    planned = {name: (row.shape, row.dtype) for name, row in shard.tensors.items()}
    written = {name: (tensor.shape[1:], tensor.dtype) for name, tensor in tensors.items() if name != "row"}
    if tensors["row"].tolist() != shard.rows.tolist() or written != planned:
        return False
    return not replaced_image(tensors, broken, sources) and not any(is_readable(sources[row]) for row in broken)


def _announce(folder: Path, shards: Sequence[Shard], missing: Sequence[Shard], force: bool, say: Say) -> None:
    """Say the size of the cache and of what is missing. Raises CacheError when the disk has less room."""
    for table, name in TABLES.items():
        part = [shard for shard in shards if shard.table == table]
        if part:
            size = show_bytes(sum(shard.bytes for shard in part))
            say(f"{sum(len(shard.rows) for shard in part):>12,} {name:<20}{size:>10}")
    if len(missing) < len(shards):
        say(f"Resuming: {len(shards) - len(missing)} of {len(shards)} shards are written already.")
    needed, free = sum(shard.bytes for shard in missing), shutil.disk_usage(folder).free
    say(f"{show_bytes(needed)} to be written, {show_bytes(free)} free.")
    if needed > free and not force:
        raise CacheError(
            f"The cache needs {show_bytes(needed)}, but the disk of {folder} has {show_bytes(free)} free. Choose a "
            "folder on another disk with cache=..., lower cache_variants, set cache_image_features=int8 or none, or "
            "start with --force."
        )
