"""Settings of the commands, their config files, and the kinds of adapter."""
