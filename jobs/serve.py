"""`ftray serve`, for `ray job submit --working-dir . -- python jobs/serve.py jobs/serve.yaml`."""

import sys

from ftray.cli import job

if __name__ == "__main__":
    sys.exit(job.run("serve"))
