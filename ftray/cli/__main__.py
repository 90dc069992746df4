"""`python -m ftray.cli`, for where the `ftray` script is not on the path."""

import sys

from ftray.cli import main

sys.exit(main())
