"""Serving: one base with many adapter versions, over HTTP. It meets training in the registry and nowhere else."""
