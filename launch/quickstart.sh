#!/usr/bin/env bash
# From nothing to a trained, evaluated detector: data, shards, training with two processes, AP, pictures.
# `make quickstart` calls it in the environment it made. DATA: a COCO-format folder (images/ and
# annotations/instances_{train,val}.json); empty: a synthetic set is drawn.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
data=${DATA:-}
started=$SECONDS

say() { printf '\n== %s  (%d s)\n' "$*" $((SECONDS - started)); }

if [ -n "$data" ]; then
  name="quickstart-$(basename "$data")"
  own=(eval.image_side=null)  # COCO's own size thresholds
else
  name=quickstart
  own=()
  data=data/quickstart/images-and-annotations
  if [ ! -e "$data/annotations/instances_val.json" ]; then
    say "drawing a synthetic data set"
    "$python" -m data_tools.synth --out "$data" --images 2400 --val 200 --size 192
  fi
fi
shards="data/$name/shards"
run="runs/$name"

say "converting to shards: $shards"
"$python" -m data_tools.convert --images "$data/images" --annotations "$data/annotations" --out "$shards"

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
processes=$((gpus > 0 ? gpus : 2))
say "training with $processes processes on ${gpus} GPUs: $run"
"$python" -m deepspeed.launcher.runner --num_gpus "$processes" framework/train.py --config configs/quickstart.yaml \
  "train.run_dir=$run" "data.train=$shards/train" "data.val=$shards/val" "${own[@]}"

say "evaluation"
"$python" -m framework.evaluate --run "$run" --data "$shards/val"

say "pictures of predictions"
mapfile -t pictures < <("$python" - "$data" <<'PY'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
images = json.loads((folder / "annotations/instances_val.json").read_text())["images"]
print(*(folder / "images" / image["file_name"] for image in images[:6]), sep="\n")
PY
)
"$python" -m framework.predict --run "$run" "${pictures[@]}" --out "$run/predictions"

cat <<EOF

Done in $((SECONDS - started)) s. Look at
  pictures     $run/predictions/
  curves       tensorboard --logdir runs
  your images  python -m framework.predict --run $run IMAGE... --out DIR
EOF
