"""What a user writes, and how text becomes it: recipes, schedules, optimizers and overrides."""
