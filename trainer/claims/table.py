"""All claims of the founding documents, in their order."""

from __future__ import annotations

from trainer.claims import bank, compiled, counter, precision, variable

# S1.8, S1.9 and S3.7 go beyond the documents. S3.5 is about pins, not replicas: `scripts/bump_pins.py` is its answer.
CLAIMS = tuple(
    sorted(
        (*precision.CLAIMS, *counter.CLAIMS, counter.BEYOND, *bank.CLAIMS, *compiled.CLAIMS, *variable.CLAIMS),
        key=lambda claim: claim.name,
    )
)
