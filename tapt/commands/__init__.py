"""The commands: each has `add_arguments(parser)` and `run(args)`, and its work is one call."""
