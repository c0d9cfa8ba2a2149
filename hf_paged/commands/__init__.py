"""What `hf-paged` does, a module for each command: `add_arguments(parser)`, and `run(args)`, which gives the exit code."""
