"""Damage times part: every file of a data set and of a cache that is not what it should be. One sentence each, that
names the file, what it is, what was expected and what to do; exit status 2.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ipadapter_trainer.cache.files import MANIFEST
from ipadapter_trainer.cache.write import write_cache
from ipadapter_trainer.cli import app
from ipadapter_trainer.data.examples import Example, find_examples
from ipadapter_trainer.data.face_embeds import with_faces
from ipadapter_trainer.data.shard_files import expand_shards
from ipadapter_trainer.data.tar_samples import index_shards, stream_samples
from ipadapter_trainer.errors import DataError
from ipadapter_trainer.settings.config_file import make_config

from .tiny_data import sample, write_shard

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "an empty file (0 bytes)": lambda whole: b"",
    "a Git LFS pointer, not the file itself": lambda whole: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c\nsize 42\n"
    ),
    "a web page, not the file itself": lambda whole: b"<!DOCTYPE html>\n<html><body>404</body></html>",
    "a file of zero bytes": lambda whole: bytes(len(whole)),
}
TEXT = "a text file that begins with 'no embedding at all'"
CUT: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda whole: whole[: len(whole) // 2 - 50],
    "zeros at the end": lambda whole: whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
}


def ipadapter(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def assert_refused(words: str, *arguments: object) -> None:
    code, _, err = ipadapter(*arguments)
    last = err.splitlines()[-1]
    assert (code, "Traceback" in err) == (2, False)
    assert last.startswith("ipadapter: ") and words in last, err


# --- Shards


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two shards of 200 samples; the zeros behind the end of an archive are more than a writer's padding."""
    return [
        write_shard(tmp_path / f"s{i}.tar", {f"{n:04}": sample(n) for n in range(200 * i, 200 * i + 200)})
        for i in range(2)
    ]


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d != "a file of zero bytes"])
@pytest.mark.parametrize("both", [False, True])
def test_a_shard_that_is_another_file(shards: list[Path], damage: str, both: bool) -> None:
    for shard in shards[: 1 + both]:
        shard.write_bytes(DAMAGE[damage](shard.read_bytes()))
    expected = f"{shards[0]}: {damage}; expected a tar archive. "
    assert_refused(expected, "data", "check", f"{shards[0].parent}/s*.tar", "--no-sheet")
    with pytest.raises(DataError, match=re.escape(expected)) as error:
        expand_shards(f"{shards[0].parent}/s{{0..1}}.tar")
    assert ("(2 of 2 shards are no archives.)" in str(error.value)) == both
    assert (f"{shards[1]}: {damage}" in str(error.value)) == both


def test_a_shard_of_zeros_holds_nothing(shards: list[Path]) -> None:
    """An archive may be empty."""
    shards[0].write_bytes(bytes(200_000))
    _, out, _ = ipadapter("data", "check", f"{shards[0].parent}/s*.tar", "--no-sheet", "--min-side", 8)
    assert f"{shards[0]}: cut off or damaged (it ends after" in out
    assert "of 200,000 bytes: an incomplete download" in out
    assert "200, of which 200 can be used" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (CUT["cut off"], "unexpected end of data"),
        (CUT["zeros at the end"], "an incomplete download, or several archives in one"),
        (lambda whole: whole[: 100 * 4 * 512], "it has no end marker"),  # between two samples
    ],
)
def test_a_shard_that_ends_early(
    shards: list[Path], change: Callable[[bytes], bytes], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    shards[0].write_bytes(change(shards[0].read_bytes()))
    _, out, _ = ipadapter("data", "check", f"{shards[0].parent}/s*.tar", "--no-sheet", "--min-side", 8)
    (line,) = [line for line in out.splitlines() if words in line]
    assert str(shards[0]) in line and line.endswith("Download or make it again.")
    report: list[str] = []
    streamed = list(stream_samples(str(shards[0]), report.append))
    assert 0 < len(streamed) < 200
    assert len(report) == 1 and words in report[0]
    examples = index_shards([str(shard) for shard in shards])
    assert 290 < len(examples) < 310
    assert words in caplog.text and str(shards[0]) in caplog.text


def test_archives_in_one_file_are_not_half_read(shards: list[Path]) -> None:
    """`cat a.tar b.tar`: readers stop at the end of the first."""
    shards[0].write_bytes(shards[0].read_bytes() + shards[1].read_bytes())
    report: list[str] = []
    assert len(list(stream_samples(str(shards[0]), report.append))) == 200
    assert "several archives in one). Download or make it again." in report[0]


def test_an_archive_of_other_things(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "code.tar", "w") as tar:
        for name in ("a.py", "b.md", "c"):
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"hello"))
    assert_refused("none of the 2 images can be used", "data", "check", tmp_path / "code.tar", "--no-sheet")
    with pytest.raises(DataError, match=r"The shards hold no sample. code.tar/a: no image .*among its files \(py\)"):
        index_shards([str(tmp_path / "code.tar")])


