#!/usr/bin/env bash
# All that needs a GPU, in one call of under nine minutes, the most telling results first:
#
#     bash benchmarks/gpu/run.sh                      # everything, within 530 seconds
#     bash benchmarks/gpu/run.sh 300 'TRL|variants'   # seconds, and which steps (regular expression)
#     bash benchmarks/gpu/run.sh --small              # a trial on a CPU: its numbers mean nothing
#
# Tests marked gpu, then rounding, the article's recipe beside TRL, and where time and memory go.
# Each step has a time limit of its own; a step that fails, or for which no time is left, is named and
# stops nothing else. $OUT (runs/gpu) gets summary.txt, a line for each step; rows.jsonl, written row
# by row; log.txt, everything printed, with tracebacks; and gpu.md, the rows beside their predictions
# (its minute is part of the time).
# $WORK keeps the model (4 GB) for the next call on the same machine. The script runs $PYTHON, else
# the Python of .venv, else python3; it measures TRL if that is installed.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
root="$PWD" small=""
[ "${1:-}" = --small ] && small=--small && shift
limit="${1:-530}" only="${2:-.}"
out="${OUT:-runs/gpu$small}" work="${WORK:-${TMPDIR:-/tmp}/dpo-gpu$small}" failed=0
mkdir -p "$out" "$work"
out="$(cd "$out" && pwd)" work="$(cd "$work" && pwd)"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo "$root/.venv/bin/python" || echo python3)}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$root" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export HF_HUB_OFFLINE=1 HF_HOME="$work/hub" HF_DATASETS_CACHE="$work/datasets"
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"

note() { echo "[$SECONDS s] $*" | tee -a "$out/summary.txt" "$out/log.txt"; }

step() { # NAME SECONDS COMMAND...: if it was asked for, within its limit and what time is left
    local name="$1" most="$2" began="$SECONDS" rc=0 left=$((limit - 60 - SECONDS))
    shift 2
    [[ "$name" =~ $only ]] || return 0
    if [ "$left" -lt 20 ]; then note "$name: not run, no time left"; return; fi
    [ "$most" -le "$left" ] || most="$left"
    echo "=== $name" >>"$out/log.txt"
    timeout -k 5 "$most" "$@" >>"$out/log.txt" 2>&1 || rc=$?
    [ "$rc" = 0 ] || failed=$((failed + 1))
    note "$name: rc $rc after $((SECONDS - began)) s"
}

sheet() { # what was measured beside what was predicted, within the minute that is kept for it
    local rc=0
    timeout "$([ "$small" ] && echo 300 || echo 90)" bash -c 'measure sheet "$@"' - --rows "$out/rows.jsonl" --output "$out/gpu.md" \
        > >(tee -a "$out/log.txt") 2>>"$out/log.txt" || rc=$?
    [ "$rc" = 0 ] || { failed=$((failed + 1)) && note "gpu.md: rc $rc, not written; the rows are in rows.jsonl"; }
}

measure() { (cd benchmarks && exec "$python" -m "gpu.$1" "${@:2}" $small); }
export -f measure
export python small
sections() { step "$1" "$2" bash -c 'measure sections "$@"' - "${@:3}" --rows "$out/rows.jsonl"; }
side() { [[ $1 == TRL* && -z $trl ]] || step "$1" "$2" bash -c 'measure recipe "$@"' - "$1" "$work" --rows "$out/rows.jsonl"; }

has() { "$python" -c "import importlib.util, torch; raise SystemExit(not ($1))" 2>>"$out/log.txt"; }
if [ -z "$small" ] && ! has "torch.cuda.is_available()"; then
    note "not measured: $python finds no GPU"
    exit 2
fi
note "start: $(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo "on a CPU, in small")"
has "importlib.util.find_spec('trl')" && trl=1 || { trl=""; note "TRL is not installed: not measured"; }
# The weights are made while the tests run: nothing is timed there.
[ -f "$work/model/config.json" ] || timeout 150 bash -c 'measure recipe build "$0"' "$work" >"$work/build.txt" 2>&1 &
builder=$!
# shellcheck disable=SC2046
step "tests" 120 "$python" -m pytest -m gpu -v --tb=short -W ignore -p no:cacheprovider \
    --continue-on-collection-errors tests/test_gpu.py $(grep -rl --include="test_*.py" "mark\.gpu" tests)
wait "$builder" || note "build: failed, see log.txt"
cat "$work/build.txt" >>"$out/log.txt"

sections "rounding" 110 product rounding layouts repeats
side "ours" 110
side "TRL, tuned by hand" 110
sections "where time and memory go" 100 kept budgets timeline
side "TRL, defaults" 110
side "ours, 4 bits kept" 80
side "ours, PyTorch's AdamW" 70
side "ours, compiled" 100
sections "variants" 100 variants
side "ours, deterministic" 70
side "TRL, checkpointing off" 110

[ ! -s "$out/rows.jsonl" ] || sheet
note "end: $failed steps failed"
[ "$failed" = 0 ]
