"""The emoji world: real images with real names in several styles, and a tiny text-to-image stack trained on them."""