def test_a_zipped_shard_under_a_plain_name_is_read(shards: list[Path]) -> None:
    import gzip

    shards[0].write_bytes(gzip.compress(shards[0].read_bytes()))
    assert expand_shards(shards[0]) == [str(shards[0])]
    assert len(list(stream_samples(str(shards[0]), print))) == 200


# --- Patterns of shards


def test_a_pattern_with_wildcards(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, names = shards[0].parent, [str(shard) for shard in shards]
    for pattern in ("s*.tar", "s?.tar", "s[01].tar", "{s,t}*.tar", "**/s*.tar"):
        if pattern != "{s,t}*.tar":
            assert expand_shards(f"{folder}/{pattern}") == names
    monkeypatch.chdir(folder)
    assert expand_shards("s*.tar") == ["s0.tar", "s1.tar"]
    odd = folder / "a[1].tar"
    odd.write_bytes(shards[0].read_bytes())
    assert expand_shards(odd) == [str(odd)]
    for pattern in ("s?.tar", "s*.tar"):
        config = make_config({"base_model": "x", "data": pattern, "output": "y", "steps": 1})
        assert config.from_shards


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("images-*.tar", "images-*.tar: no file matches. {0} holds s0.tar, s1.tar."),
        ("s{{0..3}}.tar", "s2.tar: no such file (2 of 4 shards do not exist). {0} holds s0.tar, s1.tar."),
        ("sub/*.tar", "sub/*.tar: no file matches. {0}/sub holds no .tar file."),
        ("no/*.tar", "no/*.tar: no file matches. There is no folder {0}/no."),
    ],
)
def test_a_pattern_that_fits_nothing_names_what_is_there(shards: list[Path], pattern: str, words: str) -> None:
    folder = shards[0].parent
    (folder / "sub").mkdir()
    assert_refused(words.format(folder), "data", "check", f"{folder}/{pattern.format()}", "--no-sheet")


def test_a_pattern_of_many_shards_is_cut(shards: list[Path]) -> None:
    for number in range(2, 9):
        (shards[0].parent / f"s{number}.tar").touch()
    with pytest.raises(DataError, match=r"holds s0.tar, s1.tar, s2.tar, s3.tar, s4.tar and 4 more\."):
        expand_shards(f"{shards[0].parent}/x*.tar")


def test_addresses_have_no_wildcards() -> None:
    with pytest.raises(DataError, match=r"cannot hold a \*. Write images-\{000..099\}.tar"):
        expand_shards("https://host/a-*.tar?token=1")


# --- Lists

LISTS = {
    "list.json": json.dumps([{"image_file": "red.png", "text": "one"}] * 20),
    "list.jsonl": json.dumps({"file_name": "red.png", "text": "one"}) + "\n",
    "list.csv": "file_name,text\nred.png,one\n",
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("damage", ["a Git LFS pointer, not the file itself", "a web page, not the file itself"])
def test_a_list_that_is_another_file(images: Path, name: str, damage: str) -> None:
    file = images / name
    file.write_bytes(DAMAGE[damage](b""))
    words = f"{file}: {damage}; expected a list of images and captions. "
    assert_refused(words, "data", "check", file, "--no-sheet")
    with pytest.raises(DataError, match=re.escape(words)):
        find_examples(file)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("list.json", b"", "list.json: it is empty."),
        ("list.jsonl", b"\n \n", "list.jsonl: it is empty."),
        ("list.csv", b"", "list.csv: it is empty."),
        ("list.json", LISTS["list.json"][:300].encode(), "list.json: not valid JSON (Unterminated"),
        ("list.json", b"[" * 100_000, "list.json: not valid JSON ("),
        (
            "list.json",
            LISTS["list.json"].encode() + bytes(100),
            "list.json: holds zero bytes: damaged, or",
        ),
        ("list.jsonl", (LISTS["list.jsonl"] * 3)[:-20].encode(), "list.jsonl line 3: not valid JSON"),
        ("list.jsonl", LISTS["list.jsonl"].encode() + bytes(100), "list.jsonl: holds zero bytes"),
        ("list.csv", LISTS["list.csv"].encode() + bytes(100), "list.csv: holds zero bytes"),
        (
            "list.csv",
            "file_name,text\nred.png,Käse".encode("latin-1"),
            "list.csv: not UTF-8 text (byte 0xe4 at position",
        ),
    ],
)
def test_a_damaged_list_is_named(images: Path, name: str, data: bytes, words: str) -> None:
    (images / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        find_examples(images / name)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert ipadapter("data", "check", images / name, "--no-sheet")[0] == 2


# --- Face embeddings


@pytest.fixture
def face() -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(512, generator=torch.Generator().manual_seed(0)), dim=0)


