"""What is wrong with a cluster, before a run finds out."""
