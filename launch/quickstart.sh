#!/usr/bin/env bash
# From nothing to a trained, evaluated detector: data, shards, training, AP, pictures. `make quickstart` calls it.
#   PYTHON  of the environment
#   DATA    a COCO-format folder (images/, annotations/instances_{train,val}.json); empty: a synthetic set is drawn
#   ARGS    key=value ..., for the training
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
data=${DATA:-}
name=quickstart
own=()

say() { printf '\n== %s  (%d s)\n' "$*" "$SECONDS"; }
quoted() { "$python" -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$1"; }

if [ -n "$data" ]; then
  name="quickstart-$(basename "$data")"
  own=(eval.image_side=null model.num_queries=100)  # COCO's own size thresholds; more below
else
  data=data/quickstart/drawn
  say "drawing a synthetic data set in $data"
  "$python" -m data_tools.synth --out "$data" --images 1750 --val 200 --size 160
fi
shards="data/$name/shards"
run="runs/$name"

say "converting it to shards in $shards"
"$python" -m data_tools.convert --images "$data/images" --annotations "$data/annotations" --reencode --out "$shards"

# Somebody's own images get as many steps as the synthetic ones, in four parts with an evaluation each.
if [ "$name" != quickstart ]; then
  mapfile -t -O "${#own[@]}" own < <("$python" - "$shards/train" <<'PY'
import sys
from data_tools.sample import read_manifest
part = max(1, round(545 / 4 / max(1, read_manifest(sys.argv[1]).images // 16)))
print(f"train.epochs={4 * part}", f"train.lr_drop_epochs=[{3 * part}]", f"eval.every={part}", sep="\n")
PY
)
fi

# As many processes as there are GPUs, if the batch of 16 can be shared out so; two on a CPU.
read -r processes micro_batch where port chosen < <("$python" - <<'PY'
import os, socket, torch
gpus = torch.cuda.device_count()
processes = max(n for n in (1, 2, 4, 8, 16) if n <= gpus) if gpus else 2
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
ids = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(processes)))
chosen = "--include=localhost:" + ",".join(ids.split(",")[:processes]) if gpus else f"--num_gpus={processes}"
print(processes, min(8, 16 // processes), "GPU" if gpus else "CPU", port, chosen)
PY
)
if [ "$where" = CPU ]; then export DS_ACCELERATOR=cpu; fi
say "training on $processes processes ($where) in $run"
env -u CUDA_VISIBLE_DEVICES "$python" -m deepspeed.launcher.runner "$chosen" --master_port "$port" framework/train.py \
  --config configs/quickstart.yaml "train.micro_batch=$micro_batch" "train.run_dir=$(quoted "$run")" \
  "data.train=$(quoted "$shards/train")" "data.val=$(quoted "$shards/val")" "${own[@]}" ${ARGS:-} || {
  echo "If the settings changed since an earlier quickstart, remove that one first: rm -r '$run' '$shards'" >&2
  exit 1
}

say "evaluation of the last checkpoint"
"$python" -m framework.evaluate --run "$run" --data "$shards/val" --out "$run/evaluation/quickstart.json"

say "pictures of predictions"
mapfile -t pictures < <("$python" - "$data" <<'PY'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
images = json.loads((folder / "annotations/instances_val.json").read_text())["images"]
print(*(folder / "images" / image["file_name"] for image in images[:6]), sep="\n")
PY
)
rm -f "$run"/predictions/detections.json "$run"/predictions/[0-9][0-9][0-9][0-9][0-9]_*.png  # of an earlier quickstart
"$python" -m framework.predict --run "$run" "${pictures[@]}" --out "$run/predictions"

cat <<EOF

== Done in $SECONDS s. Look at
  pictures     $run/predictions/
  curves       $python -m tensorboard.main --logdir runs
  your images  $python -m framework.predict --run $run IMAGE... --out DIR
EOF
