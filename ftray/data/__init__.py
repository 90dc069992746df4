"""Rows to tokens: sources, cleaning, formats, rendering, the token store."""
