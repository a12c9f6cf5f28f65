"""Small face models with the inputs and outputs of the published ones, written as ONNX files.

The detector knows faces of three sizes: a square cell of red, green or blue pixels, 8, 16 or 32 wide and on that grid,
is the middle of a small, middle or large face. The brighter the cell, the more certain the face.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

STRIDES = (8, 16, 32)
# Landmarks of a face that looks into the camera, in strides from the middle of its cell: eyes, nose, mouth.
LANDMARKS = np.array([[-0.7, -0.7], [0.7, -0.7], [0.0, 0.1], [-0.55, 0.8], [0.55, 0.8]])
REACH = 1.5  # strides from the cell to the edges of the box


def write_pack(
    folder: Path, *, detector: str = "det_10g.onnx", recognizer: str = "w600k_r50.onnx", **sizes: int
) -> Path:
    """A folder of models such as models/insightface/models/buffalo_l, with two more that FaceID does not need."""
    folder.mkdir(parents=True, exist_ok=True)
    write_detector(folder / detector, largest_input=sizes.get("largest_input", 0))
    write_recognizer(folder / recognizer, width=sizes.get("width", 512))
    write_recognizer(folder / "2d106det.onnx", side=192, width=212)
    write_recognizer(folder / "genderage.onnx", side=96, width=3)
    return folder


def write_detector(path: Path, *, largest_input: int = 0, landmarks: bool = True) -> None:
    """SCRFD as in buffalo_l: [1, 3, ?, ?] -> for each stride scores [N, 1], boxes [N, 4] and landmarks [N, 10], two
    anchors a cell. With `largest_input` it sees no face in larger inputs.
    """
    from onnx import TensorProto, helper

    nodes, constants, outputs = [], [], []
    penalty = None
    if largest_input:
        constants.append(_constant("limit", np.array([float(largest_input)], np.float32)))
        constants.append(_constant("hundred", np.array([-100.0], np.float32)))
        nodes += [
            helper.make_node("Shape", ["input.1"], ["height_integer"], start=2, end=3),
            helper.make_node("Cast", ["height_integer"], ["height"], to=TensorProto.FLOAT),
            helper.make_node("Greater", ["height", "limit"], ["larger"]),
            helper.make_node("Cast", ["larger"], ["larger_number"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["larger_number", "hundred"], ["penalty"]),
        ]
        penalty = "penalty"
    for colour, stride in enumerate(STRIDES):
        pooled = f"pooled_{stride}"
        window = {"kernel_shape": [stride, stride], "strides": [stride, stride]}
        nodes.append(helper.make_node("AveragePool", ["input.1"], [pooled], **window))
        own = np.full(3, -10.0)
        own[colour] = 10.0  # a black pixel is -1 in every channel, so black has 10 - 20, the pure colour 30 - 20
        middle = np.concatenate([LANDMARKS.flatten()])
        heads = {
            "score": (np.stack([own, np.zeros(3)]), np.array([-20.0, -100.0])),
            "box": (np.zeros((8, 3)), np.full(8, REACH)),
            "landmarks": (np.zeros((20, 3)), np.tile(middle, 2)),
        }
        for name, (weight, bias) in heads.items():
            if name == "landmarks" and not landmarks:
                continue
            head, width = f"{name}_{stride}", len(bias) // 2
            constants.append(_constant(f"{head}_weight", weight[..., None, None].astype(np.float32)))
            constants.append(_constant(f"{head}_bias", bias.astype(np.float32)))
            constants.append(_constant(f"{head}_shape", np.array([-1, width], np.int64)))
            nodes += [
                helper.make_node("Conv", [pooled, f"{head}_weight", f"{head}_bias"], [f"{head}_map"]),
                helper.make_node("Transpose", [f"{head}_map"], [f"{head}_last"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"{head}_last", f"{head}_shape"], [f"{head}_rows"]),
            ]
            if name == "score":
                logits = f"{head}_rows"
                if penalty:
                    nodes.append(helper.make_node("Add", [logits, penalty], [f"{head}_seen"]))
                    logits = f"{head}_seen"
                nodes.append(helper.make_node("Sigmoid", [logits], [head]))
            else:
                nodes.append(helper.make_node("Identity", [f"{head}_rows"], [head]))
            outputs.append((name, head, width))
    order = ["score", "box", "landmarks"]
    outputs.sort(key=lambda output: order.index(output[0]))
    infos = [helper.make_tensor_value_info(head, TensorProto.FLOAT, ["?", width]) for _, head, width in outputs]
    _write(path, nodes, [1, 3, "?", "?"], infos, constants)


def write_recognizer(path: Path, *, side: int = 112, width: int = 512, scale: float = 1.0) -> None:
    """ArcFace as in buffalo_l: [N, 3, 112, 112] -> [N, 512], here a linear map of the means of 16 x 16 pixels."""
    from onnx import TensorProto, helper

    cells = 3 * (side // 16) ** 2
    weight = (np.random.default_rng(5).normal(size=(cells, width)) * scale).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["input.1"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["683"]),
    ]
    info = [helper.make_tensor_value_info("683", TensorProto.FLOAT, ["None", width])]
    _write(path, nodes, ["None", 3, side, side], info, [_constant("weight", weight)])


def draw_faces(*faces: tuple[int, int, int], size: tuple[int, int] = (640, 640), level: float = 1.0) -> torch.Tensor:
    """An image [H, W, 3] with faces (stride, column, row) of the grid, on a quiet background that is no face."""
    generator = torch.Generator().manual_seed(size[0])
    image = torch.rand(*size, 1, generator=generator).expand(*size, 3) * 0.2
    image = (image * 255).floor() / 255
    for stride, column, row in faces:
        cell = image[row * stride : (row + 1) * stride, column * stride : (column + 1) * stride]
        cell[:] = 0.0
        cell[..., STRIDES.index(stride)] = level
    return image


def _constant(name: str, values: np.ndarray) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(values, name)


def _write(path: Path, nodes: list[Any], shape: list[Any], outputs: list[Any], constants: list[Any]) -> None:
    import onnx
    from onnx import TensorProto, helper

    source = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, path.stem, [source], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
