"""Training of the demo's model after its vocabulary was replaced (`build_demo_model`)."""

from __future__ import annotations

from workflow_scripts.handover.record import Record


class Healing(Record):
    """`healing.json`: loss of every step; empty without healing."""

    step: tuple[int, ...]
    """Number of each step, from 1."""
    loss_nats_per_token: tuple[float, ...]
