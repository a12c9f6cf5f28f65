"""IP-Adapter Kit for ComfyUI: image prompts for SD1.5, SD2 and SDXL models."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's nodes; ComfyUI calls this."""
    # Late, so that importing this file (as pytest and packaging tools do) needs no ComfyUI.
    from .nodes.extension import IPAdapterKitExtension  # noqa: PLC0415

    return IPAdapterKitExtension()
