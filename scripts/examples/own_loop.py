"""A multi-threaded PyTorch loop of your own, under the audit. Four lines differ from the loop without it.

python -m trainer workload._target_=own_loop.Loop require=[no_lost_updates,no_torn_reads]

Add +workload.arguments.careless=true to see a lock in the wrong place caught.
"""

from __future__ import annotations

import threading

import torch
from sklearn.datasets import load_digits
from torch import nn

from trainer.workloads.own_loop import LoopReplica


class Loop:
    def __init__(self, num_replicas: int, seed: int, careless: bool = False) -> None:
        torch.manual_seed(seed)
        images, labels = load_digits(return_X_y=True)
        self.x, self.y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        self.module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.careless = careless
        self.lock = threading.Lock()

    def run(self, replica: LoopReplica, steps: int) -> None:  # before: run(self, replica_id, steps)
        samples = torch.Generator().manual_seed(replica.replica_id)
        for _ in range(steps):
            batch = torch.randint(len(self.x), (32,), generator=samples)
            with self.lock:
                replica.read()  # before: nothing, all threads used self.module
            loss = nn.functional.cross_entropy(replica.module(self.x[batch]), self.y[batch])  # before: self.module
            loss.backward()
            with self.lock:
                if self.careless:
                    replica.replace(loss)  # before: parameter.data = parameter_read_above - rate * parameter.grad
                else:
                    replica.add(loss)  # before: self.optimizer.step(); self.optimizer.zero_grad()
