"""`hf-paged serve`: transformers' own OpenAI-compatible server on a patched model. Needs the extra `serve`."""
