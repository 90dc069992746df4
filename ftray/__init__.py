"""ftray: from examples to a tuned adapter that answers over HTTP, on Ray. Importing it costs nothing."""

__version__ = "0.1.0"
