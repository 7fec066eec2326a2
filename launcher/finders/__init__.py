"""What measured numbers say: analysis in plain numbers, without torch."""
