"""The frozen models: base models of every family, image encoders, and what they compute."""
