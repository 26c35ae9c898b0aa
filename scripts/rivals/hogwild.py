"""Hogwild as in PyTorch's example `mnist_hogwild`: processes train one model in shared memory, without a lock.

python scripts/rivals/hogwild.py --model mlp --replicas 2
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from batches import shuffled
from cases import CASES, LEARNING_RATE
from replica_processes import Peers, run
from stopwatch import Stretch, arguments, process_start, say, stretch
from torch import nn
from torch_models import build, tensors


def main() -> None:
    given = arguments(__doc__, replicas={"type": int, "default": 2, "help": "processes (default: 2)"})
    torch.manual_seed(0)
    model = build(CASES[given.model])
    # Gradients are made later, and so by each process for itself.
    model.share_memory()
    stretches = run(given.replicas, replica, given, model)
    say(stretches, parameters=sum(each.numel() for each in model.parameters()), started=process_start())


def replica(rank: int, peers: Peers, given: argparse.Namespace, model: nn.Module) -> Stretch:
    torch.set_num_threads(1)
    case = CASES[given.model]
    x, y = tensors(case)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    batches = shuffled(len(x), case.batch_size, rank, given.replicas)

    def train(steps: int) -> float:
        for _ in range(steps):
            indices = next(batches)
            optimizer.zero_grad()
            loss = criterion(model(x[indices]), y[indices])
            loss.backward()
            optimizer.step()
        return loss.item()

    return stretch(lambda: train(1), train, given.seconds, partial(peers.agree, rank))


if __name__ == "__main__":
    main()
