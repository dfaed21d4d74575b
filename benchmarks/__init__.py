"""How fast minigrad is, how much memory it takes, and where both go: `python -m benchmarks --help`."""
