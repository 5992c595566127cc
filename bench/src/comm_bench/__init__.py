"""Time the all-reduces of a job's ranks side by side and check their sums; the command line is `comm-core bench`."""
