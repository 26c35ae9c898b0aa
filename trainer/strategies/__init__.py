"""Who hosts the replicas. A strategy is a module with `prepare` and `train`; only the chosen one is imported."""
