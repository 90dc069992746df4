"""Jobs on a cluster: what is sent there, and how it is followed and stopped."""
