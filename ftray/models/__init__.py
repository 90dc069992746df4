"""Base models, the methods that adapt them, and how versions are written."""

import logging
import sys

# It warns at import of a kernel package that is optional, and in int8 once per layer and step of a cast that it wants.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def leave_out_bitsandbytes() -> None:
    """For a process that will not need it: PEFT imports it wherever it is installed, which takes a second."""
    if "peft" not in sys.modules:
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]  # what import takes for "there is none"
