"""Atomic files, a lock for folders, processes, devices and signals."""
