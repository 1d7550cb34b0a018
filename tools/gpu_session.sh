#!/usr/bin/env bash
# One visit to a GPU machine: install carried wheels, run the GPU tests, run the benchmark, leave logs and results in a directory.
#
# usage: tools/gpu_session.sh OUT_DIR [--wheels DIR] [--fa3-library FILE] [--tests ARGS] [--bench ARGS]
#   --wheels DIR        wheels to install into a throw-away directory first (a machine without a package index)
#   --fa3-library FILE  FlashAttention-3's torch library, timed beside this project
#   --tests ARGS        arguments of pytest in one word (default "-m gpu"; "" skips)
#   --bench ARGS        arguments of tools/bench.py in one word (default: its defaults; "skip" skips)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: tools/gpu_session.sh OUT_DIR [options]}
shift
tests="-m gpu" bench="" library=()
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/cutlass_fa_site "$2"/*.whl || exit 1
              export PYTHONPATH=/tmp/cutlass_fa_site${PYTHONPATH:+:$PYTHONPATH} ;;
    --fa3-library) library=(--fa3-library "$2") ;;
    --tests) tests=$2 ;;
    --bench) bench=$2 ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift 2
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
status=0
if [ -n "$tests" ]; then
  eval "python3 -m pytest -q -p no:cacheprovider --agreement '$out/agreement.json' $tests" > "$out/tests.log" 2>&1 || status=1
  tail -n 40 "$out/tests.log"
fi
if [ "$bench" != skip ]; then
  eval "python3 tools/bench.py $bench" "${library[@]}" > "$out/bench.log" 2>&1 || status=1
  tail -n 60 "$out/bench.log"
fi
exit $status
