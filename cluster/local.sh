#!/usr/bin/env bash
# A cluster of a head without CPUs and some workers on this machine, for trying things out; Ctrl-C ends it.
#   cluster/local.sh 3 2        # three workers of two CPUs each
# Its token is in the file that it names: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=<file>, then
#   ftray submit run.yaml --address http://127.0.0.1:8265 storage=/tmp/ftray-store
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/local_cluster.py" "$@"
