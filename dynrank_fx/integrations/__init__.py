"""Hooks into other trainers. Each module imports its trainer, and nothing imports the modules."""