def face_files(folder: Path, face: torch.Tensor) -> dict[str, Path]:
    files = {name: folder / f"face{name}" for name in (".npy", ".pt", ".bin", ".safetensors")}
    np.save(files[".npy"], face.numpy())
    save_file({"embed": face}, files[".safetensors"])
    for name in (".pt", ".bin"):
        torch.save(face, files[name])
    return files


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("damage", [*DAMAGE, "cut off", TEXT])
def test_a_face_embedding_that_is_another_file(tmp_path: Path, face: torch.Tensor, suffix: str, damage: str) -> None:
    file = face_files(tmp_path, face)[suffix]
    change = {**DAMAGE, **CUT, TEXT: lambda whole: b"no embedding at all"}[damage]
    assert torch.equal(load(file), face)
    file.write_bytes(change(file.read_bytes()))
    found = "cannot be read as" if damage == "cut off" else f"{damage}; expected"
    with pytest.raises(DataError, match=re.escape(f"{file}: {found} a face embedding. ")):
        load(file)


def load(file: Path) -> torch.Tensor:
    from ipadapter_trainer.data.face_embeds import face_id_embed

    (example,) = with_faces([Example(Path("a.png"), "", (), file)])
    return face_id_embed(example)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("damage", [*DAMAGE, "cut off"])
def test_a_table_of_faces_that_is_another_file(tmp_path: Path, face: torch.Tensor, suffix: str, damage: str) -> None:
    table = tmp_path / f"faces{suffix}"
    if suffix == ".npz":
        np.savez(table, **{"a.png": face.numpy(), "b.png": face.numpy()})
    else:
        save_file({"a.png": face, "b.png": face.clone()}, table)
    examples = [Example(Path("a.png"), ""), Example(Path("b.png"), "")]
    assert len(with_faces(examples, table)) == 2
    whole, table = table.read_bytes(), tmp_path / f"damaged{suffix}"  # the whole one is open
    table.write_bytes({**DAMAGE, **CUT}[damage](whole))
    found = "cannot be read as" if damage == "cut off" else f"{damage}; expected"
    with pytest.raises(DataError, match=re.escape(f"{table}: {found} a table of face embeddings. ")):
        with_faces(examples, table)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros(512, np.float32), "the face embedding is all zeros: no face was found, or the file is damaged."),
        (np.full(512, np.nan, np.float32), "the face embedding has values that are not finite."),
        (np.ones(128, np.float32), "expected a face embedding of 512 values, found the shape (128,)."),
        (np.array(["a"] * 512), "cannot be read as a face embedding."),
    ],
)
def test_embeddings_that_are_no_face_are_named(tmp_path: Path, values: np.ndarray, words: str) -> None:
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, values)
    examples = [Example(Path("a.png"), "", (), tmp_path / name) for name in ("a.npy", "b.npy")]
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'a.npy'}: {words}")):
        with_faces(examples)


def test_another_models_file_is_no_table_of_faces(tmp_path: Path) -> None:
    save_file({f"down.{i}.weight": torch.ones(2) for i in range(5)}, tmp_path / "unet.safetensors")
    examples = [Example(Path(name), "") for name in ("a.png", "b.png")]
    words = "has none of their names but 5 others, such as down.0.weight, down.1.weight, down.2.weight. The first"
    with pytest.raises(DataError, match=re.escape(words)):
        with_faces(examples, tmp_path / "unet.safetensors")
    with pytest.raises(DataError, match=r"none.npz: no such file. Set face_embeds to your table of face embeddings."):
        with_faces(examples, tmp_path / "none.npz")


