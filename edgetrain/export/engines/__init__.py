"""What :func:`edgetrain.build_engine` is made of, and what is done with an engine afterwards."""
