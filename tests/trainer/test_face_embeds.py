from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ipadapter_trainer.data.examples import Example, TableEntry, find_examples
from ipadapter_trainer.data.face_embeds import face_id_embed, read_face_embed, with_faces
from ipadapter_trainer.errors import DataError


def embed(number: int, width: int = 512) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(number), width).float()


def table_of(path: Path, **tensors: torch.Tensor) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{key: tensor.numpy() for key, tensor in tensors.items()})
    else:
        save_file(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_table_by_bare_and_by_relative_names(images: Path, tmp_path: Path, suffix: str) -> None:
    (images / "sub").mkdir()
    (images / "red.png").rename(images / "sub" / "red.png")
    (images / "red.txt").rename(images / "sub" / "red.txt")
    names = {"blue.png": embed(1), "sub/red.png": embed(2)[None], "teal.png": embed(3).half()}
    table = table_of(tmp_path / f"faces{suffix}", **names)
    found = with_faces(find_examples(images), table, images)
    by_text = {example.text.split()[1]: face_id_embed(example) for example in found}
    assert {text: int(face.argmax()) for text, face in by_text.items()} == {"blue": 1, "red": 2, "teal": 3}
    assert {(face.dtype, face.shape) for face in by_text.values()} == {(torch.float32, (512,))}


def test_images_without_a_face_are_left_out(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = table_of(tmp_path / "faces.safetensors", **{"red.png": embed(0), "unused.png": embed(1)})
    assert [e.text for e in with_faces(find_examples(images), table, images)] == ["a red square"]
    assert "5 of 6 images have no face embedding" in caplog.text
    with pytest.raises(DataError, match=r"None of the 6 images has a face embedding.*has none of their names"):
        with_faces(find_examples(images), table_of(tmp_path / "x.npz", other=embed(0)), images)
    with pytest.raises(DataError, match=r"id_embed_file"):
        with_faces(find_examples(images))


def test_a_name_of_two_images_is_refused(tmp_path: Path) -> None:
    examples = [Example(tmp_path / folder / "a.png", "") for folder in ("one", "two")]
    table = table_of(tmp_path / "faces.npz", **{"a.png": embed(0)})
    with pytest.raises(DataError, match=r"the key 'a.png' fits both .*one/a.png and .*two/a.png"):
        with_faces(examples, table, tmp_path)
    repeated = [examples[0], Example(examples[0].image, "another caption")]
    assert len(with_faces(repeated, table, tmp_path)) == 2


def test_a_rows_own_file_goes_first(tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", embed(7).numpy())
    table = table_of(tmp_path / "faces.safetensors", **{"a.png": embed(0)})
    examples = [Example(tmp_path / "a.png", "", (), tmp_path / "own.npy"), Example(tmp_path / "a.png", "")]
    own, other = with_faces(examples, table, tmp_path)
    assert int(face_id_embed(own).argmax()) == 7
    assert other.face_id_embed == TableEntry(table, "a.png")


def test_the_originals_file_holds_a_numpy_array(tmp_path: Path) -> None:
    """`torch.save` of insightface's array, as its issues show; both names that numpy has pickled it under."""
    array = np.random.default_rng(0).normal(size=512).astype(np.float32)
    file, older = tmp_path / "faceid.bin", tmp_path / "older.bin"
    torch.save(array, file)
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(older, "w") as other:
        for name in archive.namelist():
            module = b"numpy.core" if b"numpy._core" in archive.read(name) else b"numpy._core"
            swapped = b"numpy._core" if module == b"numpy.core" else b"numpy.core"
            other.writestr(name, archive.read(name).replace(swapped, module))
    for path in (file, older):
        assert torch.equal(read_face_embed(path), torch.from_numpy(array))
    torch.save(embed(3), tmp_path / "tensor.pt")
    assert torch.equal(read_face_embed(tmp_path / "tensor.pt"), embed(3))


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harm",)


def test_no_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Harmful(), "a.bin")
    np.save("b.npy", np.array([Harmful()], dtype=object))
    for name in ("a.bin", "b.npy"):
        with pytest.raises(DataError, match=name):
            read_face_embed(Path(name))
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("a.npy", np.ones(128, dtype=np.float32), r"of 512 values, found the shape \(128,\)"),
        ("a.npy", np.full(512, np.nan, dtype=np.float32), "not finite"),
        ("a.npy", None, "begins with 'no embedding'; expected a face embedding"),
        ("a.txt", None, r"expected a face embedding \(.npy"),
    ],
)
def test_a_bad_embedding_is_named(tmp_path: Path, name: str, values: np.ndarray | None, words: str) -> None:
    file = tmp_path / name
    if values is None:
        file.write_text("no embedding")
    else:
        np.save(file, values)
    with pytest.raises(DataError, match=words):
        with_faces([Example(tmp_path / "a.png", "", (), file)])


def test_a_bad_table_is_named(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.npz", "c.csv"):
        (tmp_path / name).write_text("no table")
        with pytest.raises(DataError, match=name):
            with_faces([Example(tmp_path / "a.png", "")], tmp_path / name)


def test_embeddings_that_are_not_normed_are_remarked_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = table_of(tmp_path / "faces.npz", **{"a.png": 20 * embed(0)})
    with_faces([Example(tmp_path / "a.png", "")], table)
    assert "norms from 20 to 20" in caplog.text and "normed_embedding" in caplog.text
