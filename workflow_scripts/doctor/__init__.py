"""What this machine lacks for a config. Start with `python -m workflow_scripts.doctor`."""
