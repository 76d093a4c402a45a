"""Report of what this machine lacks for a config. Start it with `python -m
workflow_scripts.doctor`."""
