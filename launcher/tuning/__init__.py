"""Short measured runs, combined into settings: learning rate, batch, workers, and estimates."""
