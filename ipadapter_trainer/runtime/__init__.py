"""What every command needs of the machine: files that appear whole, a lock on a folder, processes and signals."""
