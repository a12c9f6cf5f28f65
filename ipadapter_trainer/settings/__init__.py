"""The settings of a training, their file, and the kinds of adapter."""
