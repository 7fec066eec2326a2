"""Text for people: the plan, progress and results. No torch."""
