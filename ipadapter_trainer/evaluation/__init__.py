"""`ipadapter generate` and `ipadapter eval`."""
