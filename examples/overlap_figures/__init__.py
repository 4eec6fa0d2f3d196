"""What hiding communication brings: `python -m examples.overlap_figures`."""
