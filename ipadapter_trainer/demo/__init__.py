"""`ipadapter demo`: the bundled emoji model, an adapter trained on it in minutes, and what measures it."""
