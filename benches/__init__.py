"""Measurements: ratios of interleaved runs, each sample kept with its dimensions; `compare` compares."""
