"""Adapter files: names, export, conversion, comparison, and the proof that others load them."""
