from __future__ import annotations

import gzip
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from ipadapter_trainer.data import http_file, shards
from ipadapter_trainer.data.augmentation import Augmentation
from ipadapter_trainer.data.face_embeds import face_id_embed
from ipadapter_trainer.data.images import open_rgb
from ipadapter_trainer.data.preprocess import Preprocessor
from ipadapter_trainer.data.shard_files import (
    expand_shards,
    fingerprint_shards,
    is_shards,
)
from ipadapter_trainer.data.shards import sample_stream, shard_loader
from ipadapter_trainer.data.tar_samples import TarSample, count_samples, index_shards, stream_samples
from ipadapter_trainer.errors import DataError
from ipadapter_trainer.models.base_model import BaseModel

from .tiny_data import assert_same, encoded_image, preprocessor_from_config, sample, write_shard

WHOLE = slice(None)


@pytest.fixture
def preprocessor(base_model: BaseModel) -> Preprocessor:
    return preprocessor_from_config(base_model)


@pytest.fixture
def four(tmp_path: Path) -> list[str]:
    """Shards of 3, 4, 5 and 6 samples, numbered through."""
    return [
        str(write_shard(tmp_path / f"s{i}.tar", {f"{n:04}": sample(n) for n in range(10 * i, 10 * i + 3 + i)}))
        for i in range(4)
    ]


def captions(preprocessor: Preprocessor, batch: Any) -> list[str]:
    tokenizer = preprocessor.tokenizers[0]
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in batch["text_input_ids"]]


def plain(resolution: int = 32, **changes: Any) -> Augmentation:
    return Augmentation(resolution, **{"image_dropout": 0.0, "text_dropout": 0.0, "both_dropout": 0.0, **changes})


def numbers(shards: list[str], part: slice, many: int, skip: int = 0, seed: int = 0) -> list[tuple[int, str]]:
    stream = sample_stream(shards, part, seed, [], skip)
    return [(epoch, Path(raw.name).name) for epoch, raw in islice(stream, many)]


# --- Names


