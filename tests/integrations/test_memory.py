"""Quantizing needs a constant; while loading, the packed size besides; never the parent's size."""

from __future__ import annotations

import sys

import pytest

from tests.conftest import load_benchmark


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_does_not_grow_with_the_parent() -> None:
    benchmark = load_benchmark("peak_memory")
    small, large = benchmark.measure(2, 640), benchmark.measure(8, 640)
    grown = large["parent"] - small["parent"]
    assert grown > 50e6
    # Six more layers cost their packed size, a sixth of 16 bits. Peaks are sampled, so the bound is wide: between that
    # and the parent's growth, which is what loading before quantizing would cost at least.
    assert large["packed"] - small["packed"] < 0.2 * grown
    assert large["peak"] - small["peak"] < 0.6 * grown


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="macOS counts shared pages otherwise")
def test_peak_memory_of_streaming_does_not_grow_with_the_number_of_layers() -> None:
    benchmark = load_benchmark("peak_memory")
    small, large = benchmark.measure_streaming("10m"), benchmark.measure_streaming("50m")
    assert large["parent"] - small["parent"] > 70e6
    # Statistics and names of 168 more layers, and what an allocator does.
    assert large["peak"] - small["peak"] < 25e6
    for result in (small, large):
        assert result["base"] < result["peak"] < result["bound"]
