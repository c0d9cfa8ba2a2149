"""Blocks, tables, tries and plans in plain Python: knows neither transformers nor triton nor a device."""
