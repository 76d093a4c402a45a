#!/bin/bash
# Snakemake runs this in the new environment: the wheel of llama-cpp-python has no converter.
set -eu
python -m workflow_scripts.quantize.fetch_llama_cpp
