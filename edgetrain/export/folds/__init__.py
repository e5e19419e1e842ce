"""The folds, one family per file; :func:`edgetrain.export.fold.fold` runs them."""
