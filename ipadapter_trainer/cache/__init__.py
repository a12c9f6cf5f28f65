"""Precomputed latents, text states and image features."""
