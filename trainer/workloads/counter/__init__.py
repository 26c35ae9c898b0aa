"""Replicas that count in one variable: what each update mode keeps of each way to write an increment, and at what cost.

From the smallest idea up: `ways.py` and `rules.py` say what goes together; `on_torch.py` and `on_tensorflow.py` have
the increments as users write them; `isolation.py` and `gradients.py` hold round them what an update mode holds;
`roles.py` is what a replica does; `free.py`, `orders.py` and `mirrored.py` run that freely, in given orders, and under
MirroredStrategy; `found.py` tells what came of it.
"""
