"""B1 to B6: the rivals of the calls on a GPU, by the names under which their results are stored.

The losses themselves are those of ``vmf-bench``: ``python/vmf_bench/peers/``.
"""

from __future__ import annotations

from vmf_bench.peers.table import PEERS

BASELINES = {
    "B1": PEERS["published"],
    "B2": PEERS["published-compiled"],
    "B3": PEERS["cache-chunks-recomputed"],
    "B3g": PEERS["cache-chunks"],
    "B4": PEERS["flex-attention"],
    "B5": PEERS["linear-cross-entropy-chunked"],
    "B6": PEERS["liger"],
}
