"""Page faults: the heart."""
