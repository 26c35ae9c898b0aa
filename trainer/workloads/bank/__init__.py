"""`workload=bank`: transfers between accounts that replicas share, under locks as one writes them and as one should."""
