#!/bin/sh
# Makes the GPU kit: the folder that gpu_check.py runs from on a machine without this checkout and without Rust.
#
#     benches/gpu/kit.sh FOLDER LIBTORCH_VERSION BUILT
#
# Cargo has built the release test binary and the examples with the feature `cuda`; BUILT is a file with cargo's messages
# (`--message-format json`) that name them. A folder above 60 MB is an error.
set -eu
KIT=$1 VERSION=$2 BUILT=$3
LIMIT_MB=60

[ -n "$VERSION" ] || { echo "gpu-kit: the version of libtorch is unknown; set LIBTORCH to a folder that states it" >&2; exit 1; }
rm -rf "$KIT"
mkdir -p "$KIT/bin" "$KIT/root/tests/integration/accelerator" "$KIT/root/fuzz" "$KIT/root/assets"
for name in integration throughput parts; do
    # The last one is that of this build.
    program=$(sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' "$BUILT" | grep -E "/$name(-[0-9a-f]+)?$" | tail -n 1)
    [ -n "$program" ] || { echo "gpu-kit: cargo built no $name" >&2; exit 1; }
    strip --strip-all -o "$KIT/bin/$name" "$program"
done
# What the tests read below CONVPASS_TEST_ROOT.
cp -R tests/integration/fixtures "$KIT/root/tests/integration/"
# The scripts that made them are of no use there; that of the photos is a file of a test.
find "$KIT/root" -name '*.py' ! -path '*/photos/*' -exec rm {} +
cp tests/integration/accelerator/launches.md "$KIT/root/tests/integration/accelerator/"
cp -R fuzz/corpus "$KIT/root/fuzz/"
cp assets/vit_fashion_mnist.safetensors "$KIT/root/assets/"
mkdir "$KIT/peer"
cp benches/peer/*.py benches/peer/requirements.txt "$KIT/peer/"
cp -R benches/gpu/*.py benches/gpu/stand_in "$KIT/"
find "$KIT" -name __pycache__ -prune -exec rm -rf {} +
echo "$VERSION" > "$KIT/libtorch-version"
git rev-parse HEAD > "$KIT/commit" 2>/dev/null || echo unknown > "$KIT/commit"

size=$(find "$KIT" -type f -exec cat {} + | wc -c)
echo "gpu-kit: $KIT, $((size / 1000000)) MB of at most $LIMIT_MB, libtorch $VERSION"
[ "$size" -le $((LIMIT_MB * 1000000)) ] || { echo "gpu-kit: too large" >&2; exit 1; }
