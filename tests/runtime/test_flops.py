"""Peaks of devices by the names that JAX gives them. The counter of FLOPs is tested with the
plan."""

import pytest

from relay_jax.runtime.flops import DEVICES, peak_flops

PEAKS = {device.name: device.peak for device in DEVICES}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v6e", "v6e"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H100"),
        ("NVIDIA GH200 480GB", "H100"),
    ],
)
def test_known_devices_have_the_peak_of_their_chip(kind: str, name: str) -> None:
    assert peak_flops(kind) == PEAKS[name]


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "TPU v2",
        "TPU v4 lite",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA A1000",
        "NVIDIA GeForce RTX 4090",
    ],
)
def test_no_peak_is_made_up(kind: str) -> None:
    assert peak_flops(kind) is None
