"""Samples: their order, how DataLoader workers read them, and their random state."""