def test_patterns_lists_and_addresses(four: list[str], tmp_path: Path) -> None:
    assert expand_shards(f"{tmp_path}/s{{0..3}}.tar") == four
    assert expand_shards(Path(tmp_path / "s{0..1}.tar")) == four[:2]
    assert expand_shards(f"{four[2]}::{four[0]}") == [four[2], four[0]]
    assert expand_shards([four[1], "https://host/a/{1..2}.tar?key=1"]) == [
        four[1],
        "https://host/a/1.tar?key=1",
        "https://host/a/2.tar?key=1",
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("pipe:cat a.tar", "not by 'pipe'"),
        ("s3://bucket/a.tar", "not by 's3'"),
        ("gs://bucket/{0..3}.tar", "not by 'gs'"),
        ("file:///a.tar", "not by 'file'"),
        ("a.zip::b.tar", "a.zip: expected a shard"),
        ("absent-{0..9}.tar", r"absent-0.tar: no such file \(10 of 10"),
        ("a{0..3.tar", "not a pattern|no such file"),
        ([], "No shards are given"),
    ],
)
def test_other_names_are_refused(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        expand_shards(data)


def test_shards_are_recognised_by_their_names() -> None:
    for data in ("a.tar", "a-{0..3}.tar", "https://host/a.tar?download=true", ["a.tar"], Path("a.tgz")):
        assert is_shards(data)
    for data in ("images", "a.json", Path("a.jsonl")):
        assert not is_shards(data)


def test_the_fingerprint_depends_on_names_and_sizes(four: list[str], tmp_path: Path) -> None:
    before = fingerprint_shards(four)
    assert fingerprint_shards(four[:3]) != before
    write_shard(Path(four[0]), {f"{n}": sample(n) for n in range(30)})
    assert fingerprint_shards(four) != before


# --- Samples


def test_a_sample_has_an_image_a_caption_a_reference_and_a_face(tmp_path: Path) -> None:
    face = io.BytesIO()
    np.save(face, np.ones(512, dtype=np.float32))
    image, other = (encoded_image(Image.new("RGB", (8, 8), colour), "jpeg") for colour in ("red", "blue"))
    files = {"JPG": image, "txt": b" a caption\n", "reference.jpg": other, "face.npy": face.getvalue()}
    shard = write_shard(tmp_path / "a.tar", {"sub/01": files, "sub/02": {"webp": b"", "json": b'{"caption": "two"}'}})
    one, two = (raw.example() for raw in stream_samples(str(shard), print))
    assert (one.name, one.text) == ("a.tar/sub/01.JPG", "a caption")
    assert [file.read_bytes() for file in (one.image, *one.references)] == [image, other]
    assert face_id_embed(one).shape == (512,)
    assert (two.text, two.references, two.face_id_embed) == ("two", (), None)


def test_other_files_of_a_sample_are_no_mistakes(tmp_path: Path) -> None:
    others = ("faces.json", "reference2.jpg", "face1.npy", "surface.npy", "preference.txt", "cls", "mask.png")
    shard = write_shard(tmp_path / "a.tar", {"1": {"png": b"", "txt": b"a", **dict.fromkeys(others, b"")}})
    (sample,) = stream_samples(str(shard), print)
    assert sample.example().references == ()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"txt": b"a"}, r"a.tar/1: no image .*among its files \(txt\)"),
        ({"png": b""}, "a.tar/1: no caption"),
        ({"png": b"", "json": json.dumps({"title": "a"}).encode()}, "a.tar/1: no caption"),
        ({"png": b"", "json": b"{"}, "its caption cannot be read"),
        ({"png": b"", "txt": b"\xff"}, "a.tar/1.txt: not UTF-8 text"),
        ({"png": b"", "txt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0"}, "1.txt: .*Git LFS"),
        ({"png": b"", "json": b"<!doctype html><html></html>"}, "1.json: a web page"),
        ({"png": b"", "txt": b"a", "refrence.jpg": b""}, "a.tar/1: .refrence.jpg .* mean .reference.jpg"),
        ({"png": b"", "txt": b"a", "faces.npy": b""}, "a.tar/1: .faces.npy .* mean .face.npy"),
        (
            {"png": b"", "txt": b"a", "face.npy": b"a"},
            "1.face.npy: a text file that begins with 'a'; expected a face embedding",
        ),
    ],
)
def test_missing_and_broken_files_of_a_sample_are_named(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    (raw,) = stream_samples(str(write_shard(tmp_path / "a.tar", {"1": files})), print)
    with pytest.raises(DataError, match=words):
        face_id_embed(raw.example())


def test_references_and_faces_reach_the_batch(preprocessor: Preprocessor, tmp_path: Path) -> None:
    face = io.BytesIO()
    np.save(face, np.eye(1, 512, dtype=np.float32))
    blue = encoded_image(Image.new("RGB", (40, 40), "blue"))
    files = {**sample(1), "reference.png": blue, "face.npy": face.getvalue()}
    shard = write_shard(tmp_path / "a.tar", {"1": files, "2": sample(2)})
    loader = shard_loader([str(shard)], replace(preprocessor, takes_face=True), plain(), batch_size=2, num_workers=0)
    batch = next(iter(loader))
    assert batch["face_id_embed"].shape == (2, 512)
    assert batch["clip_images"][:, :, 0, 0].argmax(dim=1).tolist() == [2, 2]
    assert batch["broken"] == ["a.tar/2.png: no face embedding (id_embed_file, face_embeds, or .face.npy in a shard)."]


# --- Order


def test_an_epoch_has_every_sample_and_another_order_each(four: list[str]) -> None:
    stream = numbers(four, WHOLE, 54)
    epochs = [stream[18 * i : 18 * i + 18] for i in range(3)]
    for i, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {i}
        assert len({key for _, key in epoch}) == 18
    assert len({tuple(key for _, key in epoch) for epoch in epochs}) == 3
    assert numbers(four, WHOLE, 18, seed=1) != epochs[0]
    inside = [key for _, key in epochs[0] if key.startswith("003")]
    assert inside != sorted(inside)  # shuffled within a shard too


def test_processes_and_workers_share_an_epoch(four: list[str]) -> None:
    shares = [
        [key for e, key in numbers(four, slice(p + 2 * w, None, 4), 30) if e == 0] for p in range(2) for w in range(2)
    ]
    assert sorted(key for share in shares for key in share) == sorted(key for _, key in numbers(four, WHOLE, 18))


@pytest.mark.parametrize("skip", [1, 3, 17, 18, 40, 100])
def test_a_skip_goes_where_reading_would(four: list[str], skip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = numbers(four, WHOLE, skip + 10)
    assert numbers(four, WHOLE, 10, skip) == whole[skip:]
    monkeypatch.setattr(shards, "count_samples", lambda shard: None)  # as for a URL
    assert numbers(four, WHOLE, 10, skip) == whole[skip:]


def test_whole_shards_are_skipped_unread(four: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def spying(shard: str, *arguments: Any) -> Iterator[TarSample]:
        opened.append(shard)
        return stream_samples(shard, *arguments)

    monkeypatch.setattr(shards, "stream_samples", spying)
    numbers(four, WHOLE, 1, skip=18 * 1000)
    assert len(opened) == 1


def test_counting_agrees_with_reading(four: list[str], tmp_path: Path) -> None:
    assert [count_samples(shard) for shard in four] == [3, 4, 5, 6]
    odd = {"a/1": sample(1), "a/2": {"png": b"", "txt": b"", "reference.png": b""}, "__meta__/x": {"txt": b""}}
    shard = write_shard(tmp_path / "odd.tar", {**odd, "README": {"": b""}, "b": {"TXT": b"", "json": b""}})
    assert count_samples(str(shard)) == len(list(stream_samples(str(shard), print)))
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(Path(four[3]).read_bytes()[:3000])
    assert count_samples(str(damaged)) is None


def test_two_neighbours_with_one_name_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for name in ("1.png", "1.txt", "1.png", "1.txt", "2.png", "2.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"a"))
    problems: list[str] = []
    assert [raw.name for raw in stream_samples(str(shard), problems.append)] == ["a.tar/1", "a.tar/2"]
    assert problems == ["a.tar/1: more than one .txt; the first is read. Give each sample a name of its own."]
    assert count_samples(str(shard)) == len(index_shards([str(shard)])) == 2
    assert problems[0] in caplog.text


# --- Batches


def test_batches_are_the_same_with_any_resume(four: list[str], preprocessor: Preprocessor) -> None:
    augmentation = Augmentation(32, seed=3, flip=True, crop="random", noise_offset=0.1)
    options: dict[str, Any] = {"batch_size": 2}
    for num_workers in (0, 2):
        whole = list(islice(shard_loader(four, preprocessor, augmentation, num_workers=num_workers, **options), 9))
        for start in (1, 4):
            late = shard_loader(four, preprocessor, augmentation, num_workers=num_workers, start=start, **options)
            for one, other in zip(whole[start:], islice(late, 9 - start), strict=True):
                assert_same(one, other)


def test_one_worker_is_like_none(four: list[str], preprocessor: Preprocessor) -> None:
    made = [shard_loader(four, preprocessor, plain(), batch_size=3, num_workers=num_workers) for num_workers in (0, 1)]
    for one, other in zip(islice(made[0], 4), islice(made[1], 4), strict=True):
        assert_same(one, other)


def test_randomness_comes_from_the_sample_not_from_the_batch(four: list[str], preprocessor: Preprocessor) -> None:
    drawn: list[dict[str, torch.Tensor]] = []
    for batch_size in (3, 6):
        batches = islice(
            shard_loader(four, preprocessor, plain(), batch_size=batch_size, num_workers=0), 18 // batch_size
        )
        by_text = {}
        for batch in batches:
            by_text |= dict(zip(captions(preprocessor, batch), batch["noise"], strict=True))
        drawn.append(by_text)
    assert len(drawn[0]) == 18
    assert_same(drawn[0], drawn[1])


def test_too_few_shards_say_what_to_do(four: list[str], preprocessor: Preprocessor) -> None:
    with pytest.raises(DataError, match=r"4 shards for 2 processes with 3 workers each.*Set num_workers=2"):
        shard_loader(four, preprocessor, plain(), batch_size=1, processes=2, num_workers=3)
    with pytest.raises(DataError, match=r"4 shards for 5 processes.*[Ff]ewer processes"):
        shard_loader(four, preprocessor, plain(), batch_size=1, processes=5, num_workers=0)


# --- Broken


def test_a_broken_sample_is_replaced_and_named(tmp_path: Path, preprocessor: Preprocessor) -> None:
    samples = {f"{n}": sample(n) for n in range(6)}
    for n in (0, 2):
        samples[f"{n}"]["png"] = b"no image"
    del samples["4"]["txt"]
    shard = str(write_shard(tmp_path / "a.tar", samples))
    batches = list(islice(shard_loader([shard], preprocessor, plain(), batch_size=3, num_workers=0), 4))
    for epoch in (batches[:2], batches[2:]):
        named = sorted(line.split(":")[0] for batch in epoch for line in batch["broken"])
        assert named == ["a.tar/0", "a.tar/2", "a.tar/4"]
    for batch in batches:
        assert len(batch["images"]) == 3
        assert set(captions(preprocessor, batch)) <= {"caption 1", "caption 3", "caption 5"}
        assert len({float(noise.flatten()[0]) for noise in batch["noise"]}) == 3


def test_a_batch_of_broken_samples_borrows_one(tmp_path: Path, preprocessor: Preprocessor) -> None:
    """With batches of one, a broken sample is a broken batch."""
    samples = {f"{n}": sample(n) for n in range(5)}
    for n in (1, 2, 4):
        samples[f"{n}"]["png"] = b""
    shard = str(write_shard(tmp_path / "a.tar", samples))
    whole = list(islice(shard_loader([shard], preprocessor, plain(), batch_size=1, num_workers=0), 10))
    assert sum(len(batch["broken"]) for batch in whole) == 6
    for start in (1, 3, 7):
        late = shard_loader([shard], preprocessor, plain(), batch_size=1, num_workers=0, start=start)
        for one, other in zip(whole[start:], islice(late, 10 - start), strict=True):
            assert_same(one, other)


def test_nothing_but_broken_samples_is_one_clear_error(
    tmp_path: Path, preprocessor: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_LOOK_AHEAD", 20)
    shard = str(write_shard(tmp_path / "a.tar", {"1": {"png": b"", "txt": b"a"}, "2": {"png": b"", "txt": b"b"}}))
    with pytest.raises(DataError, match=r"None of 21 samples in a row can be used. The first: a\.tar/"):
        next(iter(shard_loader([shard], preprocessor, plain(), batch_size=2, num_workers=0)))


def test_a_damaged_shard_ends_early_and_is_named(four: list[str], preprocessor: Preprocessor, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(four[3]).read_bytes()[:4000])
    broken: list[str] = []
    keys = [raw.name for raw in stream_samples(str(cut), broken.append)]
    assert 0 < len(keys) < 6
    assert len(broken) == 1 and "cut.tar" in broken[0] and "unexpected end" in broken[0]
    loader = shard_loader([str(cut), *four[:3]], preprocessor, plain(), batch_size=4, num_workers=0)
    assert any("cut.tar" in line for batch in islice(loader, 6) for line in batch["broken"])
    (tmp_path / "no.tar").write_text("no tar file" * 100)
    with pytest.raises(DataError, match=r"hold no sample.*no\.tar"):
        next(iter(shard_loader([str(tmp_path / "no.tar")], preprocessor, plain(), batch_size=1, num_workers=0)))


def test_a_compressed_shard_that_ends_early_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(write_shard(tmp_path / "a.tar", {f"{n}": sample(n) for n in range(9)}).read_bytes())
    shard = tmp_path / "b.tar.gz"
    for length in (len(whole) // 2, len(whole) // 3):
        shard.write_bytes(whole[:length])
        report: list[str] = []
        assert len(list(stream_samples(str(shard), report.append))) < 9
        assert len(report) == 1 and report[0].startswith(f"{shard}: cut off or damaged (")
    shard.write_bytes(whole)
    assert len(list(stream_samples(str(shard), pytest.fail))) == 9


# --- By URL


class Host(BaseHTTPRequestHandler):
    """Serves a folder. Some connections break off, some requests fail; both only for a while."""

    folder: Path
    breaks: list[int]  # bytes after which the next connections end
    failures: list[int]  # statuses of the next requests
    seen: list[str]
    ranges = True

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Range", ""))
        file = self.folder / self.path[1:].split("?")[0]
        if self.failures or not file.is_file():
            self.send_error(self.failures.pop() if self.failures else 404)
            return
        data = file.read_bytes()
        start = int(((self.ranges and self.headers.get("Range")) or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: self.breaks.pop() if self.breaks else None])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Host]]]:
    monkeypatch.setattr(http_file, "RETRIES", http_file.RETRIES.new(backoff_factor=0))
    handler = type("TestHost", (Host,), {"folder": tmp_path, "breaks": [], "failures": [], "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_shards_by_url_are_like_local_ones(
    four: list[str], host: tuple[str, type[Host]], preprocessor: Preprocessor
) -> None:
    urls = expand_shards(f"{host[0]}/s{{0..3}}.tar?token=a")
    for start in (0, 3):
        local, remote = (
            islice(shard_loader(data, preprocessor, plain(), batch_size=2, num_workers=0, start=start), 5)
            for data in (four, urls)
        )
        for one, other in zip(local, remote, strict=True):
            assert_same(one, other)


def test_a_broken_connection_is_taken_up_again(four: list[str], host: tuple[str, type[Host]]) -> None:
    address, server = host
    server.breaks += [700, 1500]
    server.failures += [503]
    broken: list[str] = []
    keys = [raw.name for raw in stream_samples(f"{address}/s3.tar", broken.append)]
    assert keys == [raw.name for raw in stream_samples(four[3], print)]
    assert broken == []
    assert server.seen == ["", "", "bytes=1500-", "bytes=2200-"]


def test_a_server_without_ranges_sends_all_again(four: list[str], host: tuple[str, type[Host]]) -> None:
    address, server = host
    server.ranges = False
    server.breaks += [700, 1500]
    keys = [raw.name for raw in stream_samples(f"{address}/s3.tar", pytest.fail)]
    assert keys == [raw.name for raw in stream_samples(four[3], print)]
    assert server.seen == ["", "bytes=1500-", "bytes=1500-"]  # it broke off again before byte 1500


def test_a_shard_that_is_not_there_is_named(four: list[str], host: tuple[str, type[Host]]) -> None:
    broken: list[str] = []
    assert list(stream_samples(f"{host[0]}/absent.tar", broken.append)) == []
    assert "absent.tar: cannot be opened (HTTP status 404 Not Found)." in broken[0]
    assert len(host[1].seen) == 1  # asked once


def test_a_server_that_cannot_be_reached_is_an_error(host: tuple[str, type[Host]]) -> None:
    with pytest.raises(DataError, match=r"http://127.0.0.1:9/a.tar: .*attempts\). Check the network"):
        next(stream_samples("http://127.0.0.1:9/a.tar", print))
    host[1].failures += [500] * 20
    with pytest.raises(DataError, match=r"too many 500 error responses"):
        http_file.HttpFile(f"{host[0]}/s0.tar")


# --- As examples


def test_indexed_samples_are_those_of_the_stream(tmp_path: Path) -> None:
    """Every file of a sample, read at its offset in the shard, is what the stream gives."""
    face = io.BytesIO()
    np.save(face, np.arange(512, dtype=np.float32))
    prompt = encoded_image(Image.new("RGB", (9, 9), "blue"), "jpeg")
    first = write_shard(
        tmp_path / "a.tar",
        {
            "cats/one": {**sample(1), "json": b'{"text": "not this"}'},
            "no image": {"txt": b"nothing"},
            "last": {
                "JPG": prompt,
                "json": b'{"caption": " said "}',
                "reference.jpg": prompt,
                "face.npy": face.getvalue(),
            },
        },
    )
    second = write_shard(tmp_path / "b.tar", {"0": sample(2), "1": sample(3)})
    shards = [str(first), str(second)]
    raw = [row for shard in shards for row in stream_samples(shard, pytest.fail)]
    streamed = [row.example() for row in raw if row.name != "a.tar/no image"]
    indexed = index_shards(shards)
    assert [example.text for example in indexed] == [row.text for row in streamed]
    for example, row in zip(indexed, streamed, strict=True):
        assert open_rgb(example.image)[0].tobytes() == open_rgb(row.image)[0].tobytes()
        assert [r.read_bytes() for r in example.references] == [r.read_bytes() for r in row.references]
    assert torch.equal(face_id_embed(indexed[1]), torch.arange(512.0))
    assert indexed[1].name == f"{first}/last.JPG"


def test_index_leaves_out_what_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = write_shard(tmp_path / "a.tar", {"0": sample(0), "1": {"png": b""}, "2": sample(2), "3": sample(3)})
    damaged = tmp_path / "b.tar"
    damaged.write_bytes(shard.read_bytes()[: -2 * 10240] + b"x" * 700)
    indexed = index_shards([str(shard), str(damaged)])
    assert [example.text for example in indexed][:3] == ["caption 0", "caption 2", "caption 3"]
    assert "left out" in caplog.text
    assert "a.tar/1: no caption" in caplog.text
    with pytest.raises(DataError, match=r"s\.tar\.gz is compressed.*[Dd]ownload or unpack"):
        index_shards([f"{tmp_path}/s.tar.gz"])
    with pytest.raises(DataError, match=r"https://host/s\.tar is a URL"):
        index_shards(["https://host/s.tar"])
    damaged.write_bytes(b"no tar")
    with pytest.raises(DataError, match="hold no sample"):
        index_shards([str(damaged)])
    # Found at the start, gone or cut off when it is its turn.
    shard.write_bytes(shard.read_bytes()[:1200])
    with pytest.raises(DataError, match=r"cut off after .* Make or download"):
        open_rgb(indexed[2].image)


def test_what_is_no_image_is_named_as_a_file_is(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", {"0": {"png": b"\xfe\xfebc", "txt": b"text"}})
    with pytest.raises(UnidentifiedImageError, match=r"cannot identify image file '.*a\.tar/0\.png'"):
        open_rgb(index_shards([str(shard)])[0].image)
