"""A plain PyTorch training loop: one replica, eager, batches by indexing tensors in memory.

python scripts/rivals/plain_torch.py --model mlp --seconds 3
"""

from __future__ import annotations

import torch
from batches import shuffled
from cases import CASES, LEARNING_RATE
from stopwatch import arguments, say, stretch
from torch import nn
from torch_models import build, tensors


def main() -> None:
    given = arguments(
        __doc__,
        threads={"type": int, "default": 1, "help": "intra-op threads (default: 1)"},
        compile={"action": "store_true", "help": "train what torch.compile makes of the model"},
        channels_last={"action": "store_true", "help": "keep images and filters in channels-last memory format"},
    )
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    case = CASES[given.model]
    x, y = tensors(case)
    model = build(case)
    if given.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    forward = torch.compile(model) if given.compile else model
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    batches = shuffled(len(x), case.batch_size)

    def train(steps: int) -> float:
        for _ in range(steps):
            indices = next(batches)
            optimizer.zero_grad()
            loss = criterion(forward(x[indices]), y[indices])
            loss.backward()
            optimizer.step()
        return loss.item()

    parameters = sum(each.numel() for each in model.parameters())
    say([stretch(lambda: train(1), train, given.seconds)], parameters=parameters)


if __name__ == "__main__":
    main()
