"""Benchmarks of the head loss; see bench_head."""
