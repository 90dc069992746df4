"""Everything kept: runs, checkpoints, the adapter registry. Markers are written last."""
