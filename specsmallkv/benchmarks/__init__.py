"""Benchmarks, one file each: where the rows come from, the published prompt, the published scorer."""
