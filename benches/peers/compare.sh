#!/usr/bin/env bash
# The engine beside PyTorch on one machine, interleaved (A B A B): ratios of medians, and of peak memory.
#   benches/peers/compare.sh MODEL_DIR DATA_DIR [ROWS] [PYTHON]
set -euo pipefail
model=$1 data=$2 rows=${3:-64} python=${4:-python3} rounds=${ROUNDS:-2}
here=$(cd "$(dirname "$0")" && pwd)
engine=$here/../../target/release/collm-engine
out=$(mktemp -d)
echo "load before: $(cut -d' ' -f1-3 /proc/loadavg)"
for round in $(seq "$rounds"); do
  for task in stage1 stage2 score; do
    case $task in stage1) what="train --stage 1";; stage2) what="train --stage 2";; score) what=score;; esac
    echo "-- round $round, $task"
    # shellcheck disable=SC2086
    "$engine" --threads 2 bench $what --llm "$model" --data "$data" --rows "$rows" --batch 16 --json "$out/engine.$task.$round"
    "$python" "$here/pytorch_collm.py" --model "$model" --data "$data" --task $task --rows "$rows" --json "$out/plain.$task.$round"
    "$python" "$here/pytorch_collm.py" --model "$model" --data "$data" --task $task --rows "$rows" --sort-by-length \
      $([ $task = stage1 ] || echo --merge-lora) --json "$out/best.$task.$round"
  done
done
"$python" - "$out" "$rounds" <<'PY'
import json, statistics, sys
out, rounds = sys.argv[1], int(sys.argv[2])
load = lambda who, task: [json.load(open(f"{out}/{who}.{task}.{r + 1}")) for r in range(rounds)]
print("\n| task | engine samples/s | PyTorch as usual | PyTorch sorted, merged | ratio to usual | ratio to best | memory ratio |")
print("|---|---|---|---|---|---|---|")
for task in ["stage1", "stage2", "score"]:
    e, p, b = (load(who, task) for who in ["engine", "plain", "best"])
    mid = lambda runs: statistics.median(c["rows"] / c["seconds"] for run in runs for c in run["batches"])
    peak = lambda runs: max(run["peak_rss_bytes"] for run in runs)
    best = max(mid(p), mid(b))
    print(f"| {task} | {mid(e):.2f} | {mid(p):.2f} | {mid(b):.2f} | {mid(e) / mid(p):.2f} | {mid(e) / best:.2f} | {peak(e) / peak(p):.2f} |")
e = load("engine", "stage1")[0]
print(f"engine stage 1: {e['gflops']:.0f} GFLOP/s in linear layers, product ceiling {e['gemm_ceiling_gflops']:.0f}")
PY
