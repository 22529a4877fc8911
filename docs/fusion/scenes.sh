#!/bin/sh
# Fusion teachers, their halves and dual students on 1,000 rendered scenes; two cores, no download.
#   sh docs/fusion/scenes.sh OUT     (from the project's folder; OUT must not exist)
set -eu
export OMP_NUM_THREADS=1
here=$(pwd)
mkdir "$1" && cd "$1"
data=scenes:1000

fit="--set lr=1e-3 --set schedule=cosine --set warmup_steps=20 --set clip_norm=1.0"
batch="--set negatives=batch --set batch_size=16 --set losses.info_nce.hardest=15"
half="--set epochs=2 --set steps_per_epoch=75 --set batch_size=16 --set lr=5e-4 --set schedule=cosine"
dual="--set epochs=3 --set steps_per_epoch=100 --set batch_size=32 $fit"

# a dual encoder, whose towers the METER-shaped teacher stands on; candidates for validation
crosstill cache none $data --out captions
crosstill train captions --student tiny-teacher --recipe info_nce --out dual \
    --set epochs=3 --set batch_size=100 --set captions_per_image=4 $fit
crosstill cache none $data --out listed --false 31

chain() { # NAME, TOML, settings of its training
    name=$1 toml=$2
    shift 2
    crosstill train listed --student "$toml" --recipe info_nce --out "$name" $batch $fit "$@"
    crosstill cache "$name" $data --out "$name-scores"
    crosstill train "$name-scores" --student half --recipe dcd --out "$name-half" $half
    for recipe in dcd cprd; do
        crosstill train "$name-scores" --student tiny --recipe $recipe --out "$name-$recipe" $dual
    done
}

chain vilt "$here/docs/fusion/vilt.toml" --set towers=train --set lr=1.5e-3 --set epochs=3 &
chain meter "$here/docs/fusion/meter.toml" --set epochs=2 --set steps_per_epoch=75
wait

for name in meter vilt; do
    crosstill evaluate $name $data --efficiency \
        --beside $name-half --beside $name-dcd --beside $name-cprd > $name.md &
done
wait
# 1,000 images x 5,000 captions, the fusion models timed on a sample
crosstill evaluate meter scenes:10000 --efficiency --sample 4096 \
    --beside meter-half --beside vilt --beside vilt-half --beside meter-dcd > large.md
