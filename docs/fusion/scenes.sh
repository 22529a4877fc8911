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
half="--set epochs=2 --set steps_per_epoch=150 --set batch_size=16 --set lr=5e-4 --set schedule=cosine"
longer="--set epochs=2 --set steps_per_epoch=250 --set batch_size=16 --set drawn=16 $fit --set lr=1.5e-3"
dual="--set epochs=2 --set steps_per_epoch=100 --set batch_size=32 $fit"

# a dual encoder, whose towers the METER-shaped teacher stands on; candidates for validation
crosstill cache none $data --out captions
crosstill train captions --student tiny-teacher --recipe info_nce --out dual \
    --set epochs=3 --set batch_size=100 --set captions_per_image=4 $fit
crosstill cache none $data --out listed --false 31

chain() { # NAME, settings of its training: a teacher and its scores
    name=$1
    shift
    crosstill train listed --student "$here/docs/fusion/$name.toml" --recipe info_nce --out $name \
        $batch $fit "$@"
    crosstill cache $name $data --out $name-scores
}

{
    chain vilt --set towers=train --set lr=1.5e-3 --set epochs=3 --set steps_per_epoch=200
    crosstill train vilt-scores --student half --recipe dcd --out vilt-half $longer \
        --set 'losses.dcd.variant="focal"'
    crosstill train vilt-scores --student tiny --recipe dcd --out vilt-dcd $dual
} &
chain meter --set epochs=2 --set steps_per_epoch=75
crosstill train meter-scores --student half --recipe dcd --out meter-half $half
for recipe in dcd cprd; do
    crosstill train meter-scores --student tiny --recipe $recipe --out meter-$recipe $dual
done
# 1,000 images x 5,000 captions, the fusion models timed on a sample
crosstill evaluate meter scenes:10000 --efficiency --sample 4096 --beside meter-half \
    --beside meter-dcd > large.md
wait

crosstill evaluate vilt $data --efficiency --beside vilt-half --beside vilt-dcd > vilt.md &
crosstill evaluate meter $data --efficiency --beside meter-half --beside meter-dcd \
    --beside meter-cprd > meter.md
wait
cat meter.md vilt.md large.md
