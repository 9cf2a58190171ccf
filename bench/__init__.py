"""Benchmarks: `python -m bench.bench_quantize` and its like, from the checkout. Results go to bench/results/*.json."""
