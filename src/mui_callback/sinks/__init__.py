"""Where the points of a training run go: one file for each destination."""
