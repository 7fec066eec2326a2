"""Data sets that read the formats in which training data is stored, sample by sample."""
