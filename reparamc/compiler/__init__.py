"""From any graph to a fused one: regions, decisions, plan, roll-back. Knows no framework."""
