"""What an all-reduce between processes takes, by the alpha-beta model.

A message of n bytes takes alpha + n x beta seconds. A ring of P processes sends 2 (P - 1) messages of n / P bytes one
after the other; halving and doubling 2 log2 P messages that come to the same bytes.

Source: Hockney 1994 (alpha and beta); Thakur, Rabenseifner and Gropp 2005 (both algorithms).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ALGORITHMS = ("ring", "halving")


@dataclass(frozen=True)
class Network:
    """Between processes.

    Attributes:
        alpha_seconds: of a message without content, from one process to another.
        beta_seconds: of each byte.
        gradient_bytes: what is reduced.
    """

    alpha_seconds: float
    beta_seconds: float
    gradient_bytes: float
    algorithm: str = "ring"

    def all_reduce_seconds(self, processes: int) -> float:
        if processes == 1:
            return 0.0
        messages = 2 * (processes - 1) if self.algorithm == "ring" else 2 * math.ceil(math.log2(processes))
        moved = 2 * (processes - 1) / processes * self.gradient_bytes
        return messages * self.alpha_seconds + moved * self.beta_seconds
