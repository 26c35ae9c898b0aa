"""Schedules that are named for what they show: the search stops at the first order that shows it. Data only.

Any update mode, state holder, model or loop can be put under one; where no order shows it, the verdict is the search's,
over all orders that there were.
"""

from __future__ import annotations

# Schedule -> kinds of anomaly of which one is looked for.
RECIPES: dict[str, tuple[str, ...]] = {
    "lost_update": ("lost_update",),
    "torn_read": ("fractured_read", "torn_tensor"),
    "write_cycle": ("write_cycle",),
    "stale_gradient": ("stale_gradient",),
    "write_skew": ("write_skew",),
    "scope_leak": ("mode_leak", "mode_left_on"),
    "wrong_precision": ("precision_off", "gradient_precision_off"),
    "mixed_gradient": ("mixed_gradient",),
    "repeated_first_call": ("repeated_first_call",),
    "repeated_samples": ("repeated_samples", "duplicate_sample"),
    "lost_statistics": ("lost_statistics",),
    "deadlock": ("deadlock",),
}
