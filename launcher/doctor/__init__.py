"""What could slow down or stop a run, found before one starts: `launcher doctor`."""
