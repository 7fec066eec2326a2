"""Mathematics of measurements: loss curves, noise scale, loading, scaling. It imports no torch."""
