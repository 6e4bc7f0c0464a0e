"""The command line `palm-rlhf`: a file a command, put together in `main`."""
