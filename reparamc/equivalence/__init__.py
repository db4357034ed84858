"""Two models compared on inputs: what to run them on, and which differences rounding explains."""
