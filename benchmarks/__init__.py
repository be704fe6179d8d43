"""What is measured, and how: ``python benchmarks/run.py --list``."""
