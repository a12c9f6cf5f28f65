"""CLIP-I and CLIP-T by the paper's protocol."""
