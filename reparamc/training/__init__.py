"""Fusion in the training loop: fused again for nothing, trained through, grown and taken back."""
