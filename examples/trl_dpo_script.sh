#!/usr/bin/env bash
# Runs `trl dpo` with a YaPO adapter: only the command's name, --layers and --sae_path differ.
# Trains on the embedded model. Further options are passed through: examples/trl_dpo_script.sh --max_steps 5
set -euo pipefail
cd "$(dirname "$0")"
MODEL=${MODEL:-$(python -c "from embedded import model_folder; print(model_folder())")}
OUT=${OUT:-../out/trl}
yapo train \
    --model_name_or_path "$MODEL" \
    --dataset_name assets/preferences/enthusiasm \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --eval_strategy steps \
    --eval_steps 30 \
    --logging_steps 10 \
    --report_to none \
    --output_dir "$OUT" \
    --layers 14 \
    --sae_path assets/sae \
    "$@"
