#!/usr/bin/env bash
# Makes one of the embedded packs from CIFAR-10's training images; run again, it goes on.
#   bash prompts/scripts/make_pack.sh v|vli|vlj cifar10-train.zip
set -euo pipefail
name=${1:?v, vli or vlj}
data=${2:?a zip or folder of CIFAR-10 training images in class folders}
work=${WORK:-out/$name}

case $name in
  v) design="--design V --tokens 4 --depth 6" ;;
  vli) design="--design VLI --tokens 4 --depth 6 --text-depth 3" ;;
  vlj) design="--design VLJ --tokens 4 --depth 6 --text-depth 3" ;;
  *) echo "The first word must be v, vli or vlj." >&2; exit 2 ;;
esac
train="--shots 0 --epochs 1 --batch-size 128 --optimizer adamw --lr 0.01 --min-crop 0.3
  --validation 0.02 --precision bfloat16 --epsilon 2/255 --clean-share 0.25 --resume"
test_time="--lr 0.02"

python -m tapt train --backbone tiny --data "$data" $design $train --out "$work/adversarial"
python -m tapt train --backbone tiny --data "$data" $design $train --clean-share 1.0 \
  --out "$work/clean"
python -m tapt statistics --backbone tiny --data "$data" --limit 20000 $test_time --resume \
  --adversarial "$work/adversarial" --clean "$work/clean" --out "prompts/tiny/$name"
