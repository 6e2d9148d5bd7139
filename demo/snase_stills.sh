#!/bin/sh
# A first map of the SNase stills: sh demo/snase_stills.sh DATA OUT
# DATA holds the folder snase_stills; the map and its pictures go to OUT.
set -eu
data=$1
out=$2
case $data in /*) ;; *) data=$PWD/$data ;; esac
stills=$data/snase_stills
if [ ! -f "$stills/processed/refined.expt" ]; then
    echo "demo: $stills/processed/refined.expt is missing: give the folder of the test" \
        "data, make demo DATA=folder" >&2
    exit 1
fi
mkdir -p "$out"
cd "$out"

echo "== Mask: the detector's rim, the shadow of the beam stop, two hot spots"
dials.generate_mask "$stills/geometry.expt" output.mask=snase.mask \
    untrusted.rectangle=0,40,0,1024 untrusted.rectangle=984,1024,0,1024 \
    untrusted.rectangle=0,1024,0,40 untrusted.rectangle=0,1024,984,1024 \
    untrusted.rectangle=510,556,473,517 \
    untrusted.rectangle=184,190,277,294 untrusted.rectangle=100,104,226,231 \
    >generate_mask.out

echo "== Extract: images to voxel observations"
dials.diffuse_extract "$stills/processed/refined.expt" "$stills/processed/refined.refl" \
    mask=snase.mask trusted_range=1,10000 corrections.polarization_fraction=0.965 \
    grid.d_min=1.6

echo "== Scale: images, detector and what is left of the background"
dials.diffuse_scale extracted.expt extracted.refl

echo "== Merge: observations to a map"
dials.diffuse_merge scaled.expt scaled.refl

echo "== Export: for programs that do not read NeXus"
dials.diffuse_export merged.h5 format=ccp4+npz

echo "The map is $PWD/merged.h5, its picture $PWD/merged.png"
