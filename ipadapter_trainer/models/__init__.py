"""The frozen models: base models of every family and image encoders, how they are loaded, what they say."""
