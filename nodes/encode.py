"""EncodeImagePrompt: images -> what the image encoder makes of them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..ipadapter_core import AdapterError
from ..ipadapter_core.branches import branch_rows
from ..ipadapter_core.image_prompt import COMBINES, CROPS, combine_features
from .checks import check_encoder
from .features import NEGATIVES, TRAINED, Encoder, encode_images, negative_features
from .node import Node
from .types import EncodedImages, ImagePrompt, ImagePromptType, IPAdapterModel, LoadedAdapter, node_schema, project


class EncodeImagePrompt(Node):
    """Images -> one image prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="EncodeImagePrompt",
            display_name="Encode Image Prompt",
            has_intermediate_output=True,
            description="Turns one or more images into an image prompt, and shows what the encoder sees of them.",
            inputs=[
                IPAdapterModel.Input("ip_adapter", tooltip="The adapter that reads the images."),
                io.ClipVision.Input("clip_vision", tooltip="The adapter's image encoder, from Load IP Adapter."),
                io.Image.Input("image", tooltip="The image; a batch of images becomes one prompt, see combine."),
                io.Image.Input(
                    "image_negative",
                    optional=True,
                    tooltip="What the result should avoid. If not connected, see negative.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Hides parts of the image from the encoder: 0 is hidden, 1 is visible.",
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
                    "combine",
                    options=list(COMBINES),
                    default="concat",
                    optional=True,
                    tooltip="How several images become one prompt. concat keeps the tokens of all images; the others "
                    "compute one set of features (subtract: the first minus the mean of the others).",
                ),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default="center",
                    optional=True,
                    tooltip="The encoder sees a square: choose which part of the image to keep, or pad or stretch it.",
                ),
                io.Combo.Input(
                    "negative",
                    options=NEGATIVES,
                    default=TRAINED,
                    optional=True,
                    tooltip="The image of the negative branch if image_negative is not connected: the same as in the "
                    "adapter's training (no features, or a grey image), or a black image.",
                ),
                io.Int.Input(
                    "tiles",
                    default=0,
                    min=0,
                    max=4,
                    optional=True,
                    tooltip="Also encodes square tiles of the image, each at the encoder's full size: for details "
                    "and for long images. 0: none. 1: squares along the long side. 2: two along the short side, 2 x "
                    "2 of a square image. Tiles are combined like several images, see combine; try it with crop pad.",
                ),
                io.Boolean.Input(
                    "one_each",
                    default=False,
                    optional=True,
                    tooltip="On: image 1 guides the first latent or frame, image 2 the second, and the last image "
                    "all that remain. Off: all images together guide every latent.",
                ),
            ],
            outputs=[ImagePromptType.Output(display_name="image_prompt", tooltip="Connect to Apply IP Adapter.")],
        )

    @classmethod
    def check_inputs(cls, given: dict[str, Any]) -> None:
        """Load IP Adapter has no image encoder for adapters that see faces alone; another one would be of no use."""
        ip_adapter = given.get("ip_adapter")
        if isinstance(ip_adapter, LoadedAdapter) and ip_adapter.spec.face_dim is not None:
            raise AdapterError(
                f"{ip_adapter.name} is a {ip_adapter.spec.kind} adapter, which takes face embeddings. Connect it to "
                "Encode Face Prompt."
            )

    @classmethod
    def execute(
        cls,
        ip_adapter: LoadedAdapter,
        clip_vision: Encoder,
        image: Tensor,
        image_negative: Tensor | None = None,
        mask: Tensor | None = None,
        weight: float = 1.0,
        combine: str = "concat",
        crop: str = "center",
        negative: str = TRAINED,
        tiles: int = 0,
        one_each: bool = False,
    ) -> io.NodeOutput:
        check_encoder(clip_vision, "The connected image encoder")
        if one_each:
            _check_one_each(combine, tiles)
        features, seen = encode_images(ip_adapter, clip_vision, image, crop=crop, mask=mask, tiles=tiles)
        features = combine_features(features, combine)
        if image_negative is not None:
            negatives, _ = encode_images(ip_adapter, clip_vision, image_negative, crop=crop, name="image_negative")
            negatives = combine_features(negatives, combine)
        else:
            negatives = negative_features(ip_adapter, clip_vision, negative)
        branch_rows(len(features), 1 if negatives is None else len(negatives), one_each=one_each, swapped=False)
        prompt = ImagePrompt(
            EncodedImages(features, weights=(weight,) * len(features)),
            None if negatives is None else EncodedImages(negatives, weights=(weight,) * len(negatives)),
            ip_adapter.name,
            one_each=one_each,
            has_negative=image_negative is not None,
        )
        project(ip_adapter, prompt)  # a damaged adapter is reported here; Apply reuses the tokens
        return io.NodeOutput(prompt, ui=ui.PreviewImage(seen.cpu(), cls=cls))


def _check_one_each(combine: str, tiles: int) -> None:
    """Raises AdapterError for what makes one image of several, or several of one."""
    if combine != "concat":
        raise AdapterError(
            f"one_each keeps the images apart, combine {combine!r} makes one of them. Set combine to 'concat', or turn "
            "one_each off."
        )
    if tiles:
        raise AdapterError(
            f"one_each takes one image for each latent, tiles {tiles} makes several of each. Set tiles to 0, or turn "
            "one_each off."
        )
