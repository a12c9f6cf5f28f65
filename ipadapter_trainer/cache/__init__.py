"""What the frozen models say of a data set, written once and read in training."""
