"""EncodeFacePrompt: the faces in images -> what a face adapter takes."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..ipadapter_core import AdapterError
from ..ipadapter_core.image_prompt import COMBINES, combine_features, crop_image
from .checks import check_encoder
from .face_analysis import FACE_ALIASES, FaceAnalysis, FaceAnalysisType
from .faces import NO_FACE, ORDERS, FaceFeatures, check_faces, crop_size, face_features
from .features import TRAINED, Encoder, encode, mean_colour, negative_features
from .node import Node
from .types import EncodedImages, ImagePrompt, ImagePromptType, IPAdapterModel, LoadedAdapter, node_schema, project


class EncodeFacePrompt(Node):
    """Images of faces -> one image prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="EncodeFacePrompt",
            has_intermediate_output=True,  # the preview survives a reload of the page
            display_name="Encode Face Prompt",
            description="Turns the face in one or more images into an image prompt for a FaceID adapter, and shows "
            "the face that it uses.",
            search_aliases=FACE_ALIASES,
            inputs=[
                IPAdapterModel.Input("ip_adapter", tooltip="A FaceID, FaceID-Plus or portrait adapter."),
                FaceAnalysisType.Input("face_analysis", tooltip="From Load Face Analysis."),
                io.Image.Input(
                    "image", tooltip="An image with the face; several images of the same person improve the likeness."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The adapter's image encoder, from Load IP Adapter. FaceID-Plus needs it.",
                ),
                io.Image.Input(
                    "image_negative",
                    optional=True,
                    tooltip="What the result should avoid. For FaceID-Plus, which also uses the image itself.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    optional=True,
                    tooltip="Strength of this prompt; it multiplies the weight of Apply IP Adapter.",
                ),
                io.Combo.Input(
                    "face",
                    options=list(ORDERS),
                    default="largest",
                    optional=True,
                    tooltip="Which face to use if the image has several: the first in this order. See face_index.",
                ),
                io.Int.Input(
                    "face_index",
                    default=0,
                    min=0,
                    max=99,
                    optional=True,
                    tooltip="0 is the first face in that order, 1 the second: left to right and 1 is the second from "
                    "the left.",
                ),
                io.Combo.Input(
                    "no_face",
                    options=list(NO_FACE),
                    default="error",
                    optional=True,
                    tooltip="What to do if an image has no such face: stop with an error, or skip the image.",
                ),
                io.Combo.Input(
                    "combine",
                    options=list(COMBINES),
                    default="concat",
                    optional=True,
                    tooltip="How several faces become one prompt. concat keeps the tokens of all faces, average "
                    "gives a face between them.",
                ),
                io.Float.Input(
                    "likeness",
                    default=1.0,
                    min=-1.0,
                    max=5.0,
                    step=0.05,
                    optional=True,
                    tooltip="FaceID-Plus v2: weight of the image's look relative to the identity. 1 is as trained; "
                    "try 0.5 for more freedom, 2 for hair, make-up and light as in the image.",
                ),
                io.Boolean.Input(
                    "one_each",
                    default=False,
                    optional=True,
                    tooltip="Off: all faces become one prompt. On: the face of image 1 guides the first latent "
                    "(frame), that of image 2 the second, and so on.",
                ),
            ],
            outputs=[
                ImagePromptType.Output(display_name="image_prompt", tooltip="Connect to Apply IP Adapter."),
                io.Image.Output(display_name="face_image", tooltip="The faces, cropped and upright."),
            ],
        )

    @classmethod
    def execute(
        cls,
        ip_adapter: LoadedAdapter,
        face_analysis: FaceAnalysis,
        image: Tensor,
        clip_vision: Encoder | None = None,
        image_negative: Tensor | None = None,
        weight: float = 1.0,
        face: str = "largest",
        face_index: int = 0,
        no_face: str = "error",
        combine: str = "concat",
        likeness: float = 1.0,
        one_each: bool = False,
    ) -> io.NodeOutput:
        spec = ip_adapter.spec
        _check_inputs(ip_adapter, clip_vision, image_negative, combine, likeness, one_each)
        found = face_features(
            face_analysis,
            image,
            crop_size(spec),
            unnormalised=spec.unnormalised,
            order=face,
            index=face_index,
            no_face=no_face,
        )
        check_faces(ip_adapter, found.embeddings, face_analysis.name)
        positive = encode_faces(ip_adapter, found, clip_vision, combine)
        negative = negative_faces(ip_adapter, clip_vision, image_negative)
        if one_each and len(found.rows) < len(image):
            positive, negative = _one_for_each(positive, negative, found.rows, len(image))
        prompt = ImagePrompt(
            positive.weighted(weight),
            negative and negative.weighted(weight),
            ip_adapter.name,
            one_each=one_each,
            has_negative=image_negative is not None,
            likeness=likeness,
        )
        project(ip_adapter, prompt)  # a damaged adapter is reported here; Apply reuses the tokens
        return io.NodeOutput(prompt, found.crops, ui=ui.PreviewImage(found.crops, cls=cls))


