"""Every loss to compare with, by name."""

from __future__ import annotations

from vmf_bench.peers.attention import prepare_attention
from vmf_bench.peers.chunks import prepare_gradient_chunks, prepare_recomputed_chunks
from vmf_bench.peers.liger import prepare_liger
from vmf_bench.peers.lightly import prepare_lightly
from vmf_bench.peers.linear_cross_entropy import prepare_chunked_linear_cross_entropy, prepare_linear_cross_entropy
from vmf_bench.peers.peer import Peer
from vmf_bench.peers.stored import one_log_softmax, published

PEERS = {
    "published": Peer("published loss, eager", lambda inputs, compile_: published),
    "published-compiled": Peer("published loss, compiled", lambda inputs, compile_: compile_(published), compiles=True),
    "one-log-softmax": Peer("one log-softmax a row, eager", lambda inputs, compile_: one_log_softmax),
    "lightly": Peer("lightly's loss", prepare_lightly),
    "linear-cross-entropy": Peer("torch linear_cross_entropy on stored targets", prepare_linear_cross_entropy),
    "linear-cross-entropy-chunked": Peer(
        "torch linear_cross_entropy on stored targets, chunked", prepare_chunked_linear_cross_entropy
    ),
    "flex-attention": Peer("two compiled flex_attention calls", prepare_attention, compiles=True),
    "liger": Peer("Liger chunked distillation loss", prepare_liger, omits_teacher_entropy=True, compiles=True),
    "one-log-softmax-compiled": Peer(
        "one log-softmax a row, compiled", lambda inputs, compile_: compile_(one_log_softmax), compiles=True
    ),
    "cache-chunks": Peer(
        "row chunks that fit a cache, compiled, gradients in forward", prepare_gradient_chunks, compiles=True
    ),
    "cache-chunks-recomputed": Peer(
        "row chunks that fit a cache, compiled, recompute", prepare_recomputed_chunks, compiles=True
    ),
}
