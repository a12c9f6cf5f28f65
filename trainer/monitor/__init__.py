"""What the numbers say: validation, logs, sample grids and the report."""
