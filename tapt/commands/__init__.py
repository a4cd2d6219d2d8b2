"""The commands: each has `add_arguments(parser)`, its options, and `run(args)`, which ends with
an exit status; the work is one call."""
