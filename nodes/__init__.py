"""ComfyUI nodes: the only code here that imports comfy."""
