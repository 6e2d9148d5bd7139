#!/bin/sh
# Simulated crystals from images to maps, compared with the truth: sh demo/simulated.sh OUT
# Needs no data. OUT gets the folders demo_rotation and demo_stills.
set -eu
out=$1
mkdir -p "$out"
cd "$out"

crystal="crystal.space_group=P212121 crystal.unit_cell=34,38,42,90,90,90"
detector="detector.preset=given detector.size=512,512 detector.pixel=0.172
    detector.modules=2,2 detector.gap=7,7 detector.distance=85"
known="space_group=P212121 unit_cell=34,38,42,90,90,90"

for kind in rotation stills; do
    if [ $kind = rotation ]; then
        images="mode=rotation n_images=95 scan.width=1 bragg.sigma=0.001"
    else
        images="mode=stills n_images=60 scan.orientations=random scan.exposure=0.1
            bragg.mosaicity=0.02 bragg.sigma=0.001"
    fi
    folder=demo_$kind
    rm -rf "$folder"
    mkdir "$folder"
    (
        cd "$folder"
        echo "== Simulate images: $kind"
        # shellcheck disable=SC2086
        dials.diffuse_simulate $crystal $detector $images >simulate.out
        tail -n 3 simulate.out
        echo "== Process them"
        dials.diffuse_process sim_1_*.cbf $known input.mask=simulated.mask \
            truth=truth.h5 output.directory=map >process.out
        grep -E '^(Rotation|Stills): ' process.out
        sed -n '/== Comparison/,$p' process.out
    )
    echo "The map is $PWD/$folder/map/merged.h5, the summary $PWD/$folder/map/diffuse.html"
done
