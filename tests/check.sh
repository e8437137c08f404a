#!/bin/sh
# Everything that CI checks: format, lint, types, tests. Give the Python to use as first argument.
set -e
cd "$(dirname "$0")/.."
python=${1:-python}
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
exec "$python" -m pytest -n 2
