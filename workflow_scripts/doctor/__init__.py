"""What this machine has and lacks for what a config builds. `python -m workflow_scripts.doctor`."""
