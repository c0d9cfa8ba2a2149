"""Benchmarks and the demo: stock transformers and hf_paged side by side on a real model.

Not part of the installed package. ``python -m benchmarks`` measures, ``python -m benchmarks.demo`` shows.
"""
