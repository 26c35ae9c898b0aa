"""DistributedDataParallel over gloo, one process a replica, as in PyTorch's tutorial.

python scripts/rivals/ddp.py --model mlp --replicas 2
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from batches import shuffled
from cases import CASES, LEARNING_RATE
from replica_processes import Peers, run
from stopwatch import Stretch, arguments, process_start, say, stretch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_models import build, tensors


def main() -> None:
    given = arguments(__doc__, replicas={"type": int, "default": 2, "help": "processes (default: 2)"})
    with tempfile.TemporaryDirectory() as folder:
        stretches = run(given.replicas, replica, given, Path(folder, "store").as_uri())
    parameters = sum(each.numel() for each in build(CASES[given.model]).parameters())
    say(stretches, parameters=parameters, started=process_start())


def replica(rank: int, peers: Peers, given: argparse.Namespace, store: str) -> Stretch:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=given.replicas)
    case = CASES[given.model]
    x, y = tensors(case)
    model = DistributedDataParallel(build(case))
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

    try:
        return stretch(lambda: train(1), train, given.seconds, partial(peers.agree, rank))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
