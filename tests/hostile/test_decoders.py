"""Any bytes as blocks, codes, scales and packed words: decoded, or refused in our words."""

import contextlib

import pytest
from hostile.decoders import DECODERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit.errors import LowbitError


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=1, max_size=300))
def test_any_bytes_decode(name, data):
    with contextlib.suppress(LowbitError):
        DECODERS[name](data)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_one_byte_all_over(name, byte):
    """Extremes: zeros, NaN, infinities, the largest and the smallest of everything."""
    with contextlib.suppress(LowbitError):
        DECODERS[name](bytes([byte]))
