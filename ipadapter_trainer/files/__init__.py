"""Adapter files: names, export, conversion, comparison, and the check that hosts load them."""
