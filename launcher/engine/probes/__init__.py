"""Short runs that measure or inspect a recipe with the step of the loop."""
