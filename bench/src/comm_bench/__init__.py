"""Times all-reduces of a job's ranks side by side, and checks them; `comm-core bench` is its command line."""
