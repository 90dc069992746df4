"""`ftray sweep`, for `ray job submit --working-dir . -- python jobs/sweep.py jobs/sweeps/orders.yaml`."""

import sys

from ftray.cli import job

if __name__ == "__main__":
    sys.exit(job.run("sweep"))