def encode_faces(
    ip_adapter: LoadedAdapter, found: FaceFeatures, clip_vision: Encoder | None, combine: str = "concat"
) -> EncodedImages:
    """Faces as the adapter takes them: embeddings, for FaceID-Plus also what the encoder makes of the crops."""
    states = None
    if ip_adapter.spec.image_dim is not None and clip_vision is not None:
        states = combine_features(encode(ip_adapter, clip_vision, _encoder_input(clip_vision, found.crops)), combine)
    embeddings = combine_features(found.embeddings, combine)
    return EncodedImages(states, embeddings, (1.0,) * len(embeddings))


def negative_faces(
    ip_adapter: LoadedAdapter,
    clip_vision: Encoder | None,
    image_negative: Tensor | None = None,
    negative: str = TRAINED,
) -> EncodedImages | None:
    """The negative branch of FaceID-Plus: no face, and the negative image; None for adapters that need none."""
    spec = ip_adapter.spec
    if spec.image_dim is None or spec.face_dim is None or clip_vision is None:
        return None
    if image_negative is None:
        states = negative_features(ip_adapter, clip_vision, negative)
    else:
        states = encode(ip_adapter, clip_vision, _encoder_input(clip_vision, image_negative, "image_negative"))
    if states is None:
        return None
    return EncodedImages(states, torch.zeros(len(states), spec.face_dim), (1.0,) * len(states))


def _check_inputs(
    ip_adapter: LoadedAdapter,
    clip_vision: Encoder | None,
    image_negative: Tensor | None,
    combine: str,
    likeness: float,
    one_each: bool,
) -> None:
    spec, name = ip_adapter.spec, ip_adapter.name
    if spec.face_dim is None:
        raise AdapterError(
            f"{name} is a {spec.kind} adapter, which takes no face embeddings. Connect it to Encode Image Prompt, or "
            "load a FaceID adapter."
        )
    if spec.image_dim is not None:
        if clip_vision is None:
            raise AdapterError(
                f"{name} is a {spec.kind} adapter, which also looks at the image ({spec.encoder}). Connect the "
                "clip_vision of Load IP Adapter."
            )
        check_encoder(clip_vision, "The connected image encoder")
    elif image_negative is not None:
        raise AdapterError(
            f"{name} is a {spec.kind} adapter, which takes face embeddings only, so image_negative would do nothing. "
            "Disconnect it, or use FaceID-Plus."
        )
    if likeness != 1.0 and not spec.shortcut:
        raise AdapterError(f"likeness {likeness:g} is for FaceID-Plus v2, which {name} is not. Set it to 1.")
    if one_each and combine != "concat":
        raise AdapterError(
            f"one_each keeps a prompt for each image, so combine {combine!r} would do nothing. Set combine to concat, "
            "or switch one_each off."
        )


def _one_for_each(
    faces: EncodedImages, negative: EncodedImages | None, rows: tuple[int, ...], images: int
) -> tuple[EncodedImages, EncodedImages]:
    """Each face at the place of its image. The images left out have the weight 0, in the negative branch too."""
    negative = negative or EncodedImages(None, torch.zeros(1, faces.features[0].shape[-1]))
    weights = tuple(float(image in rows) for image in range(images))
    faces = _take(faces, [rows.index(image) if image in rows else 0 for image in range(images)], weights)
    if len(negative) == 1:
        negative = _take(negative, [0] * images, weights)
    return faces, replace(negative, weights=weights) if len(negative) == images else negative


def _take(encoded: EncodedImages, rows: list[int], weights: tuple[float, ...]) -> EncodedImages:
    image, face = (None if part is None else part[rows] for part in (encoded.image, encoded.face))
    return EncodedImages(image, face, weights)


def _encoder_input(clip_vision: Encoder, image: Tensor, name: str = "image") -> Tensor:
    return crop_image(image, clip_vision.image_size, fill=mean_colour(clip_vision), name=name)
