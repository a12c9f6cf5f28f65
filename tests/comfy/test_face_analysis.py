"""Load Face Analysis and what is seen with it: insightface itself, onnxruntime itself, small models."""

from __future__ import annotations

import copy
import json
import socket
import sys

import numpy as np
import pytest
import torch


@pytest.fixture
def root(comfyui, pack, tmp_path, monkeypatch):
    """models/insightface of this test."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "insightface", ([str(tmp_path / "insightface")], set()))
    return tmp_path / "insightface" / "models"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def analysis(face_models, pack, root):
    face_models.write_pack(root / "buffalo_l")
    return pack.face_analysis.load_face_analysis("buffalo_l")


def test_only_detection_and_recognition_are_loaded(face_models, pack, root, monkeypatch):
    import onnxruntime

    face_models.write_pack(root / "buffalo_l")
    opened = []
    start = onnxruntime.InferenceSession.__init__

    def spy(self, path, *args, **kwargs):
        opened.append(str(path).rpartition("/")[2])
        start(self, path, *args, **kwargs)

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", spy)
    (analysis,) = pack.LoadFaceAnalysis.execute("buffalo_l", "CPU").args
    pack.faces.find_faces(analysis, face_models.draw_faces((16, 5, 5)))
    pack.faces.find_faces(analysis, face_models.draw_faces())  # looked at in every size
    assert opened == ["det_10g.onnx", "w600k_r50.onnx"]
    assert type(analysis.detector).__name__ == "SCRFD" and type(analysis.recognizer).__name__ == "ArcFaceONNX"
    assert analysis.detector.session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("nested", [False, True])
def test_any_folder_of_models_is_listed_and_loaded(face_models, pack, root, nested):
    """By what the files are, whatever their names; antelopev2.zip holds a folder of its own."""
    folder = root / "mine" / "mine" if nested else root / "mine"
    face_models.write_pack(folder, detector="a.onnx", recognizer="z.onnx")
    (root / "empty").mkdir()
    assert pack.face_analysis.list_packs() == ["buffalo_l", "antelopev2", "mine"]
    analysis = pack.face_analysis.load_face_analysis("mine")
    assert pack.faces.find_faces(analysis, face_models.draw_faces((16, 5, 5)))


def test_extra_model_paths(face_models, pack, root, tmp_path):
    import folder_paths

    folder_paths.folder_names_and_paths["insightface"][0].append(str(tmp_path / "elsewhere"))
    face_models.write_pack(
        tmp_path / "elsewhere" / "models" / "antelopev2", detector="scrfd_10g_bnkps.onnx", recognizer="glintr100.onnx"
    )
    assert pack.face_analysis.load_face_analysis("antelopev2").name == "antelopev2"


def test_absent_insightface(pack, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface", None)
    with pytest.raises(pack.core.AdapterError) as error:
        pack.LoadFaceAnalysis.execute("buffalo_l")
    assert f'"{sys.executable}" -m pip install "insightface>=2"' in str(error.value)
    assert "restart ComfyUI" in str(error.value)


def test_absent_models_are_named_and_not_downloaded(face_models, pack, root, no_network):
    with pytest.raises(pack.core.AdapterError) as error:
        pack.LoadFaceAnalysis.execute("antelopev2")
    for part in (str(root / "antelopev2"), "scrfd_10g_bnkps.onnx", "glintr100.onnx", "antelopev2.zip", "research only"):
        assert part in str(error.value)
    assert not root.exists()
    face_models.write_detector((root / "half").mkdir(parents=True) or root / "half" / "a.onnx")
    with pytest.raises(pack.core.AdapterError, match=r"half holds no recognition model"):
        pack.LoadFaceAnalysis.execute("half")


def test_a_detector_without_landmarks_is_refused(face_models, pack, root):
    (root / "blind").mkdir(parents=True)
    face_models.write_detector(root / "blind" / "a.onnx", landmarks=False)
    face_models.write_recognizer(root / "blind" / "b.onnx")
    with pytest.raises(pack.core.AdapterError, match=r"a detection model without landmarks: a\.onnx, b\.onnx\."):
        pack.LoadFaceAnalysis.execute("blind")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", r"an empty file \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file itself"),
        (b"<!doctype html>", "a web page, not the file itself"),
    ],
)
def test_another_file_in_the_place_of_a_model(face_models, pack, root, content, found):
    face_models.write_pack(root / "buffalo_l")
    (root / "buffalo_l" / "w600k_r50.onnx").write_bytes(content)
    message = rf"w600k_r50\.onnx: {found}; expected an ONNX model\. Download it again from https://\S+/v0\.7\."
    with pytest.raises(pack.core.AdapterError, match=message):
        pack.LoadFaceAnalysis.execute("buffalo_l")


@pytest.mark.parametrize("name", ["det_10g.onnx", "w600k_r50.onnx"])
@pytest.mark.parametrize("kept", [16, 0.5, 0.99])
def test_damaged_file(face_models, pack, root, name, kept):
    file = face_models.write_pack(root / "buffalo_l") / name
    content = file.read_bytes()
    file.write_bytes(content[: kept if kept > 1 else int(len(content) * kept)])
    with pytest.raises(
        pack.core.AdapterError, match=rf"{name}: onnxruntime cannot load it .*download it again from https://"
    ):
        pack.LoadFaceAnalysis.execute("buffalo_l")


def test_a_model_of_another_kind(face_models, pack, root):
    folder = face_models.write_pack(root / "buffalo_l")
    (folder / "w600k_r50.onnx").write_bytes((folder / "genderage.onnx").read_bytes())
    with pytest.raises(pack.core.AdapterError) as error:
        pack.LoadFaceAnalysis.execute("buffalo_l")
    found = f"{folder} holds no recognition model: det_10g.onnx, w600k_r50.onnx."
    assert str(error.value).startswith(
        f"{found} Put det_10g.onnx and w600k_r50.onnx there, from buffalo_l.zip at https"
    )


def test_a_provider_that_onnxruntime_has_not(face_models, pack, root):
    face_models.write_pack(root / "buffalo_l")
    with pytest.raises(pack.core.AdapterError, match=r"offers CPU, not CoreML\. Choose CPU"):
        pack.LoadFaceAnalysis.execute("buffalo_l", "CoreML")


def test_a_replaced_file_is_loaded_again(face_models, pack, root):
    stamp = pack.LoadFaceAnalysis.fingerprint_inputs
    before = stamp("buffalo_l")
    face_models.write_pack(root / "buffalo_l")
    first = stamp("buffalo_l")
    face_models.write_recognizer(root / "buffalo_l" / "w600k_r50.onnx", width=256)
    assert len({before, first, stamp("buffalo_l")}) == 3
    assert stamp(None) == stamp(None)


def test_a_copy_is_the_same(analysis):
    assert copy.deepcopy({"a": analysis})["a"] is analysis


def test_boxes_and_landmarks(analysis, face_models, pack):
    faces = pack.faces.find_faces(analysis, face_models.draw_faces((8, 10, 20), (32, 12, 4)))
    assert len(faces) == 2
    small = next(face for face in faces if face.box[0] < 200)
    # The grid's points are the upper left corners of the cells.
    assert np.allclose(
        small.box,
        [
            80 - 8 * face_models.REACH,
            160 - 8 * face_models.REACH,
            80 + 8 * face_models.REACH,
            160 + 8 * face_models.REACH,
        ],
        atol=1e-3,
    )
    assert np.allclose(small.landmarks, np.array([80, 160]) + 8 * face_models.LANDMARKS, atol=1e-3)
    large = next(face for face in faces if face is not small)
    assert np.allclose(large.landmarks, np.array([384, 128]) + 32 * face_models.LANDMARKS, atol=1e-3)


def test_orders(analysis, face_models, pack):
    image = face_models.draw_faces((8, 10, 20), (32, 12, 4), (16, 30, 30))
    faded = image[160:168, 80:88]
    faded *= 0.95  # the small face is less certain
    faces = pack.faces.find_faces(analysis, image)

    def left_edges(order):
        return [round(pack.faces.choose_face(faces, order, i).box[0]) for i in range(3)]

    assert left_edges("largest") == [336, 456, 68]
    assert left_edges("left to right") == [68, 336, 456]
    assert left_edges("most certain")[2] == 68
    assert pack.faces.choose_face(faces, "largest", 3) is None
    with pytest.raises(pack.core.AdapterError, match="Unknown order of faces"):
        pack.faces.choose_face(faces, "best")


def test_smaller_detection_sizes(face_models, pack, root):
    image = face_models.draw_faces(*[(32, column, row) for column in range(6, 14) for row in range(6, 14)])
    for largest in (640, 384, 256, 192):
        face_models.write_pack(root / f"up-to-{largest}", largest_input=largest)
        analysis = pack.face_analysis.load_face_analysis(f"up-to-{largest}")
        faces = pack.faces.find_faces(analysis, image)
        assert bool(faces) == (largest >= 256)
        if faces:
            assert all(192 - 80 < face.landmarks[2][0] < 448 + 80 for face in faces)  # in pixels of the image itself


@pytest.mark.parametrize("size", [224, 256, 336])
def test_embeddings_and_crops_are_insightfaces_own(analysis, face_models, pack, root, size):
    """Against FaceAnalysis.get and norm_crop, called as their documentation does."""
    from insightface.app import FaceAnalysis
    from insightface.utils import face_align

    image = torch.stack([face_models.draw_faces((32, 10, 9)), face_models.draw_faces((16, 11, 12))])
    own = FaceAnalysis(name=str(root / "buffalo_l"), providers=["CPUExecutionProvider"])
    own.prepare(ctx_id=0, det_size=(640, 640))
    raw = pack.faces.face_features(analysis, image, size, unnormalised=True)
    normed = pack.faces.face_features(analysis, image, size)
    assert raw.rows == normed.rows == (0, 1)
    assert normed.crops.shape == (2, size, size, 3) and normed.embeddings.shape == (2, 512)
    for row, pixels in enumerate(image):
        bgr = (pixels.numpy()[..., ::-1] * 255).astype(np.uint8)
        face = own.get(bgr)[0]
        assert np.allclose(raw.embeddings[row], face.embedding, atol=1e-6)
        assert np.allclose(normed.embeddings[row], face.normed_embedding, atol=1e-6)
        crop = face_align.norm_crop(bgr, landmark=face.kps, image_size=size)[..., ::-1] / 255
        assert np.abs(normed.crops[row].numpy() - crop).max() < 1e-6
    assert not torch.allclose(raw.embeddings[0], raw.embeddings[1], atol=1e-2)
    assert torch.allclose(normed.embeddings.norm(dim=1), torch.ones(2))
    # The eyes of the crop are where the face was drawn: the cell is in the middle of its features.
    assert normed.crops[0, ..., 2].max() > 0.9 and normed.crops[1, ..., 1].max() > 0.9


def test_no_face(analysis, face_models, pack):
    images = torch.stack(
        [
            face_models.draw_faces((32, 10, 9)),
            face_models.draw_faces(),
            face_models.draw_faces((16, 11, 12), (16, 20, 20)),
        ]
    )
    features, error = pack.faces.face_features, pack.core.AdapterError
    with pytest.raises(error, match=r"image 2 of 3 shows no face that was found\. .*space around it"):
        features(analysis, images, 224)
    assert features(analysis, images, 224, no_face="skip").rows == (0, 2)
    with pytest.raises(error, match=r"image 1 of 3 shows 1 face; face_index 1 is beyond them"):
        features(analysis, images, 224, index=1)
    assert features(analysis, images, 224, index=1, no_face="skip").rows == (2,)
    with pytest.raises(error, match="shows a face, so nothing is left"):
        features(analysis, images[1:2], 224, no_face="skip")
    with pytest.raises(error, match="shows the face at face_index 2"):
        features(analysis, images, 224, index=2, no_face="skip")


def test_a_recognizer_of_zeros_is_named(face_models, pack, root):
    face_models.write_pack(root / "zeros")
    face_models.write_recognizer(root / "zeros" / "w600k_r50.onnx", scale=0.0)
    analysis = pack.face_analysis.load_face_analysis("zeros")
    with pytest.raises(pack.core.AdapterError, match="recognition model of zeros makes NaN"):
        pack.faces.face_features(analysis, face_models.draw_faces((32, 10, 9))[None], 224)


def test_images_of_any_kind(analysis, face_models, pack):
    image = face_models.draw_faces((32, 6, 5), size=(400, 640))[None]
    with_alpha = torch.cat([image, torch.ones(1, 400, 640, 1)], dim=-1)
    first = pack.faces.face_features(analysis, image, 224)
    second = pack.faces.face_features(analysis, with_alpha, 224)
    assert torch.equal(first.embeddings, second.embeddings) and torch.equal(first.crops, second.crops)
    with pytest.raises(pack.core.AdapterError, match="has the shape"):
        pack.faces.face_features(analysis, image[0], 224)
    with pytest.raises(pack.core.AdapterError, match="NaN or infinity"):
        pack.faces.face_features(analysis, image * float("nan"), 224)


def test_the_list_does_not_need_insightface(pack, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    info = json.dumps(pack.LoadFaceAnalysis.GET_NODE_INFO_V1(), default=str)
    assert "buffalo_l" in info and "CUDA" in info
