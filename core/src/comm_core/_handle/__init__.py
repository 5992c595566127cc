"""The handle that `get_backend` returns, and the steps of its calls."""
