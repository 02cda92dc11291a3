"""How long collectives take, by the bytes that each GPU sends: rings, at the rate of the slowest link on the way."""

from __future__ import annotations

from tokgraph.ir.cluster import Cluster


def ring_rate(cluster: Cluster, gpus: int) -> float:
    """Bytes a second of a ring over some GPUs, machine by machine.

    Inside a machine it is that of a link. Between machines there are as many rings as GPUs in a machine, and each leaves it by
    the port of another GPU: together they are as fast as all ports, or as a link, whichever is slower.
    """
    if gpus <= cluster.machine:
        return cluster.link
    return min(cluster.link, cluster.machine * cluster.network)


def gather(size: float, gpus: int, rate: float) -> float:
    """Seconds to gather ``size`` bytes from shards on some GPUs, or to reduce as many and scatter them: ``(n - 1) / n``."""
    return (gpus - 1) / gpus * size / rate


def all_reduce(size: float, gpus: int, rate: float) -> float:
    """Seconds to reduce ``size`` bytes and have the sum everywhere: a reduction and a gathering, ``2 (n - 1) / n``.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009, doi 10.1016/j.jpdc.2008.09.002.
    """
    return 2 * gather(size, gpus, rate)
