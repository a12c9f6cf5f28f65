"""What a run leaves to be read: its log, image grids, and a page with charts and a verdict."""
