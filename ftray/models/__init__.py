"""Base models, the methods that adapt them, and how versions are written."""

import logging

# It warns at import of a kernel package that is optional, and in int8 once per layer and step of a cast that it wants.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
