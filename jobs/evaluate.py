"""`ftray evaluate`, for `ray job submit --working-dir . -- python jobs/evaluate.py jobs/runs/lora.yaml`."""

import sys

from ftray.cli import job

if __name__ == "__main__":
    sys.exit(job.run("evaluate"))
