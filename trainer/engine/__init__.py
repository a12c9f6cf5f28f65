"""A training step: features, objective, the adapter in the frozen UNet, optimizers."""
