"""What the pool costs and what it saves, one table per module: ``python -m benchmarks --help``."""
