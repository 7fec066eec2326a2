"""The training loop, what it works on, and when it saves."""
