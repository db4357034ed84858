"""From the training form to a file for a runtime: fused, converted, and compared with torch where the runtime runs."""
