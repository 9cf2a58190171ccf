"""Benchmarks: `python -m bench.bench_quantize` and its like, from the checkout. Results go to bench/results/*.json,
`python -m bench.report` makes tables and plots of them, `python -m bench.gpu_report` is everything a GPU is asked."""
