#!/usr/bin/env bash
# Build the wheel of the sample package, install it where fastdit is installed, run its tests, and take it away again.
set -euo pipefail
cd "$(dirname "$0")"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"; pip uninstall --quiet --yes fastdit-sample' EXIT
pip wheel --quiet --no-deps --wheel-dir "$wheels" ./fastdit-sample
pip install --quiet --no-deps --force-reinstall "$wheels"/fastdit_sample-*.whl
python -m pytest -q ./fastdit-sample/tests
