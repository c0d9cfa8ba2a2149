"""The commands of `hf-paged`, a module each: `add_arguments(parser)`, and `run(args)`, which gives the exit code."""
