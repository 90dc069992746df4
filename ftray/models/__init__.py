"""Base models, the methods that adapt them, and how versions are written."""
