"""The nodes of ComfyUI_IPAdapter_plus under their old names, over the same functions as our own nodes."""
