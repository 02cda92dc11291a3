"""A cluster from text: units, defaults, and what is refused."""

from __future__ import annotations

import pytest

import tokgraph as tg

FOUR = "gpus=64,memory=80GB,flops=989TFLOPS,bandwidth=3.35TB/s"


def test_units() -> None:
    found = tg.Cluster.parse(f" {FOUR} , network=400Gbit/s, tokens = 1.5T,node=8,reserve=2GiB, link=450e9")
    assert (found.gpus, found.memory, found.flops, found.bandwidth) == (64, 80e9, 989e12, 3.35e12)
    assert (found.network, found.tokens, found.reserve, found.link) == (50e9, 1.5e12, 2 * 2**30, 450e9)
    assert isinstance(found.gpus, int)
    assert tg.Cluster(**found.to_data()) == found


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("memory", "80GiB", 80 * 2**30),
        ("memory", "85899345920", 80 * 2**30),
        ("memory", "8e10", 8e10),
        ("memory", "0.08 TB", 8e10),
        ("memory", "80G", 8e10),
        ("bandwidth", "3350 GB/s", 3.35e12),
        ("bandwidth", "2TiB/s", 2 * 2**40),
        ("network", "400Gbps", 50e9),
        ("flops", "989TFLOP/s", 989e12),
        ("flops", "1pflops", 1e15),
        ("flops", "312T", 312e12),
        ("flops", "9.89e14", 989e12),
        ("tokens", "300B", 3e11),
        ("tokens", "1e12", 1e12),
    ],
)
def test_one_amount(name: str, text: str, value: float) -> None:
    given = dict(part.split("=") for part in FOUR.split(","))
    parsed = tg.Cluster.parse(",".join(f"{k}={v}" for k, v in {**given, name: text}.items()))
    assert getattr(parsed, name) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "gpus, memory, flops, bandwidth must be given"),
        ("gpus=8,memory=80GB,flops=1T", "bandwidth must be given"),
        (f"{FOUR},gpus=8", "gpus is given twice"),
        (f"{FOUR},speed=8", "'speed=8' is not NAME=VALUE with a name of gpus, memory"),
        (f"{FOUR},node", "'node' is not NAME=VALUE"),
        (f"{FOUR},network=50Gb/s", "network=50Gb/s is no amount"),  # bits or bytes?
        (f"{FOUR},reserve=4GB/s", "reserve=4GB/s is a rate"),
        (f"{FOUR},reserve=4iB", "reserve=4iB is no amount"),
        (f"{FOUR},tokens=1GB", "tokens=1GB is no amount"),
        (f"{FOUR},tokens=-1", "tokens=-1 is no amount"),
        (f"{FOUR},reserve=80GB", "the reserve leaves no memory"),
        (f"{FOUR},tokens=0", "tokens=0 is not a number above 0"),
        (f"{FOUR},node=1.5", "node=1.5 is not a whole number from 1 to"),
        (f"{FOUR},node=6", "64 GPUs do not fill machines of 6"),
        (f"{FOUR},stages=1", "64 GPUs are no whole number of pipelines of 1 stages"),
        (f"{FOUR},stages=3", "64 GPUs are no whole number of pipelines of 3 stages"),
        (f"{FOUR},link=1e999", "link=inf is not a number above 0"),
        (f"{FOUR},network=400", "network=400 is less than any GPU has, a unit is missing"),
        (FOUR.replace("80GB", "80"), "memory=80 is less than any GPU has, a unit is missing"),
        (FOUR.replace("TFLOPS", ""), "flops=989 is less than any GPU has, a unit is missing"),
        (FOUR.replace("64", "1e30"), "gpus=1e+30 is not a whole number from 1 to 10,000,000"),
        (FOUR.replace("64", "0"), "gpus=0 is not a whole number"),
        (FOUR.replace("989TFLOPS", "fast"), "flops=fast is no amount"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(tg.PlanError) as error:
        tg.Cluster.parse(text)
    assert message in error.value.message


def test_what_python_gives() -> None:
    with pytest.raises(tg.PlanError, match="memory='80GB' is not a number above 0"):
        tg.Cluster(gpus=8, memory="80GB", flops=1e15, bandwidth=1e12)  # type: ignore[arg-type]
    assert tg.Cluster(gpus=4, memory=1, flops=1, bandwidth=1).machine == 4
