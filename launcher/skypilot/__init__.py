"""Tasks for SkyPilot, as text; this room imports no torch and no SkyPilot."""
