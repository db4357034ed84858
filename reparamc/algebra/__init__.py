"""Expressions of linear operators and what may be done to them. Knows no graph and no framework."""
