#!/usr/bin/env bash
# Everything that must hold before a change lands, in a fresh virtual environment: lint, types, generated kernels up to date, all tests.
# GPU tests run where a GPU is and are reported as skipped elsewhere.
#
# usage: tools/check.sh          PYTHON=python3.12 tools/check.sh   to choose the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
bin="$work/venv/bin"
"$bin/pip" install -q --disable-pip-version-check -e '.[cuda13,dev]'
export CUTLASS_FA_CACHE_DIR="$work/cache"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy" --cache-dir "$work/mypy"
"$bin/python" tools/regenerate_kernels.py --check
# One process for each processor; a file stays in one, because its tests share kernels that it compiles once.
"$bin/python" -m pytest -q -p no:cacheprovider -n auto --dist loadfile
