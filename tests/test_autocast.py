"""`workload=autocast`: what threads see of main's autocast, and the cache that they share."""

from __future__ import annotations

import pytest
from command import Command, verdict


@pytest.mark.slow
def test_mains_autocast_is_absent_in_threads_and_its_cache_is_not(command: Command) -> None:
    ended = command("experiment=field_autocast", "num_replicas=3", "train.steps=7", "hydra.run.dir=run")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = verdict(command.folder / "run")
    evidence = {each["name"]: each["evidence"] for each in found["guarantees"]}
    assert found["verdict"] == "anomaly"
    # Every look and every call, by every way but the cure.
    assert [(each["kind"], each["where"], each["count"], each["of"]) for each in found["anomalies"]] == [
        ("precision_off", "as it comes", 21, 21),
        ("precision_off", "a Keras layer built in the thread", 21, 21),
        ("precision_off", "in a copy of main's context", 21, 21),
        ("precision_off", "under torch.autocast('cpu') without a dtype", 21, 21),
        ("setting_off", "torch autocast", 3, 3),
        ("setting_off", "torch autocast dtype", 3, 3),
        ("setting_off", "Keras dtype policy", 3, 3),
        ("stale_weights", "all replicas but 0", 14, 14),
    ]
    assert evidence["precision_as_asked"].endswith("; with main's dtype turned on in the thread 21")
    assert evidence["invariants_kept"] == (
        "of 14 calls after an update, computed with the weights from before it: with the cache 14; with "
        "cache_enabled=False 0"
    )
    assert all(each["remedy"] for each in found["anomalies"])
    witness = next(each["witness"] for each in found["anomalies"] if "without a dtype" in each["where"])
    assert witness.endswith("computes in bfloat16")


def test_a_mode_and_weights_that_are_as_asked_are_no_anomaly() -> None:
    from trainer.workloads.defaults.autocast import CACHED, HANDED_OVER, UNCACHED, Seen, judge

    seen = [Seen(), Seen()]
    for each in seen:
        each.steps = 2
        each.calls[HANDED_OVER, "float16"] = 2
        each.stale[CACHED] = each.stale[UNCACHED] = 0
    assert [finding.anomalies for finding in judge(seen).values()] == [[], [], []]


def test_it_is_refused_where_there_is_no_torch(command: Command) -> None:
    ended = command("workload=autocast", "strategy=mirrored")
    message = "workload=autocast needs strategy=threads: it is PyTorch's autocast that it looks at."
    assert (ended.returncode, ended.stderr) == (2, f"trainer: {message}\n")
