#!/usr/bin/env bash
# Lets prebuildify pack a cmake-js build: it runs this with node-gyp's arguments and takes build/Release/*.node.
set -euo pipefail
exec npx cmake-js rebuild --out build --CDDN_CUDA=ON
