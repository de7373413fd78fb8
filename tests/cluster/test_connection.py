"""Joining a cluster, or starting Ray in this process."""

from __future__ import annotations

import pytest

from cluster.connection import connect
from defuse_core.errors import InputError


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001"])
def test_an_address_of_another_kind_is_refused_with_what_to_do(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.connection.ray.is_initialized", lambda: False)
    with pytest.raises(InputError, match="expected HOST:PORT .* `defuse submit`"):
        connect(address)
