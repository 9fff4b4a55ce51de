#!/usr/bin/env bash
# Relufies the real checkpoint stories3M to stages 1 and 2, fine-tunes each beside a dense
# control of the same tokens, evaluates all of them and prints the table.
#
#   cargo build --release && bash scripts/tinystories.sh
#
# RELUFY_SHARED names the folder with the data (default ../shared): data/checkpoints/stories3M,
# data/corpora/stories3m-samples.jsonl.zst, data/corpora/tinystories-train-head.txt.zst.
# What is done already is not done again: delete runs/tinystories to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
shared=${RELUFY_SHARED:-../shared}
relufy=${RELUFY:-target/release/relufy}
donor=$shared/data/checkpoints/stories3M
samples=$shared/data/corpora/stories3m-samples.jsonl.zst
real=$shared/data/corpora/tinystories-train-head.txt.zst
runs=runs/tinystories
mkdir -p "$runs"

# Every twentieth story is held out.
[ -f "$runs/heldout.jsonl" ] || zstd -dc "$samples" | awk 'NR % 20 == 0' > "$runs/heldout.jsonl"
[ -f "$runs/train.jsonl" ] || zstd -dc "$samples" | awk 'NR % 20 != 0' > "$runs/train.jsonl"

train() { # NAME MODEL
  [ -f "$runs/$1/final/config.json" ] && return
  local resume=()
  [ -d "$runs/$1" ] && resume=(--resume)
  "$relufy" train "configs/tinystories/$1.toml" --set "model.path=\"$2\"" "${resume[@]}"
}
evaluate() { # FOLDER NAME MODEL [--stage N]
  [ -n "$(find "$runs/eval/$1" -name "results_*.json" 2>/dev/null)" ] && return
  "$relufy" eval "$3" --name "$2" -o "$runs/eval/$1" "${@:4}" \
    --corpus "heldout=$runs/heldout.jsonl" --corpus "TinyStories=$real" --max-tokens 200000 \
    --tasks "lambada_openai,arc_easy,piqa" --data "$shared/data/eval" --limit 500
}

train control-n1 "$donor"
train control-n2 "$runs/control-n1/final"
train s1 "$donor"
train s2 "$runs/s1/final"

evaluate donor "stories3M" "$donor"
evaluate control-n1 "dense + N1" "$runs/control-n1/final"
evaluate control-n2 "dense + N1 + N2" "$runs/control-n2/final"
evaluate s1-bare "s1, not tuned" "$donor" --stage 1
evaluate s1 "s1 + N1" "$runs/s1/final"
evaluate s2-bare "s2, not tuned" "$donor" --stage 2
evaluate s2-bare-s1 "s2 of s1 + N1, not tuned" "$runs/s1/final" --stage 2
evaluate s2 "s2 + N1 + N2" "$runs/s2/final"

rows=()
for run in donor control-n1 control-n2 s1-bare s1 s2-bare s2-bare-s1 s2; do rows+=("$runs/eval/$run"); done
"$relufy" table "${rows[@]}"
"$relufy" table "${rows[@]}" --format markdown > "$runs/table.md"
"$relufy" table "${rows[@]}" --format csv > "$runs/table.csv"