# --- A cache


@pytest.fixture
def cache(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The settings of a training with a finished cache."""
    settings |= {"cache": str(tmp_path / "cache"), "validation_images": 0}
    write_cache(make_config(settings))
    return settings


def keys(settings: dict[str, Any], **changes: object) -> list[str]:
    return [f"{key}={value}" for key, value in {**settings, **changes}.items()]


def test_damaged_shards_of_a_cache_are_named_and_made_again(cache: dict[str, Any]) -> None:
    whole = {shard: shard.read_bytes() for shard in sorted(Path(cache["cache"]).glob("*/*.safetensors"))}
    assert len(whole) == 2
    changes: list[Callable[[bytes], bytes]] = [*CUT.values(), lambda data: b"\xff" * len(data)]
    advice = (
        "Run `ipadapter cache` with the same settings again: it makes all shards again that are missing or damaged."
    )
    for change in changes:
        for shard, data in whole.items():
            shard.write_bytes(change(data))
            assert_refused(f"{shard} is damaged. {advice}", "train", *keys(cache))
            shard.write_bytes(data)
        for shard, data in whole.items():
            shard.write_bytes(change(data))
        code, _, err = ipadapter("cache", *keys(cache))
        assert code == 0, err
        assert {shard: shard.read_bytes() for shard in whole} == whole


def test_a_shard_of_another_cache_is_named(cache: dict[str, Any], tmp_path: Path, images: Path) -> None:
    """Of the same size and shape."""
    folder, other = Path(cache["cache"]), tmp_path / "other"
    for file in images.glob("*.txt"):
        file.write_text(file.read_text().replace("square", "circle"))
    write_cache(make_config({**cache, "cache": str(other)}))
    for file in images.glob("*.txt"):
        file.write_text(file.read_text().replace("circle", "square"))
    for name in ("captions", "images"):
        shard = folder / name / "shard-00000.safetensors"
        whole = shard.read_bytes()
        shard.write_bytes((other / name / shard.name).read_bytes())
        assert_refused(f"{shard} belongs to another cache", "train", *keys(cache))
        shard.write_bytes(whole)


@pytest.mark.parametrize("damage", [*DAMAGE, "cut off", "a list"])
def test_a_damaged_manifest_is_named(cache: dict[str, Any], damage: str) -> None:
    manifest = Path(cache["cache"]) / MANIFEST
    others = {"a list": lambda whole: b"[1, 2]"}
    manifest.write_bytes({**DAMAGE, **CUT, **others}[damage](manifest.read_bytes()))
    found = damage if damage in DAMAGE else "it is damaged"
    if damage == "a list":
        found = "a text file that begins with '[1, 2]'"
    assert_refused(f"{manifest}: not a cache's manifest ({found}). Make the cache again.", "train", *keys(cache))


def test_a_manifest_without_its_images_is_named(cache: dict[str, Any]) -> None:
    manifest = Path(cache["cache"]) / MANIFEST
    content = json.loads(manifest.read_text())
    content["shards"].remove("images/shard-00000.safetensors")
    manifest.write_text(json.dumps(content))
    advice = "Run `ipadapter cache` with the same settings again."
    assert_refused(f"{cache['cache']} lacks 6 of its 13 rows. {advice}", "train", *keys(cache))


def test_what_is_no_cache_is_named(cache: dict[str, Any], images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (images, tmp_path / "nowhere", tmp_path / "file"):
        words = f"{folder} holds no cache. Run `ipadapter cache` with these settings."
        assert_refused(words, "train", *keys(cache, cache=folder))


def test_a_manifest_of_an_earlier_format_is_named(cache: dict[str, Any]) -> None:
    manifest = Path(cache["cache"]) / MANIFEST
    content = json.loads(manifest.read_text())
    assert load_file(Path(cache["cache"]) / "captions" / "shard-00000.safetensors")
    manifest.write_text(json.dumps({**content, "format": 1, "shards": {"texts": [], "images": []}}))
    words = f"{manifest}: a cache of format 1, this version reads 5. Make the cache again with `ipadapter cache`, in"
    assert_refused(words, "train", *keys(cache))
    assert_refused(words, "cache", *keys(cache))
