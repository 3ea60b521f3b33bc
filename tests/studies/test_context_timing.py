"""What is told of a profile: collectives that nothing covers, and everything else."""

from studies.context_timing import told_by


def test_what_nothing_covers():
    """Two collectives of 10 and 30 us: work covers the first, and of the second 5 us at each end."""
    found = told_by([(5, 15), (30, 60)], [(0, 20), (28, 35), (55, 70)])
    assert found == {"nccl_ms": 0.04, "exposed_ms": 0.02, "work_ms": 0.042, "profiled_ms": 0.07}
