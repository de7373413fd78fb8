"""Ψ as it is read from the store: shard by shard, or a sample of all."""

from __future__ import annotations

import numpy as np

from defuse_core.artifacts import I64, Failures, Psi, Shard
from defuse_core.config import RunFile
from defuse_core.errors import DamagedError
from defuse_core.identify import load_shard, shard_key
from defuse_core.map_ahead import map_ahead
from defuse_core.seeds import generator
from defuse_core.store import Store

SAMPLE_CODES = 50_000  # of Ψ that are looked at where max_codes is null


def subsample_psi(spec: RunFile, psi: Psi, store: Store) -> Failures:
    """Return at most max_codes rows of Ψ, drawn without replacement, in order; a few shards are in memory at once.

    SAMPLE_CODES rows at most where max_codes is null.
    """
    most = spec.distill.max_codes or SAMPLE_CODES
    if psi.total > most:
        wanted = np.sort(generator(spec.seed, "distill", "sample").choice(psi.total, most, replace=False))
    else:
        wanted = np.arange(psi.total)
    starts = np.concatenate([[0], np.cumsum(psi.codes)])
    nothing: I64 = np.zeros(0, np.int64)
    first, last = np.searchsorted(wanted, starts[:-1]), np.searchsorted(wanted, starts[1:])

    def drawn_from(shard: int) -> Failures:
        rows = wanted[first[shard] : last[shard]] - starts[shard]
        return shard_of_psi(store, psi.fingerprint, shard).failures.take(rows)

    parts = [Failures(np.zeros((0, spec.vae.latent_dim), np.float32), nothing, nothing, nothing, nothing > 0)]
    parts.extend(map_ahead(drawn_from, np.flatnonzero(first < last).tolist()))
    return Failures.concatenate(parts)


def shard_of_psi(store: Store, fingerprint: str, index: int) -> Shard:
    """Return a shard of the Ψ with this fingerprint. Raises DamagedError where it is gone or damaged."""
    remedy = f"delete {store.address}/psi.safetensors and run again: only this shard is made again"
    try:
        return load_shard(store, index, fingerprint, remedy)
    except FileNotFoundError as error:
        where = f"{store.address}/{shard_key(index)}"
        raise DamagedError(
            f"{where}: expected a shard of psi.safetensors, found no such file; {remedy}"
        ) from error
