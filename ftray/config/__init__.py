"""The run file: its schema and how it is read."""
